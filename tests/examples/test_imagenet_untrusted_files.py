"""Files of others: nothing in them runs, and what is wrong with them is one line."""

import json
import os
import pickle

import chainer
import numpy
import pytest
from config import Config
from datasets.originals import read_npz, unpickle
from errors import InputError
from provenance import CONFIG_FILE, settings
from reports.confusion import draw_confusions
from reports.plots import load_history
from snapshot_files import find_snapshots, fingerprint, load_npz
from snapshots import MANIFEST
from test_imagenet_resume import Trained
from tools import evaluate, image_arrays


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def arm(path, folder):
    """Replaces each array of an archive by a pickle that makes ``folder``."""
    with numpy.load(path, allow_pickle=True) as arrays:
        names = arrays.files
    bomb = numpy.empty((), dtype=object)
    bomb[()] = Bomb(folder)
    with open(path, "wb") as f:
        numpy.savez(f, **dict.fromkeys(names, bomb))


@pytest.fixture
def ran(tmp_path):
    """The folder that is there if a file has run its code."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "the code of the file has run"


def test_a_model(tmp_path, ran):
    model = chainer.links.Linear(3, 2)
    path = tmp_path / "model_iter_8"
    chainer.serializers.save_npz(str(path), model)
    arm(path, ran)
    with pytest.raises(InputError, match=r"--initmodel .*model_iter_8: .* holds Python objects"):
        load_npz(path, model, "--initmodel")


def test_initmodel(tmp_path, ran, train):
    model = tmp_path / "model_iter_8"
    network = evaluate.models.create("cifar_resnet20", 32, 10)
    chainer.serializers.save_npz(str(model), network)
    arm(model, ran)
    args = ("--dataset", "digits", "-a", "cifar_resnet20", "-is", "32", "-B", "4", "-i", "1")
    done = train(*args, "-g", "-1", "--initmodel", model, "-o", tmp_path / "out", status=2)
    assert "holds Python objects" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_evaluate(tmp_path, ran, capsys):
    config = Config(dataset="digits", arch="preresnet11", insize=8, nclasses=10)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings(config)))
    with open(tmp_path / "model_iter_5", "wb") as f:
        model = evaluate.models.create("preresnet11", 8, 10)
        chainer.serializers.save_npz(f, model)
    arm(tmp_path / "model_iter_5", ran)
    (tmp_path / "model_iter_²").mkdir()
    assert evaluate.main([str(tmp_path), "--gpu", "-1"]) == 2
    assert "holds Python objects" in capsys.readouterr().err


def crafted(run, out, change):
    """Writes a snapshot, changes it, and makes the manifest fit what has become of it."""
    run.update(3)
    run.snapshots(run.trainer)
    folder = out / "snapshot_iter_3"
    manifest = json.loads((folder / MANIFEST).read_text())
    change(folder)
    for name in manifest["files"]:
        manifest["files"][name] = fingerprint(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["trainer.npz", "rank_0.npz"])
def test_a_snapshot(tmp_path, ran, name):
    folder = crafted(Trained(tmp_path), tmp_path, lambda folder: arm(folder / name, ran))
    run = Trained(tmp_path)
    with pytest.raises(InputError, match=rf"--resume .*{name}: .* holds Python objects"):
        run.snapshots.load(run.trainer, folder)
    with pytest.raises(InputError, match=r"holds Python objects"):
        run.snapshots.load_latest(run.trainer)


def rank_state(**values):
    def change(folder):
        path = folder / "rank_0.npz"
        with numpy.load(path) as arrays:
            found = {**dict(arrays), **{f"random/{k}": numpy.array(v) for k, v in values.items()}}
        with open(path, "wb") as f:
            numpy.savez(f, **found)

    return change


STATES = {
    "a position behind the numbers": {"numpy": "[1000000, 0, 0.0]"},
    "a negative position": {"numpy": "[-1, 0, 0.0]"},
    "a position that is none": {"numpy": '["0", 0, 0.0]'},
    "too few values": {"numpy": "[]"},
    "not a list": {"numpy": "7"},
    "not JSON": {"numpy": "{"},
    "lists without end": {"numpy": "[" * 100_000},
    "a mapping": {"python": '{"0": 1}'},
    "nothing": {"python": "null"},
    "numbers that are text": {"python": '[3, ["a"], null]'},
    "another version": {"python": "[9, [1], null]"},
    "no numbers": {"numpy_keys": numpy.zeros(0, numpy.uint32)},
    "numbers of another kind": {"numpy_keys": "text"},
}


@pytest.mark.parametrize("values", STATES.values(), ids=STATES)
def test_states_of_random_numbers_that_are_none(tmp_path, values):
    folder = crafted(Trained(tmp_path), tmp_path, rank_state(**values))
    run = Trained(tmp_path)
    with pytest.raises(InputError, match=r"--resume .*rank_0.npz: damaged, or not a file of this"):
        run.snapshots.load(run.trainer, folder)


MANIFESTS = {
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "no files": '{"arch": "test", "ranks": 1}',
    "a list of files": '{"files": ["trainer.npz"]}',
    "files without checksums": '{"arch": "test", "ranks": 1, "files": {}}',
    "checksums of another kind": '{"arch": "test", "ranks": 1, "files": {"trainer.npz": {"a": 1}}}',
    "lists without end": "[" * 100_000,
    "bytes": "\udcff",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_of_wrong_types(tmp_path, text):
    run = Trained(tmp_path)
    run.update(3)
    run.snapshots(run.trainer)
    (tmp_path / "snapshot_iter_3" / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"damaged"):
        run.snapshots.load(run.trainer, tmp_path / "snapshot_iter_3")
    assert run.snapshots.load_latest(run.trainer)[0] is None


@pytest.mark.parametrize("name", [MANIFEST, "trainer.npz", "rank_0.npz"])
def test_a_pipe_in_a_snapshot_is_not_waited_for(tmp_path, name):
    run = Trained(tmp_path)
    run.update(3)
    run.snapshots(run.trainer)
    folder = tmp_path / "snapshot_iter_3"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=r"not a snapshot|no such file"):
        run.snapshots.load(run.trainer, folder)


def test_names_that_look_like_snapshots(tmp_path):
    for name in ("snapshot_iter_²", "snapshot_iter_x", "snapshot_iter_", "snapshot_iter_-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    assert find_snapshots(tmp_path) == []
    with pytest.raises(InputError, match=r"no snapshot_iter_N"):
        load_history(tmp_path)


HISTORY = {
    "train": [], "validation": [], "iterations_per_point": 1, "_in_last": 0, "loss_first": None, "loss_last": 1.0,
}  # fmt: skip
HISTORIES = [
    "[]",
    "{}",
    "7",
    "null",
    "{",
    json.dumps(HISTORY | {"train": [[1]]}),
    json.dumps(HISTORY | {"train": [["a"] * 9]}),
    json.dumps(HISTORY | {"validation": {"a": 1}}),
    json.dumps(HISTORY | {"iterations_per_point": "1"}),
    json.dumps(HISTORY | {"loss_first": [1]}),
    json.dumps(HISTORY | {"name": "one more"}),
]


@pytest.mark.parametrize("value", HISTORIES)
def test_a_history_of_wrong_types(tmp_path, value):
    folder = tmp_path / "snapshot_iter_5"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    numpy.savez(folder / "trainer.npz", **{"extensions/History/history": numpy.array(value)})
    with pytest.raises(InputError, match=r"trainer.npz: damaged, or not a file of this model"):
        load_history(tmp_path)


def test_an_empty_history_is_one(tmp_path):
    folder = tmp_path / "snapshot_iter_5"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    value = numpy.array(json.dumps(HISTORY))
    numpy.savez(folder / "trainer.npz", **{"extensions/History/history": value})
    assert load_history(tmp_path).loss_last == 1


def test_a_history(tmp_path, ran):
    folder = tmp_path / "snapshot_iter_5"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    with open(folder / "trainer.npz", "wb") as f:
        numpy.savez(f, **{"extensions/History/history": numpy.array(0)})
    arm(folder / "trainer.npz", ran)
    with pytest.raises(InputError, match=r"holds Python objects"):
        load_history(tmp_path)


def test_confusion_matrices(tmp_path, ran):
    folder = tmp_path / "confusion"
    folder.mkdir()
    (folder / "iter_x.npz").write_bytes(b"not looked at: it is of nobody's")
    assert draw_confusions(tmp_path) == []
    for matrix in (numpy.zeros((2, 3), int), numpy.zeros(4, int), numpy.zeros((2, 2))):
        numpy.savez(folder / "iter_5.npz", confusion=matrix)
        with pytest.raises(InputError, match=r"iter_5.npz: is no confusion matrix"):
            draw_confusions(tmp_path)
    arm(folder / "iter_5.npz", ran)
    with pytest.raises(InputError, match=r"iter_5.npz: damaged .*allow_pickle"):
        draw_confusions(tmp_path)
    (folder / "iter_5.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"iter_5.npz: damaged"):
        draw_confusions(tmp_path)


def test_sets_of_images(tmp_path, ran):
    path = tmp_path / "cifar10.npz"
    numpy.savez(path, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), numpy.zeros(3)))
    arm(path, ran)
    for read in (lambda: read_npz(path, True), lambda: image_arrays.load(str(path))):
        with pytest.raises(InputError, match=r"cifar10.npz: damaged .*allow_pickle"):
            read()
    path.write_bytes(b"PK\x03\x04 cut off")
    for read in (lambda: read_npz(path, True), lambda: image_arrays.load(str(path))):
        with pytest.raises(InputError, match=r"cifar10.npz: damaged"):
            read()


class Dtype:
    """A dtype of objects that says of itself that it has none."""

    def __init__(self, flags):
        self.flags = flags

    def __reduce__(self):
        return numpy.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, self.flags)


class Forged:
    """An array of objects, whose addresses the file says."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __reduce__(self):
        reconstruct = numpy.zeros(1).__reduce__()[0]
        state = (1, (1,), self.dtype, False, b"A" * 8)
        return reconstruct, (numpy.ndarray, (0,), b"b"), state


class Imports:
    def __reduce__(self):
        import _codecs

        return _codecs.encode, ("x", "rot13")


FORGED = {
    "addresses": Forged(Dtype(0)),
    "addresses with a flag": Forged(Dtype(16)),
    "addresses, by the name of the type": Forged("O"),
    "another encoding": Imports(),
    "bytes that are too few": Forged(numpy.dtype("f8,f8")),
    "text": Forged(numpy.dtype("U2")),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", FORGED.values(), ids=FORGED)
def test_forged_arrays_in_a_pickle(value, protocol):
    with pytest.raises(InputError, match=r"batch: damaged or not what its name says"):
        unpickle(pickle.dumps({"labels": value}, protocol), "batch")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", ["u1", "i4", ">i8", "<f4", "?", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_real_arrays_in_a_pickle_are_what_they_were(dtype, protocol, order):
    array = numpy.array([[0, 1, 2], [3, 4, 5]], dtype, order=order)
    found = unpickle(pickle.dumps({"data": array, "n": [1, "a"]}, protocol), "batch")
    numpy.testing.assert_array_equal(found["data"], array, strict=True)
    assert found["n"] == [1, "a"]
