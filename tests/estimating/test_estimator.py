"""estimate(): figures that real runs confirm, errors that say what to do, a model that stays as it was."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pty
import subprocess
import sys
import textwrap

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import tables
from chainer_ooc.__main__ import main
from chainer_ooc.errors import SettingError
from chainer_ooc.estimating import nets
from chainer_ooc.estimating.errors import EstimateError
from tests.conftest import environment_of_children

MIB = 1 << 20


class Net(chainer.Chain):
    """Convolutions, batch normalization, dropout, pooling; parameters that wait for the first input."""

    def __init__(self, width=16):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(None, width, 3, pad=1)
            self.norm = L.BatchNormalization(width)
            self.conv2 = L.Convolution2D(width, width, 3, pad=1)
            self.out = L.Linear(None, 10)

    def forward(self, x, t):
        h = F.relu(self.norm(self.conv(x)))
        h = F.dropout(F.relu(self.conv2(h)))
        h = F.max_pooling_2d(h, 4)
        self.loss = F.softmax_cross_entropy(self.out(h), t)
        return self.loss


def estimate(model=None, inputs=(32, 4), **options):
    options = {"search": False, "device": "h200", **options}
    return chainer_ooc.estimate(Net() if model is None else model, inputs, **options)


def test_saved_and_parameters_are_exact():
    """The hand count: what backward needs, of 4 images of 32 x 32 in float32."""
    result = estimate(device="h200", inputs=(64, 4))
    maps = 4 * 16 * 64 * 64 * 4
    pooled = maps // 16
    # Kept: the convolutions' outputs where something needs them (batch normalization's input, relu's outputs),
    # dropout's mask, and with cuDNN the pooling's input and output.
    assert result.saved_bytes == 5 * maps + pooled
    floats = (3 * 9 + 1) * 16 + 2 * 16 + (16 * 9 + 1) * 16 + (16 * 16 * 16 + 1) * 10
    assert (result.parameter_bytes, result.state_bytes) == (4 * floats, 4 * floats)
    assert estimate(optimizer="adam").state_bytes == 2 * estimate().state_bytes
    assert estimate(optimizer=None).state_bytes == 0


def peak_of_a_convolution():
    """The peak of a convolution that stands alone: all else of it is far smaller than its workspace."""
    return estimate(
        L.Classifier(L.Convolution2D(3, 2, 3)), [((1, 3, 8, 8), "f"), np.zeros((1, 6, 6), "i")]
    )


@pytest.fixture
def cudnn_workspace(monkeypatch):
    """The module that has cuDNN's workspace limit, as a fresh process imports it."""

    def fresh(text=None):
        monkeypatch.delitem(sys.modules, "chainer_ooc.compat.cudnn.workspace", raising=False)
        # Not by its name: tests of cuDNN have had packages of their own in between.
        package = importlib.import_module("chainer_ooc.compat.cudnn")
        monkeypatch.delattr(package, "workspace", raising=False)
        if text is not None:
            monkeypatch.setenv("CHAINER_OOC_CUDNN_WORKSPACE", text)

    monkeypatch.delenv("CHAINER_OOC_CUDNN_WORKSPACE", raising=False)
    fresh()
    return fresh


@pytest.mark.parametrize("nbytes", [None, 0, 8 * MIB, 64 * MIB, 200 * MIB])
def test_convolutions_take_the_workspace_that_the_cudnn_modules_allow(cudnn_workspace, nbytes):
    cudnn_workspace(None if nbytes is None else str(nbytes))
    from chainer_ooc.compat.cudnn import workspace

    result = peak_of_a_convolution()
    allowed = workspace.get_max_workspace_size()
    assert allowed == (workspace.DEFAULT if nbytes is None else nbytes)
    assert allowed <= result.peak_in_core_bytes < allowed + MIB
    said = f"cuDNN: {tables.format_bytes(allowed)} of workspace for a convolution"
    assert any(line.startswith(said) for line in result.assumed)


def test_the_workspace_that_the_program_has_set_counts(cudnn_workspace):
    from chainer_ooc.compat.cudnn import workspace

    workspace.set_max_workspace_size(16 * MIB)
    assert 16 * MIB <= peak_of_a_convolution().peak_in_core_bytes < 17 * MIB


def test_a_workspace_that_is_not_understood_is_an_error_on_a_gpu_only(cudnn_workspace):
    cudnn_workspace("8M")
    with (
        pytest.raises(
            EstimateError, match="CHAINER_OOC_CUDNN_WORKSPACE='8M' is not understood: give a number"
        ),
        pytest.warns(RuntimeWarning, match="without cuDNN"),
    ):
        peak_of_a_convolution()
    assert estimate(device="cpu", inputs=(8, 1)).peak_in_core_bytes


def test_flops_are_those_of_the_products():
    model = chainer.Sequential(L.Linear(64, 32), F.relu, L.Linear(32, 8))
    result = estimate(L.Classifier(model), [((16, 64), "f"), np.zeros(16, "i")])
    # Forward, the gradient of the weights, and that of all inputs but the first.
    assert result.flops == 2 * 16 * (2 * 64 * 32 + 3 * 32 * 8)


CHILD = """
import sys, tracemalloc, chainer_ooc, chainer, numpy as np
from tests.estimating.real_nets import NETS
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
np.ones((64, 64), "f") @ np.ones((64, 64), "f")  # BLAS's own memory
# What runs for the first time brings its code to memory: an estimate counts that as the process's.
small = chainer.Sequential(chainer.links.Convolution2D(1, 2, 3), chainer.functions.relu)
update = chainer.optimizers.MomentumSGD().setup(small).update
update(lambda x: chainer.functions.sum(small(x)), np.ones((1, 1, 8, 8), "f"))
if len(sys.argv) > 2:
    tracemalloc.start()
base = status("VmRSS:")
model, *inputs = NETS[sys.argv[1]]()
optimizer = chainer.optimizers.MomentumSGD().setup(model)
for _ in range(2):
    optimizer.update(model, *inputs)
print(tracemalloc.get_traced_memory()[1] if len(sys.argv) > 2 else status("VmHWM:") - base)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyramid", "recurrent", "translator"])
def test_peak_in_core_is_that_of_a_real_run(name):
    from tests.estimating.real_nets import NETS

    def child(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout.split()[-1])

    measured, arrays = child(), child("arrays")
    model, *inputs = NETS[name]()
    result = chainer_ooc.estimate(model, inputs, device="cpu", search=False, limit="1TiB")
    foreseen = result.peak_in_core_bytes - result.process_bytes
    assert measured > 50 * MIB
    assert arrays <= foreseen <= measured
    # glibc keeps some of what is freed, as addresses come: the pyramid's arrays, 80.7 MB, took 82 to 98 MB.
    assert foreseen == pytest.approx(measured, rel=0.15 if name == "pyramid" else 0.1)


def test_the_model_stays_as_it_was():
    model = Net()
    given = {name: p.array for name, p in model.namedparams() if p.array is not None}
    copies = {name: a.copy() for name, a in given.items()}
    persistent = model.norm.avg_mean, model.norm.avg_mean.copy()
    state = np.random.get_state()[1].copy()
    attributes = set(vars(model))
    estimate(model, device="cpu", limit="1TiB")
    assert model.conv.W.array is None and model.out.W.array is None
    for name, p in model.namedparams():
        if name in given:
            assert p.array is given[name]
            np.testing.assert_array_equal(p.array, copies[name])
    assert model.norm.avg_mean is persistent[0]
    np.testing.assert_array_equal(*persistent)
    assert set(vars(model)) == attributes
    assert (np.random.get_state()[1] == state).all()
    assert all(p.update_rule is None for p in model.params())
    # And it trains.
    x, t = np.random.rand(2, 3, 32, 32).astype("f"), np.zeros(2, "i")
    optimizer = chainer.optimizers.SGD().setup(model)
    optimizer.update(model, x, t)
    assert type(model.conv.W.array) is np.ndarray


def test_it_stays_so_when_it_fails():
    model = Net()
    with pytest.raises(EstimateError, match=r"does not run on these inputs.*ValueError"):
        estimate(model, [((4, 3, 32), "f"), np.zeros(4, "i")])
    assert model.conv.W.array is None
    assert type(np.zeros((256, 256))) is np.ndarray


def test_out_of_core_mode_does_not_matter(tmp_path):
    expected = estimate(inputs=(64, 4))
    with chainer_ooc.out_of_core_mode(swap_all=True, swap_dir=tmp_path):
        before = chainer_ooc.stats().bytes_out
        assert estimate(inputs=(64, 4)).saved_bytes == expected.saved_bytes
        assert chainer_ooc.stats().bytes_out == before


def test_less_memory_moves_more_and_takes_longer():
    in_core = estimate(inputs=(224, 8))
    assert in_core.fits_in_core and in_core.bytes_out == 0
    results = []
    for share in (0.8, 0.5, 0.2):
        limit = in_core.floor_bytes + int(
            share * (in_core.peak_in_core_bytes - in_core.floor_bytes)
        )
        results.append(estimate(inputs=(224, 8), limit=limit))
        assert not results[-1].fits_in_core
        assert results[-1].peak_bytes <= limit
        steps = results[-1]
        assert steps.bound_step_seconds <= steps.planned_step_seconds <= steps.step_seconds
    moved = [0, *(r.bytes_out for r in results)]
    assert moved == sorted(moved) and moved[-1] > moved[1] > 0
    times = [in_core.step_seconds, *(r.step_seconds for r in results)]
    assert times == sorted(times)
    assert "PCIe 5" in results[-1].bottleneck


def test_below_the_floor_it_says_what_makes_it():
    floor = estimate(inputs=(224, 8)).floor_bytes
    estimate(inputs=(224, 8), limit=floor)
    with pytest.raises(
        EstimateError, match=r"limit=.* is below the .* at the least: \w+ (forward|backward)"
    ):
        estimate(inputs=(224, 8), limit=floor - 1)


def test_largest_sizes_are_the_largest():
    options = {"limit": "200MiB", "inputs": (64, 16)}
    found = estimate(search=True, **options).largest
    for key, at in (("batchsize", lambda n: (64, n)), ("insize", lambda n: (n, 16))):
        step = 1 if key == "batchsize" else 32
        for which, takes in (("in_core", "peak_in_core_bytes"), ("out_of_core", "floor_bytes")):
            size = found[key][which]
            fitting, more = (
                getattr(estimate(inputs=at(n), limit="1TiB"), takes) for n in (size, size + step)
            )
            assert fitting <= 200 * MIB < more


def test_equal_questions_have_equal_answers():
    first = estimate(inputs=(64, 4))
    for size in (32, 128):
        estimate(inputs=(size, 2))
        assert estimate(inputs=(64, 4)) == first


def test_graph_of_sequences_of_several_lengths():
    class Tagger(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.embed = L.EmbedID(1000, 32)
                self.lstm = L.NStepLSTM(1, 32, 64, 0.2)
                self.out = L.Linear(64, 5)

        def forward(self, xs):
            _, _, ys = self.lstm(None, None, [self.embed(x) for x in xs])
            return F.sum(self.out(F.concat(ys, axis=0)))

    lengths = [8, 5, 2]
    xs = [np.arange(n, dtype=np.int32) for n in lengths]
    result = estimate(Tagger(), [xs])
    twice = estimate(Tagger(), [[np.arange(2 * n, dtype=np.int32) for n in lengths]])
    assert 1.5 < twice.flops / result.flops < 2.5
    assert result.batchsize is None


def test_a_model_without_a_loss():
    result = estimate(chainer.Sequential(L.Linear(8, 4)), [((2, 8), "f")])
    assert any("returns no loss" in text for text in result.assumed)
    with pytest.raises(EstimateError, match="no float variable"):
        estimate(chainer.Sequential(lambda x: {"size": x.size}), [((2, 8), "f")])


def test_names_and_files(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import chainer.links as L, numpy as np
            def net(insize):
                return L.Classifier(L.Linear(3 * insize * insize, 4))
            def pair():
                return L.Classifier(L.Linear(6, 4)), np.random.rand(5, 6).astype("f"), np.zeros(5, "i")
            def arrays():
                return np.random.rand(5, 6).astype("f"), np.zeros(5, "i")
            def nested():
                return L.Classifier(L.Linear(6, 4)), arrays()
            def specs():
                return L.Classifier(L.Linear(6, 4)), (((5, 6), "f"), ((5,), "i"))
            def one():
                return L.Linear(6, 4), ((5, 6), "f")
            def one_array():
                return L.Linear(6, 4), (arrays()[0],)
            def sizes():
                return L.Classifier(L.Linear(3 * 8 * 8, 4)), (8, 5)
            def inner_tuple():
                return L.Classifier(lambda xs: L.Linear(6, 4)(xs[0])), ((arrays()[0],), arrays()[1])
            def other():
                return 3
        """)
    )
    monkeypatch.chdir(tmp_path)
    assert estimate("mine.py:net", (8, 2)).parameter_bytes == 4 * 4 * (3 * 64 + 1)
    pair = estimate("mine:pair", (8, 2))
    assert pair.batchsize == 5
    for name in ("nested", "specs"):
        assert dataclasses.replace(estimate(f"mine:{name}", (8, 2)), name=pair.name) == pair
    for name in ("one", "one_array", "sizes"):
        assert estimate(f"mine:{name}", (8, 2)).batchsize == 5
    assert estimate("mine:inner_tuple", (8, 2)).parameter_bytes == 0
    with pytest.raises(EstimateError, match=r"must return a chainer.Link"):
        estimate("mine.py:other", (8, 2))
    with pytest.raises(EstimateError, match=r"no callable 'wrong'; it has .*net"):
        estimate("mine.py:wrong", (8, 2))
    with pytest.raises(EstimateError, match=r"cannot be imported.*absent.py"):
        estimate("absent.py:net", (8, 2))
    assert {"vgg16", "googlenet", "resnet50"} <= set(nets.names())


WRONG = {
    "device": ({"device": "h20"}, r"device='h20' is not known \(did you mean 'h200'\?\); choose one of cpu, p100"),
    "network": ({"model": "resnt50"}, r"no network 'resnt50' \(did you mean 'resnet50'\?\); choose one of "),
    "optimizer": ({"optimizer": "momentum"}, r"optimizer='momentum' is not known .*MomentumSGD"),
    "insize": ({"model": "googlenet", "inputs": (230, 2)}, r"insize=230: googlenet takes "),
    "batchsize": ({"inputs": (32, 0)}, r"batchsize=0 is not allowed; give a whole number >= 1"),
    "inputs": ({"inputs": "x"}, r"inputs='x' is not allowed; give \(insize, batchsize\)"),
    "model": ({"model": len}, r"model is of type builtin_function_or_method; give a chainer.Link"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    options, message = WRONG[case]
    with pytest.raises(EstimateError, match=message):
        estimate(**options)


def test_wrong_limit():
    with pytest.raises(SettingError, match="limit='lots' is not"):
        estimate(limit="lots")


class Selecting(chainer.Chain):
    """Trains on the rows whose first number is above 0.9."""

    def __init__(self, select):
        super().__init__()
        self.select = select
        with self.init_scope():
            self.linear = L.Linear(8, 300)

    def forward(self, xs):
        x = xs[0] if isinstance(xs, list) else xs
        return F.sum(F.tanh(self.linear(x[self.select(x[:, 0] > 0.9)])))


SELECTIONS = {
    "mask": lambda mask: mask,
    "nonzero": lambda mask: mask.nonzero()[0],
    "where": lambda mask: np.where(mask)[0],
    "flatnonzero": lambda mask: np.flatnonzero(mask),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
def test_values_that_were_given_decide_shapes(select, nested):
    x = np.random.RandomState(0).rand(1000, 8).astype("f")
    rows = int((x[:, 0] > 0.9).sum())
    found = estimate(Selecting(select), [[x] if nested else x])
    assert found.saved_bytes == rows * 300 * 4
    assert any("those of the given float arrays were used" in note for note in found.assumed)
    if not nested:
        larger = estimate(Selecting(select), [np.concatenate([x, x])])
        assert larger.saved_bytes == 2 * found.saved_bytes


def test_values_that_decide_nothing_are_not_used():
    x = np.ones((1000, 8), "f")
    found = estimate(Selecting(lambda mask: slice(None)), [x])
    assert found.saved_bytes == 1000 * 300 * 4
    assert not [note for note in found.assumed if "values" in note]


def test_without_values_a_mask_selects_everything_and_positions_are_an_error():
    shape = [((1000, 8), "f")]
    found = estimate(Selecting(SELECTIONS["mask"]), shape)
    assert found.saved_bytes == 1000 * 300 * 4
    assert any("a mask was taken to select everything" in note for note in found.assumed)
    with pytest.raises(EstimateError, match="real arrays as inputs where"):
        estimate(Selecting(SELECTIONS["where"]), shape)


def test_progress_is_logged(caplog):
    caplog.set_level("INFO", "chainer_ooc")
    estimate(L.Classifier(L.Linear(None, 4)), (8, 2))
    assert not caplog.messages
    estimate(L.Classifier(L.Linear(None, 4)), (8, 2), search=True)
    looked = [message for message in caplog.messages if message.startswith("looking for the larg")]
    assert "batchsize 4, insize 8" in looked[0]
    assert len(looked) > 3


def test_progress_is_shown_on_terminals_only(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import chainer.links as L\ndef net(insize): return L.Classifier(L.Linear(3 * insize ** 2, 4))\n"
    )
    command = [sys.executable, "-m", "chainer_ooc", "estimate", "mine.py:net", "--insize", "16"]
    command += ["--batchsize", "2", "--device", "v100"]
    main_end, end = pty.openpty()
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment_of_children(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=end,
        check=True,
    )
    os.close(end)
    shown = os.read(main_end, 1 << 20).decode()
    os.close(main_end)
    assert shown.startswith(
        "\r\033[Klooking for the largest sizes that fit: batchsize 4, insize 16\r"
    )
    assert shown.endswith("\r\033[K")
    assert "\n" not in shown
    assert done.stdout.startswith(b"estimate of ")


def test_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import chainer.links as L\ndef net(insize): return L.Classifier(L.Linear(3 * insize ** 2, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["estimate", "mine.py:net", "--insize", "16", "--batchsize", "8", "--device", "v100"]
    assert main([*command, "--json", "--no-search"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = chainer_ooc.estimate("mine.py:net", (16, 8), device="v100", search=False)
    for key in ("peak_in_core_bytes", "peak_bytes", "bytes_out", "bytes_in", "step_seconds"):
        assert found[key] == getattr(expected, key)
    assert main([*command, "--limit", "8GiB"]) == 0
    text = capsys.readouterr().out
    for words in ("peak in core", "moves", "largest batchsize", "bottleneck", "V100", "assumed"):
        assert words in text
    assert main(["estimate", "mine.py:net", "--device", "v10"]) == 2
    assert capsys.readouterr().err.startswith("chainer_ooc estimate: device='v10'")
