"""Data sets in every form that they come in, and clear errors for damaged ones."""

import contextlib
import gzip
import hashlib
import io
import json
import math
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy
import pytest
from datasets import cifar, datum
from datasets.build import build
from datasets.cifar import load_cifar
from datasets.folders import read_folders
from datasets.hdf5 import Hdf5Images
from datasets.labeled import LabeledImages, read_list
from datasets.lmdb_images import LmdbImages
from datasets.lmdb_index import index_path
from datasets.mnist import load_mnist, read_idx
from datasets.opening import open_dataset
from errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from imagenet_cli import IMAGENET, environment
from photographs import write_class_folders
from PIL import Image
from tools import make_hdf5, make_list, make_lmdb


@pytest.fixture
def photos(tmp_path):
    root = write_class_folders(tmp_path / "photos", n=4)
    assert make_list.main([str(root), "-o", str(tmp_path), "--val", "0"]) == 0
    return LabeledImages(read_list(tmp_path / "train.txt"), root)


def run(tool, *args):
    return tool.main([str(a) for a in args])


def assert_same_images(source, expected):
    assert len(source) == len(expected)
    for i in range(len(expected)):
        assert source.label(i) == expected.label(i)
        numpy.testing.assert_array_equal(source.image(i), expected.image(i))
        assert source.image_size(i) == expected.image_size(i)
        assert source.version(i) == source.version(i)


# -- LMDB ----------------------------------------------------------------------------------------


@pytest.fixture
def database(photos, tmp_path):
    pytest.importorskip("lmdb")
    path = tmp_path / "train.lmdb"
    assert run(make_lmdb, tmp_path / "train.txt", "-R", photos.root, "-o", path) == 0
    return path


@pytest.mark.parametrize("file_format", ["images", "datum"])
@pytest.mark.parametrize("index", ["written", "made"])
def test_lmdb_gives_back_what_was_written(photos, tmp_path, file_format, index):
    pytest.importorskip("lmdb")
    path = tmp_path / "a.lmdb"
    args = (tmp_path / "train.txt", "-R", photos.root, "-o", path, "--format", file_format)
    assert run(make_lmdb, *args) == 0
    if index == "made":
        index_path(path).unlink()
    source = LmdbImages(path, 2)
    assert_same_images(source, photos)
    assert index_path(path).exists()
    assert_same_images(pickle.loads(pickle.dumps(source)), photos)
    del source
    if file_format == "images":  # as SRSGD's: path -> the file
        import lmdb

        with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as t:
            for i in range(len(photos)):
                key = str(photos.path(i).relative_to(photos.root)).encode()
                assert t.get(key) == photos.path(i).read_bytes()


def test_lmdb_of_class_folders_has_their_names(photos, tmp_path):
    pytest.importorskip("lmdb")
    path = tmp_path / "a.lmdb"
    assert run(make_lmdb, photos.root, "-o", path) == 0
    source = LmdbImages(path)
    assert source.classes == ["china", "flower"]
    assert_same_images(source, photos)


@pytest.mark.parametrize("channels", [1, 3])
def test_caffe_datum_of_planes_is_read_with_its_channels_in_order(tmp_path, channels):
    lmdb = pytest.importorskip("lmdb")
    rng = numpy.random.default_rng(0)
    images = rng.integers(0, 256, (4, 5, 6, channels), dtype=numpy.uint8)
    with lmdb.open(str(tmp_path / "folder"), map_size=1 << 20) as env, env.begin(write=True) as txn:
        for i, image in enumerate(images):
            planes = image[:, :, ::-1].transpose(2, 0, 1).tobytes()  # blue, green, red
            txn.put(b"%08d" % i, datum.serialize(planes, 7 - i, (channels, 5, 6)))
    source = LmdbImages(tmp_path / "folder")
    for i, image in enumerate(images):
        numpy.testing.assert_array_equal(source.image(i), numpy.broadcast_to(image, (5, 6, 3)))
        assert source.label(i) == 7 - i
        assert source.image_size(i) == (6, 5)


def test_datum_is_googles_encoding():
    """Against the protobuf package, with a message type built from the field numbers."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="d.proto", package="t", syntax="proto2")
    message = file.message_type.add(name="Datum")
    kinds = [("channels", 1, 5), ("height", 2, 5), ("width", 3, 5), ("data", 4, 12),
             ("label", 5, 5), ("float_data", 6, 2), ("encoded", 7, 8)]  # fmt: skip
    for name, number, kind in kinds:
        label = 3 if name == "float_data" else 1
        message.field.add(name=name, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    Datum = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Datum"))
    theirs = Datum(channels=3, height=200, width=70000, data=b"abc" * 100, label=999, encoded=True)
    theirs.float_data.extend([1.5, 2.5])
    parsed = datum.parse(memoryview(theirs.SerializeToString()))
    assert parsed._replace(data=bytes(parsed.data)) == (3, 200, 70000, b"abc" * 100, 999, True)
    again = Datum.FromString(datum.serialize(b"\x01" * 300, 513, (3, 10, 10)))
    assert (again.channels, again.height, again.width, again.label) == (3, 10, 10, 513)
    assert again.data == b"\x01" * 300 and not again.encoded
    assert datum.parse(memoryview(Datum(data=b"x", label=-1).SerializeToString())).label == -1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_datum_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        datum.parse(memoryview(data))


def test_make_lmdb_grows_its_map_and_does_nothing_twice(photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lmdb")
    monkeypatch.setattr(make_lmdb, "FIRST_MAP_SIZE", 32 << 10)
    monkeypatch.setattr(make_lmdb, "CHUNK_IMAGES", 3)
    path = tmp_path / "a.lmdb"
    args = (tmp_path / "train.txt", "-R", photos.root, "-o", path)
    assert run(make_lmdb, *args) == 0
    assert path.stat().st_size > 32 << 10
    assert_same_images(LmdbImages(path), photos)
    before = path.stat().st_mtime_ns
    assert run(make_lmdb, *args) == 0
    assert "are there already" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    assert run(make_lmdb, *args, "--format", "datum") == 2
    assert "is there with other images" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("a.lmdb*")) == ["a.lmdb", "a.lmdb.json"]


def test_a_killed_make_lmdb_continues(photos, tmp_path):
    pytest.importorskip("lmdb")
    big = tmp_path / "big"
    for i in range(60):
        (big / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        data = random.Random(i).randbytes(300_000)  # an image's header and noise behind it
        (big / f"c{i % 2}" / f"{i}.jpg").write_bytes(photos.path(0).read_bytes() + data)
    out = tmp_path / "a.lmdb"
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(IMAGENET)!r})\n"
        "from tools import make_lmdb\nmake_lmdb.CHUNK_IMAGES = 4\nput = make_lmdb.put\n"
        "def slow(*args):\n    put(*args); time.sleep(0.1)\n"
        "make_lmdb.put = slow\nmake_lmdb.main(sys.argv[1:])\n"
    )
    command = [sys.executable, str(script), str(big), "-o", str(out)]
    process = subprocess.Popen(command, env=environment())
    data = tmp_path / "a.lmdb.partial" / "data.mdb"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if data.exists() and data.stat().st_size > 3_000_000:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert data.exists() and not out.exists()
    written = []
    original = make_lmdb.put
    try:
        make_lmdb.put = lambda env, chunk: (written.extend(chunk), original(env, chunk))
        assert run(make_lmdb, big, "-o", out) == 0
    finally:
        make_lmdb.put = original
    assert 0 < len(written) < 60
    source, files = LmdbImages(out), LabeledImages(read_folders(big)[0], big)
    assert len(source) == 60
    for i in range(60):
        assert source._read(i, bytes) == files.path(i).read_bytes()


def test_make_lmdb_names_bad_images_and_finishes_when_they_are_repaired(photos, tmp_path, capsys):
    pytest.importorskip("lmdb")
    good = photos.path(2).read_bytes()
    photos.path(2).write_bytes(b"no image")
    args = (tmp_path / "train.txt", "-R", photos.root, "-o", tmp_path / "a.lmdb")
    assert run(make_lmdb, *args) == 2
    captured = capsys.readouterr()
    assert "1 of 8 images cannot be used" in captured.err
    assert photos.path(2).name in captured.out
    assert not (tmp_path / "a.lmdb").exists()
    photos.path(2).write_bytes(good)
    assert run(make_lmdb, *args) == 0
    assert_same_images(LmdbImages(tmp_path / "a.lmdb"), photos)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_lmdb_is_an_error_not_a_crash(database, part):
    data = database.read_bytes()
    database.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match=r"LMDB .*train.lmdb: (truncated|damaged)"):
        LmdbImages(database)


@pytest.mark.parametrize("indexed", [False, True])
def test_overwritten_pages_of_an_lmdb_are_an_error(database, indexed):
    data = bytearray(database.read_bytes())
    data[8192:] = bytes(len(data) - 8192)  # behind the two pages that say what there is
    database.write_bytes(data)
    if not indexed:
        index_path(database).unlink()
    with pytest.raises(InputError, match=r"LMDB .*train.lmdb: damaged .*; copy or make it again"):
        LmdbImages(database).image(0)


def test_other_damage_to_a_database(database, tmp_path, photos):
    import lmdb

    with pytest.raises(InputError, match=r"no such database"):
        LmdbImages(tmp_path / "none.lmdb")
    index = json.loads(index_path(database).read_text())
    index_path(database).write_text("{}")
    with pytest.raises(InputError, match=r"train.lmdb.json: not the index of .*; remove it"):
        LmdbImages(database)
    index["samples"].pop()
    index_path(database).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"does not fit the 8 entries"):
        LmdbImages(database)
    index_path(database).unlink()
    with pytest.raises(InputError, match=r"label 1 is out of range; allowed are 0 to 0"):
        LmdbImages(database, 1)
    with lmdb.open(str(database), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"china/zzz.jpg", photos.path(0).read_bytes()[:200])
    index_path(database).unlink()
    source = LmdbImages(database)
    with pytest.raises(InputError, match=r"china/zzz.jpg in .*: cannot be decoded"):
        source.image(4)
    other = tmp_path / "other"
    with lmdb.open(str(other)) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"\x00\xff\xff")
    with pytest.raises(InputError, match=r"entry b'key' is neither an image file nor"):
        LmdbImages(other)
    with lmdb.open(str(other)) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"\xff\xd8")
    with pytest.raises(InputError, match=r"key 'key' has no folder to tell the class"):
        LmdbImages(other)


def test_the_pickled_index_is_never_opened(database):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('a pickle was run')",)

    index_path(database).unlink()
    database.with_name("train.lmdb.pt").write_bytes(pickle.dumps(Bomb()))
    assert len(LmdbImages(database)) == 8


# -- HDF5 ----------------------------------------------------------------------------------------


def test_hdf5_in_dbcollections_layout(photos, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    (tmp_path / "names.txt").write_text("china\nflower\n")
    lists = [tmp_path / "train.txt"] * 2
    args = (*lists, "-R", photos.root, "-o", path, "--classes", tmp_path / "names.txt")
    assert run(make_hdf5, *args) == 0
    for part in ("train", "test"):
        source = Hdf5Images(path, part)
        assert_same_images(source, photos)
        assert source.classes == ["china", "flower"]
        assert_same_images(pickle.loads(pickle.dumps(source)), photos)
    with h5py.File(path) as f:
        assert f["train/images"].chunks == (1, 90, 120, 3)
        members = f["train/list_images_per_class"][...]
        assert members.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert bytes(f["train/classes"][1]).rstrip(b"\0") == b"flower"


@pytest.mark.parametrize("layout", ["channels first", "grey", "encoded"])
def test_hdf5_of_others(photos, tmp_path, layout):
    h5py = pytest.importorskip("h5py")
    images = numpy.stack([photos.image(i) for i in range(8)])
    with h5py.File(tmp_path / "a.h5", "w") as f:
        if layout == "encoded":
            kind = h5py.vlen_dtype(numpy.uint8)
            data = f.create_dataset("train/images", (8,), kind)
            for i in range(8):
                data[i] = numpy.frombuffer(photos.path(i).read_bytes(), numpy.uint8)
        elif layout == "grey":
            f["train/images"] = images[:, :, :, 1]
            images = images[:, :, :, 1:2].repeat(3, axis=3)
        else:
            f["train/images"] = images.transpose(0, 3, 1, 2)
        f["train/labels"] = photos.labels.astype(numpy.uint8)
        f["train/classes"] = ["a", "b"]
    source = Hdf5Images(tmp_path / "a.h5", "train")
    assert source.classes == ["a", "b"]
    for i in range(8):
        numpy.testing.assert_array_equal(source.image(i), images[i])
        assert source.image_size(i) == (120, 90)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("train"), "has no group /train"),
        (lambda f: f.pop("train/labels"), "/train/labels is missing"),
        (lambda f: f["train/labels"].__setitem__(0, 9), "labels of /train go from 0 to 9"),
        (lambda f: (f.pop("train/labels"), f.__setitem__("train/labels", [0])), "1 labels for 8"),
        (
            lambda f: (f.pop("train/images"), f.__setitem__("train/images", numpy.zeros((8, 9)))),
            r"is float64 \(8, 9\); expected uint8",
        ),
        (
            lambda f: (f.pop("train/labels"), f.__setitem__("train/labels", [0.0, 1.5] * 4)),
            "/train/labels has 1.5, which is no integer",
        ),
        (
            lambda f: (f.pop("train/labels"), f.__setitem__("train/labels", [math.nan] * 8)),
            "/train/labels has nan, which is no integer",
        ),
        (
            lambda f: (f.pop("train/classes"), f.create_group("train/classes")),
            "/train/classes is no list of names",
        ),
    ],
)
def test_wrong_hdf5_layouts(photos, tmp_path, change, message):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    lists = [tmp_path / "train.txt"] * 2
    assert run(make_hdf5, *lists, "-R", photos.root, "-o", path) == 0
    with h5py.File(path, "a") as f:
        change(f)
    with pytest.raises(InputError, match=message):
        Hdf5Images(path, "train")


def test_damaged_hdf5_and_images_of_two_sizes(photos, tmp_path, capsys):
    pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    lists = [tmp_path / "train.txt"] * 2
    assert run(make_hdf5, *lists, "-R", photos.root, "-o", path) == 0
    data = path.read_bytes()
    for part in (data[:1000], data[: len(data) // 2], b"", b"text"):
        path.write_bytes(part)
        with pytest.raises(InputError, match=r"HDF5 .*: damaged, truncated or not an HDF5 file"):
            Hdf5Images(path, "train")
    Image.new("RGB", (5, 5)).save(photos.path(3))
    path.unlink()
    assert run(make_hdf5, *lists, "-R", photos.root, "-o", path) == 2
    assert "5x5 pixels, but the first image has 120x90" in capsys.readouterr().err
    assert not list(tmp_path.glob("*a.h5*"))
    assert run(make_hdf5, *lists, "-R", photos.root, "-o", path, "--size", "32") == 0


# -- CIFAR and MNIST -----------------------------------------------------------------------------


def cifar_arrays(n, n_classes):
    rng = numpy.random.default_rng(n)
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=numpy.uint8)
    return images, rng.integers(0, n_classes, n)


def python2_pickle(value):
    """Returns a pickle as Python 2 wrote them: byte strings, and NumPy's old module names."""
    data = pickle.dumps(value, protocol=2)
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_files(name, form):
    """Returns a small set's files in their original layout, its images and its labels."""
    n_classes = {"cifar10": 10, "cifar100": 100}[name]
    parts = [
        cifar_arrays(n, n_classes) for n in ((4, 4, 4, 4, 4, 6) if n_classes == 10 else (9, 6))
    ]
    files = {}
    for i, (images, labels) in enumerate(parts):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        test = i == len(parts) - 1
        if form == "python":
            batch = {"data": rows}
            if name == "cifar10":
                file = "test_batch" if test else f"data_batch_{i + 1}"
                files[f"cifar-10-batches-py/{file}"] = python2_pickle(
                    {**batch, "labels": labels.tolist()}
                )
            else:
                batch |= {"fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
                files[f"cifar-100-python/{'test' if test else 'train'}"] = python2_pickle(batch)
        else:
            columns = [labels[:, None].astype(numpy.uint8), rows]
            if name == "cifar10":
                file = "test_batch" if test else f"data_batch_{i + 1}"
                folder = f"cifar-10-batches-bin/{file}.bin"
            else:
                columns.insert(0, (labels // 5)[:, None].astype(numpy.uint8))
                folder = f"cifar-100-binary/{'test' if test else 'train'}.bin"
            files[folder] = numpy.concatenate(columns, axis=1).tobytes()
    names = [f"class{i}" for i in range(n_classes)]
    text = "".join(f"{n}\n" for n in names).encode()
    if form == "python":
        key = "label_names" if name == "cifar10" else "fine_label_names"
        meta = "cifar-10-batches-py/batches.meta" if name == "cifar10" else "cifar-100-python/meta"
        files[meta] = python2_pickle({key: names})
    elif name == "cifar10":
        files["cifar-10-batches-bin/batches.meta.txt"] = text + b"\n"
    else:
        files["cifar-100-binary/fine_label_names.txt"] = text
    train = [numpy.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True)]
    return files, train, parts[-1]


def write_files(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_from_original_files_and_archives(tmp_path, name, form, packed):
    files, train, test = cifar_files(name, form)
    if packed:
        number = name.removeprefix("cifar")
        with tarfile.open(tmp_path / f"cifar-{number}-{form}.tar.gz", "w:gz") as archive:
            for file, data in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        write_files(tmp_path, files)
    for source, (images, labels) in zip(load_cifar(name, tmp_path), (train, test), strict=True):
        numpy.testing.assert_array_equal(source.pixels, images)
        numpy.testing.assert_array_equal(source.labels, labels)
        assert source.classes[3] == "class3"
        numpy.testing.assert_array_equal(source.image(1), images[1])


def test_cifar_npz_with_channels_first_or_last(tmp_path):
    (x, y), (u, v) = cifar_arrays(7, 10), cifar_arrays(5, 10)
    for images in (x, x.transpose(0, 3, 1, 2)):
        numpy.savez(
            tmp_path / "cifar10.npz", x_train=images, y_train=y[:, None], x_test=u, y_test=v
        )
        train, test = load_cifar("cifar10", tmp_path)
        numpy.testing.assert_array_equal(train.pixels, x)
        numpy.testing.assert_array_equal(test.labels, v)


def test_a_missing_set_names_its_files_and_checksums(tmp_path):
    for dataset, file, md5 in (
        ("cifar10", "cifar-10-batches-py/data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("cifar100", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        ("mnist", "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
    ):
        with pytest.raises(InputError) as info:
            open_dataset(dataset, data_root=tmp_path)
        assert f"{file} (md5 {md5})" in str(info.value)
        assert "nothing is downloaded" in str(info.value)
        assert "\n" not in str(info.value)


def test_files_that_are_not_the_published_ones_are_named_and_used(tmp_path, monkeypatch):
    files, _, _ = cifar_files("cifar10", "python")
    write_files(tmp_path, files)
    form = cifar.FORMS["cifar10"][0]
    batch = files[form.train[0].name]
    right = form.train[0]._replace(md5=hashlib.md5(batch).hexdigest())
    unknown = form.train[1]._replace(md5="")
    changed = form._replace(train=(right, unknown, *form.train[2:]))
    monkeypatch.setitem(cifar.FORMS, "cifar10", (changed, cifar.FORMS["cifar10"][1]))
    said = []
    train, _, _ = open_dataset("cifar10", data_root=tmp_path, warn=said.append)
    assert len(train) == 20
    (line,) = said
    assert line.startswith("not as published, and used as they are; get them again unless")
    assert "data_batch_1 " not in line and "data_batch_2 " not in line
    md5 = hashlib.md5(files[form.train[2].name]).hexdigest()
    assert f"{tmp_path / form.train[2].name} (md5 {md5}, published {form.train[2].md5})" in line
    assert "\n" not in line
    said.clear()
    open_dataset("cifar10", data_root=tmp_path)  # without `warn` nothing is compared


def test_archives_and_mnist_are_compared_as_they_were_published(tmp_path):
    files, _, _ = cifar_files("cifar100", "binary")
    archive = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as f:
        for file, data in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(data)
            f.addfile(member, io.BytesIO(data))
    said = []
    load_cifar("cifar100", tmp_path, said.append)
    assert [f"{archive} (md5 " in line for line in said] == [True]
    said.clear()
    for name, array in mnist_files().items():
        (tmp_path / name).write_bytes(idx(array))
    load_mnist(tmp_path, said.append)
    assert not said  # checksums are published of the compressed files alone
    for name, array in mnist_files().items():
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    load_mnist(tmp_path, said.append)
    assert said[0].count(".gz (md5 ") == 4


class Evil:
    def __reduce__(self):
        return exec, ("open('evil', 'w')",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x02}q\x00(", "damaged"),
        (pickle.dumps({"data": Evil()}), r"it asks for builtins.exec, which no data needs"),
        (pickle.dumps([1]), "it is not a dictionary"),
        (pickle.dumps({"labels": [1]}), "`data` is not an array of rows of 3072 bytes"),
        (
            pickle.dumps({"data": numpy.zeros((2, 3072), numpy.uint8), "labels": ["x", "y"]}),
            "`labels` is not a list of integers",
        ),
        (
            pickle.dumps({"data": numpy.zeros((2, 3072), numpy.uint8), "labels": [1]}),
            "`labels` has not one label for each image",
        ),
        (
            pickle.dumps({"data": numpy.zeros((1, 3072), numpy.uint8), "labels": [10]}),
            r"labels go from 0 to 10; allowed are 0 to 9",
        ),
    ],
)
def test_bad_pickles(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    files, _, _ = cifar_files("cifar10", "python")
    files["cifar-10-batches-py/data_batch_2"] = data
    write_files(tmp_path, files)
    with pytest.raises(InputError, match=message):
        load_cifar("cifar10", tmp_path)
    assert not (tmp_path / "evil").exists()


def test_damaged_binary_files_and_archives(tmp_path):
    files, _, _ = cifar_files("cifar10", "binary")
    name = "cifar-10-batches-bin/data_batch_3.bin"
    write_files(tmp_path, {**files, name: files[name][:-1]})
    with pytest.raises(InputError, match=r"data_batch_3.bin: .*are not records of 3073"):
        load_cifar("cifar10", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"CIFAR-10 is not all there, {name} is missing; nothing"):
        load_cifar("cifar10", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b text")
    with pytest.raises(InputError, match=r"cifar-10-binary.tar.gz: damaged"):
        load_cifar("cifar10", tmp_path)
    numpy.savez(tmp_path / "cifar100.npz", x_train=numpy.zeros(1))
    with pytest.raises(InputError, match=r"cifar100.npz: .*it has no array y_train"):
        load_cifar("cifar100", tmp_path)


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist_files():
    rng = numpy.random.default_rng(0)
    arrays = []
    for n in (12, 5):
        arrays.append(rng.integers(0, 256, (n, 28, 28), dtype=numpy.uint8))
        arrays.append(rng.integers(0, 10, n, dtype=numpy.uint8))
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]  # fmt: skip
    return dict(zip(names, arrays, strict=True))


@pytest.mark.parametrize("form", ["gz", "plain", "npz"])
def test_mnist(tmp_path, form):
    arrays = mnist_files()
    x, y, u, v = arrays.values()
    if form == "npz":
        numpy.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    for name, array in arrays.items():
        if form == "gz":
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        elif form == "plain":
            (tmp_path / name).write_bytes(idx(array))
    train, test = load_mnist(tmp_path)
    numpy.testing.assert_array_equal(train.pixels, x)
    numpy.testing.assert_array_equal(test.labels, v)
    numpy.testing.assert_array_equal(test.image(2), u[2][:, :, None].repeat(3, axis=2))


def test_damaged_mnist(tmp_path):
    arrays = mnist_files()
    for name, array in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = gzip.compress(idx(arrays["train-images-idx3-ubyte"]))
    for data, message in (
        (whole[:-20], "damaged"),
        (b"html", "damaged"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "bytes, and should have"),
        (gzip.compress(b"\0\0\x0d\1\0\0\0\0"), "does not begin like an IDX file"),
        (gzip.compress(b"\0\0\x08\3\0\0"), "it ends in its header"),
    ):
        file.write_bytes(data)
        with pytest.raises(InputError, match=rf"train-images-idx3-ubyte.gz: .*{message}"):
            load_mnist(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="not all there, t10k-labels-idx1-ubyte is missing; noth"):
        load_mnist(tmp_path)


def test_real_mnist_files_are_read_where_there_are_some():
    path = IMAGENET.parents[1].parent / "shared" / "data" / "t10k-labels-idx1-ubyte.gz"
    if not path.exists():
        pytest.skip("no MNIST here")
    labels = read_idx(gzip.decompress(path.read_bytes()), path)
    assert numpy.bincount(labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


# -- by name or path -----------------------------------------------------------------------------


def test_what_a_path_is_shows_in_its_contents(photos, database, tmp_path):
    pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    lists = [tmp_path / "train.txt"] * 2
    assert run(make_hdf5, *lists, "-R", photos.root, "-o", path) == 0
    caffes = tmp_path / "new" / "ilsvrc12_train_lmdb"  # its folder is made; no suffix tells
    assert run(make_lmdb, *lists[:1], "-R", photos.root, "-o", caffes, "--format", "datum") == 0
    paths = {
        "caffe": (caffes, caffes),
        "list": (tmp_path / "train.txt", tmp_path / "train.txt"),
        "folder": (photos.root, photos.root),
        "lmdb": (database, database),
        "hdf5": (path, None),
    }
    for train, val in paths.values():
        *sources, n = open_dataset(train=train, val=val, root=photos.root)
        assert n == 2
        for source in sources:
            assert_same_images(source, photos)
    with pytest.raises(InputError, match=r"No such file"):
        open_dataset(train=tmp_path / "none", val=path)
    with pytest.raises(InputError, match=r"dataset 'coco': allowed are files, imagenet"):
        open_dataset("coco")


def test_class_folders_must_be_filled_and_known(photos, tmp_path):
    val = write_class_folders(tmp_path / "val", n=1)
    (val / "china" / "china 0.jpg").unlink()
    with pytest.raises(InputError, match=r"val/china: no images .* in this class"):
        open_dataset(train=photos.root, val=val)
    (val / "china").rename(val / "zebra")
    with pytest.raises(InputError, match=r"val/zebra: is not a class of the training set"):
        open_dataset(train=photos.root, val=val)


def test_imagenet_is_found_in_its_data_root(photos, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(InputError, match=r"ImageNet is not there; nothing is downloaded"):
        open_dataset("imagenet", data_root=root)
    for part in ("train", "val"):
        write_class_folders(root / part, n=2)
    assert open_dataset("imagenet", data_root=root)[2] == 2
    pytest.importorskip("lmdb")
    for part in ("train", "val"):
        out = root / f"{part}_faster_imagefolder.lmdb"
        assert run(make_lmdb, root / part, "-o", out) == 0
        index_path(out).unlink()
    train, _, n = open_dataset("imagenet", data_root=root)
    assert isinstance(train, LmdbImages) and n == 2


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_a_set_by_name_through_its_transforms(tmp_path, dataset):
    if dataset == "cifar10":
        write_files(tmp_path, cifar_files("cifar10", "binary")[0])
    data = build(dataset=dataset, data_root=tmp_path, insize=32, augmentation="cifar", seed=3)
    x, t = data.train[len(data.train) + 1]
    assert x.shape == (3, 32, 32) and x.dtype == numpy.float32
    assert 0 <= t < data.n_classes == 10
    assert data.n_train == (20 if dataset == "cifar10" else 1437)
    assert build(dataset=dataset, data_root=tmp_path, insize=64, augmentation="torch7").val[0][
        0
    ].shape == (3, 64, 64)
    ten = build(
        dataset=dataset, data_root=tmp_path, insize=24, augmentation="torch7", ten_crop=True
    )
    assert ten.val[0][0].shape == (10, 3, 24, 24)
