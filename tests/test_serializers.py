"""chainer_ooc.serializers.load_npz reads what Chainer writes, and runs nothing that it contains."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import chainer
import numpy as np
import pytest

from chainer_ooc.serializers import load_npz


class Bomb:
    """Runs code when it is unpickled; the code shows by a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def member(array, protocol=None, shape=None, version=None):
    """The bytes of a .npy file; with ``shape`` its header says so instead of the truth."""
    file = io.BytesIO()
    if protocol is not None:  # an old NumPy's
        header = {"descr": "|O", "fortran_order": False, "shape": np.shape(array)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(pickle.dumps(array, protocol))
    else:
        np.lib.format.write_array(file, array, version, allow_pickle=True)
    data = file.getvalue()
    if shape is not None:
        true, false = repr(array.shape).encode(), repr(shape).encode()
        data = data.replace(true, false, 1).replace(b" " * (len(false) - len(true)), b"", 1)
    return data


def archive(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


class Link(chainer.Link):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.w = chainer.Parameter(np.zeros((2, 3), np.float32))
        for name, value in (("n", 0), ("s", ""), ("b", False), ("x", None), ("a", np.zeros(2))):
            self.add_persistent(name, value)


def holding(obj):
    return archive(io.BytesIO(), {"w.npy": member(obj)})


@pytest.mark.parametrize("compression", [True, False])
def test_all_that_chainer_writes_is_read_as_chainer_reads_it(tmp_path, compression):
    model = Link()
    model.w.array[...] = np.random.default_rng(0).normal(size=(2, 3))
    model.n, model.s, model.b, model.a = 7, "text ü", True, np.array([np.nan, 1])
    path = tmp_path / "model"
    chainer.serializers.save_npz(str(path), model, compression)
    ours, stock = Link(), Link()
    load_npz(path, ours)
    chainer.serializers.load_npz(str(path), stock)
    for link in (ours, stock):
        np.testing.assert_array_equal(link.w.array, model.w.array)
        assert (link.n, link.s, link.b, link.x) == (7, "text ü", True, None)
        np.testing.assert_array_equal(link.a, model.a)
    with open(path, "rb") as file:
        load_npz(file, Link())


def test_trainers_and_parameters_without_a_shape_are_read(tmp_path):
    def make():
        model = chainer.Sequential(chainer.links.Linear(3, 2), chainer.links.Linear(None, 9))
        optimizer = chainer.optimizers.Adam().setup(chainer.links.Classifier(model[0]))
        data = [(np.ones(3, np.float32), np.int32(i % 2)) for i in range(8)]
        iterator = chainer.iterators.SerialIterator(data, 4)
        updater = chainer.training.StandardUpdater(iterator, optimizer)
        trainer = chainer.training.Trainer(updater, (2, "iteration"), str(tmp_path))
        trainer.extend(chainer.training.extensions.LogReport(trigger=(1, "iteration")))
        return trainer, model

    trainer, model = make()
    trainer.run()
    for name, thing in (("trainer", trainer), ("model", model)):
        chainer.serializers.save_npz(str(tmp_path / name), thing)
    with np.load(tmp_path / "model", allow_pickle=True) as arrays:
        assert arrays["1/W"].dtype == object  # None, as the parameter has no shape yet
    again, other = make()
    load_npz(tmp_path / "trainer", again)
    load_npz(tmp_path / "model", other)
    assert again.updater.iteration == 2 and other[1].W.array is None
    np.testing.assert_array_equal(other[0].W.array, model[0].W.array)


def test_path_strict_and_ignore_names_are_chainers(tmp_path):
    path = tmp_path / "model"
    np.savez(path.with_suffix(".npz"), **{"in/w": np.ones((2, 3), "f"), "in/n": np.array(3)})
    path = path.with_suffix(".npz")
    with pytest.raises(KeyError, match=r"in/[absx] is not a file in the archive"):
        load_npz(path, Link(), "in/")
    link = Link()
    load_npz(path, link, "in/", strict=False)
    assert link.n == 3 and link.w.array[0, 0] == 1
    link = Link()
    load_npz(path, link, "in/", strict=False, ignore_names=["in/n", lambda name: name == "in/w"])
    assert link.n == 0 and link.w.array[0, 0] == 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_none_of_any_version_is_none(protocol):
    data = member(np.array(None, dtype=object), protocol)
    old = data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    for text in {data, old}:
        link = Link()
        link.x = 5
        load_npz(archive(io.BytesIO(), {"x.npy": text}), link, strict=False)
        assert link.x is None


SHAPES = {"a value": (), "an array": (3,), "an empty array": (0,), "a matrix": (2, 2)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_objects_are_an_error_and_do_not_run(tmp_path, shape, protocol):
    bomb = np.full(shape, None, dtype=object)
    bomb[...] = Bomb(tmp_path / "ran")
    data = member(bomb, protocol)
    if not bomb.size:  # the header says that there is nothing
        data += pickle.dumps(Bomb(tmp_path / "ran"), protocol)
    file = archive(tmp_path / "model", {"w.npy": data})
    with pytest.raises(ValueError, match=r"w in the archive cannot be used: it holds Python obj"):
        load_npz(file, Link(), strict=False)
    assert not (tmp_path / "ran").exists()


CRAFTED = {
    "an object behind None": lambda bomb: member(np.array(None, object))[:-1] + bomb[2:],
    "an object in place of an array": lambda bomb: member(np.array(None, object))[:-146] + bomb,
    "objects within a record": lambda bomb: member(np.zeros(2, [("a", "f4"), ("b", object)])),
    "a number in place of None": lambda bomb: member(np.array(7, dtype=object)),
    "text in place of None": lambda bomb: member(np.array("x", dtype=object)),
    "a long pickle": lambda bomb: member(np.array(b"x" * 2000, dtype=object)),
    "a pickle that is cut off": lambda bomb: member(np.array(None, dtype=object))[:-9],
}


@pytest.mark.parametrize("craft", CRAFTED.values(), ids=CRAFTED)
def test_what_is_not_quite_none_is_refused(tmp_path, craft):
    data = craft(pickle.dumps(Bomb(tmp_path / "ran"), 4))
    with pytest.raises(ValueError, match="w in the archive cannot be used"):
        load_npz(archive(tmp_path / "model", {"w.npy": data}), Link(), strict=False)
    assert not (tmp_path / "ran").exists()


DAMAGED = {
    "a header of an enormous shape": member(np.zeros((2, 3), "f"), shape=(1 << 40, 1 << 20)),
    "a shape whose size overflows": member(np.zeros((2, 3), "f"), shape=(1 << 32, 1 << 32)),
    "a negative shape": member(np.zeros((2, 3), "f"), shape=(-2, -3)),
    "many elements of no bytes": member(np.zeros(2, "V0"), shape=(1 << 50,)),
    "a shape that is too small": member(np.zeros((2, 3), "f"), shape=(2, 2)),
    "another version": member(np.zeros(2, [("ü€", "f")]), version=(3, 0)),
    "no header": b"",
    "no array": b"\x93NUMPY" + bytes(100),
    "text": b"hello",
    "an archive": archive(io.BytesIO(), {"w.npy": member(np.zeros(2))}).getvalue(),
    "a header that nests": b"\x93NUMPY\x01\x00\x10\x27" + b"-" * 9000 + b"1" + b" " * 998 + b"\n",
    "a header that computes": b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').mkdir('ran'),), }".ljust(
        117
    )
    + b"\n",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_arrays_are_a_value_error(tmp_path, data, compression, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = archive(tmp_path / "model", {"w.npy": data}, compression=compression)
    with pytest.raises(ValueError, match="w in the archive cannot be used"):
        load_npz(file, Link(), strict=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["head", "array", "directory", "cut", "size"])
def test_damaged_archives_are_a_value_error(tmp_path, part):
    weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    data = bytearray(archive(io.BytesIO(), {"w.npy": member(weights)}).getvalue())
    directory = data.index(b"PK\x01\x02")
    if part == "cut":
        del data[len(data) // 2 :]
    elif part == "size":  # both files claim a terabyte, and so does the header
        data = bytearray(
            archive(io.BytesIO(), {"w.npy": member(weights, shape=(1 << 29, 1 << 1))}).getvalue()
        )
        directory = data.index(b"PK\x01\x02")
        data[directory + 24 : directory + 28] = (128 + (1 << 32) - 256).to_bytes(4, "little")
    else:
        at = {"head": 0, "array": directory - 3, "directory": directory}[part]
        data[at] ^= 255
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(ValueError, match="archive"):
        load_npz(tmp_path / "model", Link(), strict=False)


def test_what_is_no_archive_is_not_unpickled(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match="not an archive of arrays as save_npz writes it"):
        load_npz(path, Link())
    np.save(tmp_path / "bomb.npy", np.array([Bomb(tmp_path / "ran")]), allow_pickle=True)
    with pytest.raises(ValueError, match="not an archive of arrays"):
        load_npz(tmp_path / "bomb.npy", Link())
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none", Link())


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_names_that_lead_out_of_the_archive_write_nothing(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    weights = np.ones((2, 3), np.float32)
    members = {f"{name}.npy": member(weights), "w.npy": member(weights)}
    link = Link()
    load_npz(archive(folder / "model", members), link, strict=False)
    assert link.w.array[0, 0] == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "model"]
