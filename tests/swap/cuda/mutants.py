"""Mutants of the swap engine: each wait, record, hold and check taken away, one at a time, makes some test fail.

    python tests/swap/cuda/mutants.py list [WORD...]   # number and name of each that begins with one of the words
    python tests/swap/cuda/mutants.py all [WORD...]    # run the tests against each: the survivors are printed
    python tests/swap/cuda/mutants.py kill NUMBER...   # against these, with what the tests print

They are found in the syntax trees of all modules of the engine, by what the code does and not by where it
is: calls whose result nobody uses, assignments to attributes, conditions and the parts of those, handlers
of errors, errors raised, events recorded and waited for, the table of legal transitions.

Each mutant runs in a child process of its own, in which the code of one function is replaced.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
SWAP = ROOT / "chainer_ooc" / "swap"
#: What has no state, or only looks on.
NOT_HERE = {
    "__init__.py",
    "disk.py",
    "forked_readers.py",
    "forks.py",
    "native.py",
    "observing.py",
    "process_memory.py",
    "ranks.py",
}
#: The tests, the fastest first. Against more than a few mutants those take part that run the changed function.
TESTS = (
    "tests/swap/test_transfers.py",
    "tests/swap/cuda/test_streams.py",
    "tests/swap/cuda/test_device.py",
    "tests/swap/cuda/test_engine.py",
    "tests/swap/cuda/test_fetching.py",
    "tests/swap/cuda/test_room.py",
    "tests/swap/cuda/test_executor.py",
    "tests/swap/cuda/test_eviction.py",
    "tests/swap/cuda/test_fingerprints.py",
    "tests/swap/test_manager.py",
    "tests/swap/cuda/test_allocator.py",
    "tests/swap/cuda/test_pinned.py",
    "tests/swap/cuda/test_schedules.py",
    "tests/swap/test_prefetch.py",
    "tests/swap/test_budget.py",
    "tests/swap/test_ram.py",
    "tests/swap/test_recipes.py",
    "tests/swap/test_page_pool.py",
    "tests/swap/test_settings.py",
    "tests/graph/test_iteration.py",
)
#: Calls that only count and tell.
TOLD = {"stalled", "copied", "_copied", "ran", "used", "remade"}
#: Functions that only tell.
TELLING = {"stalled", "_copied", "ran", "explain_shortage", "__repr__"}
#: To look which tests run what takes as long as all of them: it is worth it for more mutants than this.
FEW = 20
#: A test that takes longer than so many seconds and its own time so many times hangs: the mutant is noticed.
PATIENCE = 20, 10
#: Mutants in which nothing that can be observed is different, by how their names begin, and why.
EQUIVALENT: dict[str, str] = {
    "player.Player.play: True for self._come and": "_begin_in() asks again",
    "player.Player.play: no self._come[0][0] <= step": "_begin_in() asks again",
    "manager.SwapManager.prefetch: no not self._mover.nbytes[State.OUT]": "saves time only",
    "reclaimer.outside: no one.recipe is not None": "what has neither a copy nor a recipe is not out",
    "recipe.Recipe.fits: no needed.state is State.RESIDENT": "what has no memory counts as held",
    "reclaimer.Reclaimer.begin_ahead: True for room < nbytes": "less than nothing is released",
    "manager.SwapManager.prefetch: no storage.state is State.OUT": "begin_ahead() finds nothing to fetch",
    "player.Player._begin_in: no storage.state is State.OUT": "begin_ahead() finds nothing to fetch",
    "manager.SwapManager.fetch: True for forgone": "saves time only",
    "recipe.Constant.is_unchanged: no self.is_kept": "saves time only",
    "manager.SwapManager.play: True for passing": "saves time only",
    "recipe.Constant.keep: True for not self.is_kept": "a copy of a copy",
    "manager.SwapManager._note_who_holds: no storage.resident": "mark_dirty() leaves what is not here as it is",
    "manager.SwapManager.make_room: no used > low": "less than nothing is written behind",
    "manager.SwapManager.make_room: True for used + nbytes > high": "saves time only",
    "mover.Mover.run_deferred_frees: False for not self.has_dead": "saves time only",
    "manager.SwapManager.usage_without_offload: True for self._mover.has_dead": "saves time only",
    "mover.Mover.end_in: True for storage.ahead": "which of two counters of seconds",
    "mover.Mover.end_in: False for storage.ahead": "which of two counters of seconds",
    "gpus.Gpus.manager_for: True for manager is None": "_add() returns the one there is",
    "mover.Mover.defer_free: True for storage.copy": "an empty grave",
    "mover.Mover.drop: True for storage.owner": "None is the memory of no storage",
    "mover.Mover.defer_free: True for storage.owner": "None is the memory of no storage",
    "mover.Mover.release: True for not storage.used": "prefetch() passes over what was used",
    "reclaimer.Reclaimer.reclaim: False for missing <= 0": "less than nothing is given up",
    "cuda_streams.CopyStreams.on_device: False for": "saves time only",
    "cuda_streams.CopyStreams.note_current: True for len(": "streams are looked through more often",
    "pinned.PinnedSlab.close: no memory.close()": "it is unmapped when the list of chunks goes",
    "pinned.PinnedSlab._make: no memory.close()": "it is unmapped when the function returns",
}

_KILLED, _SURVIVED, _BROKEN = 0, 1, 3


class Mutant(NamedTuple):
    """One change.

    Attributes:
        module: The name of the module.
        function: The qualified name of the outermost function it is in; empty at the module's top.
        number: Its number within the module.
        name: Where it is and what it does, in words.
    """

    module: str
    function: str
    number: int
    name: str


def modules() -> list[str]:
    """Return the names of the engine's modules."""
    files = [path for path in sorted(SWAP.glob("*.py")) if path.name not in NOT_HERE]
    names = ("gpus.py",)
    files += [*sorted(SWAP.glob("devices/cuda*.py")), *(SWAP / "devices" / n for n in names)]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]


def source(module: str) -> Path:
    """Return the file of a module."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


Change = Callable[[ast.AST], ast.AST]


def _becomes(text: str) -> Change:
    """Return what puts code in the place of a statement or an expression."""
    mode = "exec" if text in ("pass", "raise") else "eval"

    def change(node: ast.AST) -> ast.AST:
        new: Any = ast.parse(text, mode=mode)
        return ast.copy_location(new.body[0] if mode == "exec" else new.body, node)

    return change


def _without(field: str, index: int) -> Change:
    """Return what leaves out one of the node's children."""

    def change(node: Any) -> ast.AST:
        rest = getattr(node, field)[:index] + getattr(node, field)[index + 1 :]
        if isinstance(node, ast.BoolOp) and len(rest) == 1:
            return rest[0]
        setattr(node, field, rest)
        return node

    return change


def _test_becomes(value: bool) -> Change:
    def change(node: Any) -> ast.AST:
        node.test = ast.copy_location(ast.Constant(value), node.test)
        return node

    return change


def _body_becomes_raise(node: Any) -> ast.AST:
    node.body = [ast.copy_location(ast.Raise(), node.body[0])]
    return node


def _without_context(node: Any) -> ast.AST:
    always = ast.copy_location(ast.Constant(True), node)
    return ast.copy_location(ast.If(always, node.body, []), node)


def _value_becomes_none(node: Any) -> ast.AST:
    node.value = ast.copy_location(ast.Constant(None), node.value)
    return node


def _value_becomes(value: ast.expr) -> Change:
    def change(node: Any) -> ast.AST:
        node.value = value
        return node

    return change


def _called(node: ast.AST) -> str:
    """Return the name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", "") or getattr(function, "id", "")


def _sites_at(node: Any, in_init: bool) -> Iterator[tuple[str, Change]]:
    """Yield the mutants of one node: the name of the change, and what makes it."""
    text = ast.unparse(node).splitlines()[0] if isinstance(node, ast.stmt | ast.expr) else ""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if _called(node.value) not in TOLD:
            yield f"no {text}", _becomes("pass")
        if isinstance(inner := getattr(node.value.func, "value", None), ast.Call):
            yield f"only {ast.unparse(inner)}", _value_becomes(inner)
    elif isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        target = targets[0].elts[0] if isinstance(targets[0], ast.Tuple) else targets[0]
        plain = ast.unparse(target)
        if isinstance(target, ast.Attribute) and in_init:
            if plain == "self._owner":
                yield f"{plain} = None", _value_becomes_none
        elif isinstance(target, ast.Attribute | ast.Subscript) and "counters" not in plain:
            yield f"no {text}", _becomes("pass")
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        pass
    elif isinstance(node, ast.If | ast.IfExp):
        yield f"True for {ast.unparse(node.test)}", _test_becomes(True)
        yield f"False for {ast.unparse(node.test)}", _test_becomes(False)
    elif isinstance(node, ast.With):
        if _called(node.items[0].context_expr) in ("on_device", "Device"):
            yield f"not {text}", _without_context
    elif isinstance(node, ast.While):
        if not isinstance(node.test, ast.Constant):
            yield f"False for while {ast.unparse(node.test)}", _test_becomes(False)
    elif isinstance(node, ast.BoolOp):
        for index, value in enumerate(node.values):
            yield f"no {ast.unparse(value)} in {text}", _without("values", index)
    elif isinstance(node, ast.comprehension):
        for index, value in enumerate(node.ifs):
            yield f"no if {ast.unparse(value)}", _without("ifs", index)
    elif isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
        kind = ast.unparse(node.type) if node.type else ""
        yield f"raise in except {kind}", _body_becomes_raise
    elif isinstance(node, ast.Raise) and node.exc is not None:
        yield f"no {text}", _becomes("pass")
    elif isinstance(node, ast.Set):
        for index, value in enumerate(node.elts):
            if len(node.elts) > 1:
                yield f"no {ast.unparse(value)} in {text}", _without("elts", index)
    elif isinstance(node, ast.Call) and _called(node) in ("computed", "allocated"):
        yield f"[] for {text}", _becomes("[]")
    elif isinstance(node, ast.Call) and _called(node) == "record" and node.args:
        yield f"never recorded: {text}", lambda call: call.args[0]


def _sites(tree: ast.Module) -> Iterator[tuple[str, str, ast.AST, Change]]:
    """Yield all mutants of a module: the outermost function, the name, the node and the change."""
    names: list[str] = []
    functions: list[str] = []

    def visit(node: ast.AST) -> Iterator[tuple[str, str, ast.AST, Change]]:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named:
            names.append(node.name)  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef):
            functions.append(".".join(names))
        where = ".".join(names)
        telling = names and names[-1] in TELLING
        for what, change in () if telling else _sites_at(node, names[-1:] == ["__init__"]):
            yield functions[0] if functions else "", f"{where}: {what}", node, change
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr_context | ast.Assert):
                yield from visit(child)
        if isinstance(node, ast.FunctionDef):
            functions.pop()
        if named:
            names.pop()

    return visit(tree)


def mutants() -> list[Mutant]:
    """Return all mutants."""
    found = []
    for module in modules():
        seen: dict[str, int] = {}
        for number, (function, name, _, _) in enumerate(
            _sites(ast.parse(source(module).read_text()))
        ):
            name = f"{module.rsplit('.', 1)[1]}.{name}"
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f" ({seen[name]})"
            found.append(Mutant(module, function, number, name))
    return found


def mutated(mutant: Mutant) -> ast.Module:
    """Return the syntax tree of the module with the change."""
    tree = ast.parse(source(mutant.module).read_text())
    *_, node, change = list(_sites(tree))[mutant.number]

    class Replace(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> ast.AST:
            return change(other) if other is node else self.generic_visit(other)

    return ast.fix_missing_locations(Replace().visit(tree))


def apply(mutant: Mutant) -> None:
    """Change the module that is imported."""
    module = importlib.import_module(mutant.module)
    code = compile(mutated(mutant), str(source(mutant.module)), "exec")
    if not mutant.function:  # a table at the top, in which functions look things up
        namespace: dict[str, Any] = dict(module.__dict__)
        exec(code, namespace)
        table = {
            name: namespace[name] for name, value in module.__dict__.items() if type(value) is dict
        }
        for name, value in table.items():
            if name != "__builtins__":
                by_name = {getattr(key, "name", key): item for key, item in value.items()}
                for key in module.__dict__[name]:
                    _replace_set(module.__dict__[name], key, by_name[getattr(key, "name", key)])
        return
    target = _found(mutant)
    while hasattr(target, "__wrapped__"):
        target = target.__wrapped__
    target.__code__ = _code_of(code, mutant.function)


def _found(mutant: Mutant) -> Any:
    """Return the function, as it is called."""
    target: Any = importlib.import_module(mutant.module)
    for name in mutant.function.split("."):
        target = target.__dict__[name]
    return target.fget if isinstance(target, property) else target


def _replace_set(table: dict[Any, Any], key: Any, value: Any) -> None:
    if isinstance(value, set):  # of members of an enum, which the new module has of its own
        kept = {item.name for item in value}
        table[key] = {item for item in table[key] if item.name in kept}


def _code_of(code: types.CodeType, name: str) -> types.CodeType:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_qualname == name:
                return constant
            if name.startswith(constant.co_qualname + "."):
                return _code_of(constant, name)
    raise LookupError(name)


class _Run(NamedTuple):
    """One run of a test: how long it took (seconds), and the files and outermost functions of the engine that ran.

    The latter are ``None`` where nobody has looked.
    """

    seconds: float
    functions: set[tuple[str, str]] | None


@contextlib.contextmanager
def _functions_run() -> Iterator[set[tuple[str, str]]]:
    codes: dict[int, types.CodeType] = {}
    functions: set[tuple[str, str]] = set()

    def note(frame: types.FrameType, *_: object) -> None:
        codes[id(frame.f_code)] = frame.f_code

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield functions
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        for code in codes.copy().values():
            if code.co_filename.startswith(str(SWAP)):
                functions.add((code.co_filename, code.co_qualname.split(".<locals>")[0]))


class Runner:
    """A plugin of pytest that runs the tests, once they are collected, against one mutant after the other.

    Args:
        chosen: The mutants.
        verbose: Print what the tests print.

    Attributes:
        survivors: The names of those that no test noticed.
    """

    def __init__(self, chosen: list[Mutant], verbose: bool = False) -> None:
        self.chosen, self.verbose = chosen, verbose
        self.survivors: list[str] = []
        self._killers: dict[str, int] = {}  # tests, and how many mutants each has noticed
        self._runs: dict[str, _Run] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        """Run them."""
        gc.collect()
        gc.freeze()  # or each collection in a child looks at all modules
        self._runs = {item.nodeid: _Run(1.0, None) for item in session.items}
        if len(self.chosen) > FEW:
            self._look_on(session.items)
        for index, mutant in enumerate(self.chosen):
            start = time.monotonic()
            killed = self._is_noticed(session.items, mutant)
            word, seconds = "killed" if killed else "SURVIVED", time.monotonic() - start
            print(
                f"{index + 1}/{len(self.chosen)} {word} {mutant.name} ({seconds:.1f} s)", flush=True
            )
            if not killed:
                self.survivors.append(mutant.name)
        return True

    def _is_noticed(self, items: list[Any], mutant: Mutant) -> bool:
        while True:
            status, killer = self._run(self._in_order(items, mutant), mutant)
            if status not in (_KILLED, _SURVIVED):
                raise RuntimeError(f"the tests could not be run against {mutant.name}")
            if status == _SURVIVED:
                return False
            if killer in self._killers or self._passes_by_itself(items, killer):
                self._killers[killer] = self._killers.get(killer, 0) + 1
                return True
            print(f"{killer} fails with no mutant, too: it does not count", flush=True)
            del self._runs[killer]

    def _passes_by_itself(self, items: list[Any], name: str) -> bool:
        return self._run([item for item in items if item.nodeid == name], None)[0] == _SURVIVED

    def _run(self, items: list[Any], mutant: Mutant | None) -> tuple[int, str]:
        """Run tests in a child. Returns how it ended, and which test was the last."""

        def tests(told: IO[bytes]) -> int:
            if mutant is not None:
                apply(mutant)
            for item in items:
                signal.alarm(round(PATIENCE[0] + PATIENCE[1] * self._runs[item.nodeid].seconds))
                told.write(f"{item.nodeid}\n".encode())
                told.flush()
                if not self._passes(item):
                    return _KILLED
            return _SURVIVED

        status, names = _in_child(tests, self.verbose)
        return status, names.decode().splitlines()[-1] if names else ""

    def _in_order(self, items: list[Any], mutant: Mutant) -> list[Any]:
        """Return the tests that run what is changed: those that are fast and notice much come first."""
        place = str(source(mutant.module)), mutant.function
        # What is at the top, or remembered, is of use to tests that do not run it.
        everywhere = not mutant.function or hasattr(_found(mutant), "cache_info")
        able = [
            item
            for item in items
            if (run := self._runs.get(item.nodeid))
            and (everywhere or run.functions is None or place in run.functions)
        ]

        def key(item: Any) -> float:
            return self._runs[item.nodeid].seconds / (1 + self._killers.get(item.nodeid, 0))

        return sorted(able, key=key)

    def _look_on(self, items: list[Any]) -> None:
        """Run the tests against no mutant, to see what each runs and how long it takes."""

        def tests(told: IO[bytes]) -> int:
            runs = {}
            for item in items:
                start = time.monotonic()
                with _functions_run() as functions:
                    self._passes(item)
                runs[item.nodeid] = _Run(time.monotonic() - start, functions)
            pickle.dump(runs, told)
            return 0

        self._runs = pickle.loads(_in_child(tests)[1])

    def _passes(self, item: Any) -> bool:
        from _pytest.runner import runtestprotocol

        reports = runtestprotocol(item, log=False)
        failed = [report for report in reports if report.failed]
        if self.verbose:
            print(item.nodeid, *[report.longreprtext for report in failed], sep="\n")
        return not failed


def _in_child(run: Callable[[IO[bytes]], int], verbose: bool = False) -> tuple[int, bytes]:
    """Run in a child process, which exits with what is returned. Returns that, and what was written to the file."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            status = _BROKEN
            try:
                os.setpgid(0, 0)
                if not verbose:
                    silence = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(silence, 1)
                    os.dup2(silence, 2)
                status = run(told)
                told.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has left behind
        told.seek(0)
        # A crash is noticed by whoever runs the tests; so is an alarm.
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else _KILLED, told.read()


def reason(mutant: Mutant) -> str | None:
    """Return why a mutant cannot be noticed, ``None`` if it must be."""
    for begin, why in EQUIVALENT.items():
        if mutant.name.startswith(begin):
            return why
    return None


def run(chosen: list[Mutant], verbose: bool = False) -> list[str]:
    """Run the tests against mutants. Returns the names of those that no test noticed."""
    import hypothesis
    import pytest

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    hypothesis.settings.register_profile(
        "mutants", phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate), database=None
    )
    hypothesis.settings.load_profile("mutants")
    runner = Runner(chosen, verbose)
    tests = [test for test in TESTS if (ROOT / test.split("::")[0]).exists()]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-s", "--no-header"]
    status = pytest.main([*options, *tests], plugins=[runner])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"the run was cut short: {status!r}")
    return runner.survivors


def main(command: str = "all", *arguments: str) -> int:
    """Run a command. Returns 0 if no mutant survived that should not have."""
    everything = mutants()
    if command == "kill":
        chosen = [everything[int(argument)] for argument in arguments]
    else:
        words = arguments or ("",)
        chosen = [mutant for mutant in everything if mutant.name.startswith(words)]
    if command == "list":
        for mutant in chosen:
            why = reason(mutant)
            print(everything.index(mutant), mutant.name, f"[{why}]" if why else "")
        return 0
    if command == "all":
        chosen = [mutant for mutant in chosen if not reason(mutant)]
    survivors = run(chosen, command == "kill")
    print(f"{len(chosen)} mutants, {len(survivors)} survived", *survivors, sep="\n")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
