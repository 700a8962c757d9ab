"""The interpreter ends as it does on stock Chainer, with the same status and nothing printed, whatever lives then."""

from __future__ import annotations

import pytest

PROGRAM = """
import atexit, builtins, gc, logging, os, signal, sys, threading, time, types, warnings
logging.disable()  # the limit is too low for some
{late}
import chainer, chainer.functions as F, numpy as np, psutil

if sys.argv[1] == "limit":
    import chainer_ooc
    chainer_ooc.enable(limit=psutil.Process().memory_info().rss + (24 << 20))
elif sys.argv[1] == "all":
    import chainer_ooc
    chainer_ooc.enable(swap_all=True)
{function}
x = h = chainer.Variable(np.full((4, 1 << 18), 0.5, "f"))
for _ in range(12):
    h = F.tanh(h)
loss = F.sum(h)
{ends}
"""
#: With a function at its top level a module dies otherwise: in a cycle, together with all that lives there.
FUNCTION = """
def graph(depth=12):
    x = h = chainer.Variable(np.full((4, 1 << 18), 0.5, "f"))
    for _ in range(depth):
        h = F.tanh(h)
    return x, F.sum(h)
"""
ENDS = {
    "normally": "",
    "normally, with a function": FUNCTION,
    "after backward": "loss.backward(retain_grad=True)",
    "in the midst of a pass back": """
class Stop(chainer.FunctionHook):
    def backward_preprocess(self, function, in_data, grads):
        if function.rank == 6:
            raise ValueError("stop")
with Stop():
    loss.backward()
""",
    "with an error": "raise ValueError('wrong')",
    "with an error that holds the graph": "h = ValueError('wrong'); h.graph = h, x, loss; raise h",
    "with sys.exit": "sys.exit(3)",
    "with a message": "sys.exit('over')",
    "with Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
    "with SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)",
    "with a cycle": "x.me = x; loss.me = [loss, x, h]; gc.disable(); del x, loss, h",
    "with a module": """
module = types.ModuleType("held"); module.graph = x, loss; del x, loss, h
sys.modules["held"] = module
""",
    "with a cycle of a module": """
module = types.ModuleType("held"); module.graph = x, loss; module.me = module; del x, loss, h
sys.modules["held"] = module
""",
    "with a thread local": "local = threading.local(); local.graph = x, loss; del x, loss, h",
    "with builtins": "builtins.kept = x, loss; del x, loss, h",
    "with a daemon that waits": """
def run(graph):
    ready.set(); time.sleep(60)
ready = threading.Event()
threading.Thread(target=run, args=((x, loss),), daemon=True).start(); ready.wait()
""",
    "with a daemon that trains": f"""{FUNCTION}
def run():
    while True:
        graph(4)[1].backward(); ready.set()
ready = threading.Event()
threading.Thread(target=run, daemon=True).start(); ready.wait()
""",
    "with a thread that is not a daemon": """
def run():
    time.sleep(0.3); loss.backward(); print(float(x.grad.sum()))
threading.Thread(target=run).start()
""",
    "with copies under way": "h = F.tanh(F.tanh(chainer.Variable(np.ones(1 << 25, 'f'))))",
    "with an exit function": "atexit.register(loss.backward)",
    "with a finalizer that reads": """
class Holder:
    def __init__(self, loss): self.loss = loss
    def __del__(self, print=print): self.loss.creator.inputs[0].data; print("read")
holder = Holder(loss)
""",
    "with a gradient": "y, = chainer.grad([loss], [x], enable_double_backprop=True)",
}
#: In these, everything moves out as well.
ALL_OUT = ("normally", "with a daemon that trains", "with copies under way", "with Ctrl-C")


def compare(run_python, tmp_path, ways, ends, late="", function="", **options):
    """Return what comes of a program on stock Chainer, when what comes of it out of core is the same."""
    program = PROGRAM.format(late=late, function=function, ends=ends)
    (tmp_path / "main.py").write_text(program)

    def run(way):
        result = run_python(tmp_path / "main.py", way, timeout=60, **options)
        # Places in files differ.
        errors = [line for line in result.stderr.splitlines() if line[:1] != " "]
        return result.returncode, result.stdout, errors

    stock = run("stock")
    for way in ways:
        assert run(way) == stock
    return stock


@pytest.mark.parametrize("ends", ENDS)
def test_nothing_is_printed_and_the_status_is_that_of_stock_chainer(
    run_python, forked_python, tmp_path, ends
):
    ways = ("limit", "all") if ends in ALL_OUT else ("limit",)
    compare(run_python, tmp_path, ways, ENDS[ends], python=forked_python)


def test_an_exit_function_of_before_the_import_may_run_backward(run_python, tmp_path):
    """It runs after all threads of ours have ended."""
    late = "atexit.register(lambda: (graph()[1].backward(), loss.backward(), print(float(x.grad.sum()))))"
    status, printed, errors = compare(run_python, tmp_path, ("all",), "", late, FUNCTION)
    assert status == 0 and printed and not errors
