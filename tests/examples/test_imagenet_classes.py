"""The training set says which number a class has, in whatever form the sets are."""

import io
import json
import os
import shutil
import time

import chainer
import models
import numpy
import pytest
from config import Config
from datasets.classes import match_labels
from datasets.lmdb_images import LmdbImages
from datasets.lmdb_index import index_path, read_index
from datasets.opening import open_dataset
from errors import InputError
from files import write_text
from PIL import Image
from provenance import CLASSES_FILE, CONFIG_FILE, read_classes, save_classes, settings
from test_imagenet_resume import META, Trained
from tools import evaluate, make_hdf5, make_lmdb

lmdb = pytest.importorskip("lmdb")
h5py = pytest.importorskip("h5py")


def jpeg(text):
    file = io.BytesIO()
    shade = sum(map(ord, text)) * 40 % 256
    Image.fromarray(numpy.full((16, 16, 3), shade, numpy.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_folders(path, classes):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(2):
            (path / name / f"{i}.jpg").write_bytes(jpeg(name))
    return path


def write_raw(path, classes):
    with lmdb.open(str(path), map_size=1 << 22) as env, env.begin(write=True) as txn:
        for name in classes:
            for i in range(2):
                txn.put(f"{name}/{i}.jpg".encode(), jpeg(name))
    return path


def made(*options):
    def write(path, classes):
        folder = write_folders(path.with_name(path.name + "-files"), classes)
        assert make_lmdb.main([str(folder), "-o", str(path), *options]) == 0
        return path

    return write


def write_hdf5(path, classes):
    """A file whose parts each have their own names: it is the training set or the other."""
    path = path.with_suffix(".h5")
    with h5py.File(path, "w") as f:
        for part in ("train", "test"):
            f[f"{part}/images"] = numpy.zeros((2 * len(classes), 16, 16, 3), numpy.uint8)
            f[f"{part}/labels"] = numpy.repeat(numpy.arange(len(classes)), 2)
            f[f"{part}/classes"] = list(classes)
    return path


FORMS = {
    "folders": write_folders,
    "raw": write_raw,
    "made": made(),
    "datum": made("--format", "datum"),
    "hdf5": write_hdf5,
}


def labels(source):
    return [source.label(i) for i in range(len(source))]


@pytest.mark.parametrize("val", FORMS)
@pytest.mark.parametrize("train", FORMS)
def test_a_validation_set_that_lacks_a_class(tmp_path, train, val):
    paths = FORMS[train](tmp_path / "train", "abcd"), FORMS[val](tmp_path / "val", "bd")
    for _ in range(2):  # an index may be beside them the second time
        ours, other, n = open_dataset(train=paths[0], val=paths[1])
        assert (labels(ours), labels(other), n) == ([0, 0, 1, 1, 2, 2, 3, 3], [1, 1, 3, 3], 4)
        assert ours.names == other.names == list("abcd")


@pytest.mark.parametrize("val", FORMS)
@pytest.mark.parametrize("train", ["raw", "hdf5"])
def test_a_class_that_only_the_validation_set_has(tmp_path, train, val):
    paths = FORMS[train](tmp_path / "train", "abd"), FORMS[val](tmp_path / "val", "bcd")
    with pytest.raises(InputError, match=r"val.*c'? ?:? ?is not a class of the training set"):
        open_dataset(train=paths[0], val=paths[1])


@pytest.mark.parametrize(
    "classes", [("012", "12"), ("0123", "03"), ("10", "1"), (["1", "10", "2"], ["2"])]
)
@pytest.mark.parametrize("form", ["folders", "raw", "made", "datum"])
def test_folders_whose_names_are_digits(tmp_path, form, classes):
    train, val = (
        FORMS[form](tmp_path / part, c) for part, c in zip(("train", "val"), classes, strict=True)
    )
    ours, other, _ = open_dataset(train=train, val=val)
    names = sorted(classes[0])
    assert sorted({names[i] for i in labels(other)}) == sorted(classes[1])
    assert sorted({names[i] for i in labels(ours)}) == names


def test_other_orders_of_the_same_names(tmp_path):
    train, val = write_hdf5(tmp_path / "a", "abc"), write_hdf5(tmp_path / "b", "cab")
    assert labels(open_dataset(train=train, val=val)[1]) == [2, 2, 0, 0, 1, 1]


def test_two_classes_of_one_name(tmp_path):
    """ImageNet has two cranes: the same list of names is right, another one cannot be matched."""
    names = ["crane", "maillot", "crane"]
    train, val = write_hdf5(tmp_path / "a", names), write_hdf5(tmp_path / "b", names)
    assert labels(open_dataset(train=train, val=val)[1]) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match=r"two classes have the name 'crane'"):
        open_dataset(train=train, val=write_hdf5(tmp_path / "c", names[:2]))


def test_numbers_mean_the_same_everywhere(tmp_path):
    write_folders(tmp_path, "abc")
    write_text(tmp_path / "train.txt", "a/0.jpg 0\nb/0.jpg 1\nc/0.jpg 2\n")
    write_text(tmp_path / "val.txt", "b/1.jpg 1\nc/1.jpg 2\n")
    paths = {"list": [tmp_path / "train.txt", tmp_path / "val.txt"], "lmdb": [], "folders": []}
    for path in paths["list"]:
        output = path.with_suffix(".lmdb")
        assert make_lmdb.main([str(path), "-R", str(tmp_path), "-o", str(output)]) == 0
        paths["lmdb"].append(output)
    train = write_folders(tmp_path / "more", "abc")
    for pair in (
        paths["list"], paths["lmdb"], [paths["list"][0], paths["lmdb"][1]],
        [train, paths["list"][1]], [train, paths["lmdb"][1]],
    ):  # fmt: skip
        other = open_dataset(train=pair[0], val=pair[1], root=tmp_path)[1]
        assert sorted(set(labels(other))) == [1, 2]
    write_text(tmp_path / "val.txt", "b/1.jpg 1\nc/1.jpg 3\n")
    with pytest.raises(InputError, match=r"val.txt: class 3 is not one of the training set's 3"):
        open_dataset(train=train, val=tmp_path / "val.txt", root=tmp_path)
    val = write_folders(tmp_path / "few", "bc")
    with pytest.raises(
        InputError, match=r"few: has 2 classes with names, but .* 3 classes with numb"
    ):
        open_dataset(train=tmp_path / "train.txt", val=val, root=tmp_path)
    assert labels(open_dataset(train=tmp_path / "train.txt", val=train, root=tmp_path)[1])[-1] == 2


def test_labels_without_a_name_are_an_error():
    numbers = numpy.array([0, 5], numpy.int32)
    with pytest.raises(InputError, match=r"val: class 5 has no name among its 2"):
        match_labels(numbers, ["a", "b"], ["b", "a"], 0, "val")


def test_make_lmdb_and_make_hdf5_number_folders_by_the_names_given(tmp_path):
    names = tmp_path / "classes.txt"
    write_text(names, "a\nb\nc\nd\n")
    train, val = write_folders(tmp_path / "train", "abcd"), write_folders(tmp_path / "val", "bd")
    for kind in ("images", "datum"):
        output = tmp_path / f"{kind}.lmdb"
        options = ["-o", str(output), "--classes", str(names), "--format", kind]
        assert make_lmdb.main([str(val), *options]) == 0
        assert labels(LmdbImages(output)) == [1, 1, 3, 3]
        if kind == "datum":  # the labels are right for other programs, too
            index_path(output).unlink()
            assert labels(LmdbImages(output)) == [1, 1, 3, 3]
    write_text(names, "d\nc\nb\na\n")
    path = tmp_path / "a.h5"
    options = ["--classes", str(names), "-o", str(path)]
    assert make_hdf5.main([str(train), str(val), *options]) == 0
    ours, other, _ = open_dataset(train=path, val=path)
    assert labels(ours) == [3, 3, 2, 2, 1, 1, 0, 0] and labels(other) == [2, 2, 0, 0]


def test_make_hdf5_of_classes_that_do_not_fit(tmp_path, capsys):
    write_folders(tmp_path / "val", "bd")
    write_text(tmp_path / "train.txt", "val/b/0.jpg 1\nval/d/0.jpg 3\n")
    write_text(tmp_path / "classes.txt", "a\nb\nc\n")
    arguments = ["-R", str(tmp_path), "-o", str(tmp_path / "a.h5")]
    train, val, classes = (str(tmp_path / n) for n in ("train.txt", "val", "classes.txt"))
    assert make_hdf5.main([train, val, *arguments]) == 2
    assert "whose numbers have no names; give --classes" in capsys.readouterr().err
    assert make_hdf5.main([train, train, "--classes", classes, *arguments]) == 2
    assert "class 3: has no name among the 3 classes" in capsys.readouterr().err
    assert make_hdf5.main([val, val, "--classes", classes, *arguments]) == 2
    assert "d: is not a class of the training set" in capsys.readouterr().err


def test_hdf5_keeps_names_of_any_language(tmp_path):
    write_folders(tmp_path / "train", ["é", "è"])
    write_folders(tmp_path / "val", ["é"])
    path = tmp_path / "a.h5"
    assert make_hdf5.main([str(tmp_path / "train"), str(tmp_path / "val"), "-o", str(path)]) == 0
    assert open_dataset(train=path, val=path)[0].names == ["è", "é"]
    assert labels(open_dataset(train=path, val=tmp_path / "val")[1]) == [1, 1]


@pytest.mark.parametrize("form", ["folders", "raw"])
def test_evaluate_goes_by_the_classes_of_the_training(tmp_path, form, capsys):
    """A class more or less in the training set since would renumber all that follow."""
    root, result = tmp_path / "data", tmp_path / "result"
    for path in (root, result):
        path.mkdir()
    train, val = FORMS[form](root / "train", "abc"), FORMS[form](root / "val", "bc")
    numpy.save(tmp_path / "mean.npy", numpy.zeros(3))
    config = Config(
        train=train, val=val, mean=tmp_path / "mean.npy", nclasses=3, arch="preresnet11", insize=8
    )
    (result / CONFIG_FILE).write_text(json.dumps(settings(config)))
    model = models.create("preresnet11", 8, 3)
    chainer.serializers.save_npz(str(result / "model_iter_1"), model)
    save_classes(open_dataset(train=train, val=val)[0].names, result)
    assert read_classes(result) == list("abc")
    assert evaluate.main([str(result), "--gpu", "-1"]) == 0
    before = (result / "confusion.csv").read_text()
    assert [sum(map(int, line.split(","))) for line in before.split()] == [0, 2, 2]
    shutil.rmtree(train)  # class a is gone, and nothing else knows of it
    FORMS[form](train, "bc")
    index_path(train).unlink(missing_ok=True)
    assert evaluate.main([str(result), "--gpu", "-1"]) == 0
    assert (result / "confusion.csv").read_text() == before
    capsys.readouterr()
    shutil.rmtree(train)
    FORMS[form](train, ["a", "aa", "b", "c"])
    index_path(train).unlink(missing_ok=True)
    assert evaluate.main([str(result), "--gpu", "-1"]) == 2
    assert "aa" in capsys.readouterr().err
    (result / CLASSES_FILE).write_text('["a", 1]')
    assert evaluate.main([str(result), "--gpu", "-1"]) == 2
    assert "classes.json: is no list of names" in capsys.readouterr().err


def test_a_run_leaves_its_classes_and_does_not_go_on_with_others(tmp_path, train):
    root, out = tmp_path / "data", tmp_path / "out"
    write_folders(root / "train", "abc"), write_folders(root / "val", "bc")
    numpy.save(tmp_path / "mean.npy", numpy.zeros(3))
    args = (root / "train", root / "val", "-m", tmp_path / "mean.npy", "--nclasses", "4", "-a", "preresnet11",
            "-is", "8", "-B", "2", "-b", "2", "--gpu", "-1", "-o", out)  # fmt: skip
    train(*args, "-i", "1", "--snapshot-iterations", "1")
    assert json.loads((out / CLASSES_FILE).read_text()) == list("abc")
    (root / "train" / "a").rename(root / "train" / "z")
    done = train(*args, "-i", "2", "--resume", "auto", status=2)
    assert "was made with names of classes 3 (" in done.stderr
    assert "use the same names of classes" in done.stderr


def test_snapshots_of_sets_without_names_need_none(tmp_path):
    run = Trained(tmp_path)
    run.update(1)
    run.snapshots(run.trainer)
    again = Trained(tmp_path, meta={**META, "names of classes": None})
    assert again.snapshots.load_latest(again.trainer)[0] is not None


# -- the index of a database ---------------------------------------------------------------------


def datum(label):
    return b"\x08\x03\x10\x08\x18\x08\x22\xc0\x01" + bytes(192) + b"\x28" + bytes([label])


def write_datums(path, numbers, keys=None):
    shutil.rmtree(path, ignore_errors=True)
    with lmdb.open(str(path), map_size=1 << 22) as env, env.begin(write=True) as txn:
        for i, label in enumerate(numbers):
            txn.put((keys[i] if keys else f"{i:08d}").encode(), datum(label))


def age(path, seconds=100):
    """Lets a database, and so its index, be older than what a file system may not tell apart."""
    then = time.time() - seconds
    for file in path.iterdir() if path.is_dir() else [path]:
        os.utime(file, (then, then))


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize(
    "numbers", [[2, 0, 1], [0, 2, 1], [0, 1, 2, 3], [0, 1], [0, 1, 5]], ids=str
)
def test_a_database_made_anew_beside_an_old_index(tmp_path, numbers, aged):
    path = tmp_path / "train.lmdb"
    write_datums(path, [0, 1, 2])
    if aged:
        age(path)
    for _ in range(2):
        assert LmdbImages(path).labels.tolist() == [0, 1, 2]
    write_datums(path, numbers)
    if aged:
        age(path, 50)
    assert LmdbImages(path).labels.tolist() == numbers
    assert read_index(path).samples == [(f"{i:08d}", n) for i, n in enumerate(numbers)]


def test_a_database_made_anew_of_the_same_age(tmp_path):
    """Only the keys differ."""
    path = tmp_path / "train.lmdb"
    for keys in ("abc", "abd", "bcd"):
        write_datums(path, [0, 1, 2], keys)
        age(path)
        assert [LmdbImages(path)._key(i).decode() for i in range(3)] == list(keys)


def test_an_index_from_before_databases_were_noted_in_it(tmp_path):
    path = tmp_path / "train.lmdb"
    write_datums(path, [2, 0, 1])
    old = {"kind": "datum", "classes": list("abc"), "samples": [[f"{i:08d}", i] for i in range(3)]}
    index_path(path).write_text(json.dumps(old))
    assert LmdbImages(path).labels.tolist() == [2, 0, 1]
    old["samples"] = [["00000000", 2], ["00000001", 0], ["00000002", 1]]
    index_path(path).write_text(json.dumps(old))
    age(path)
    assert LmdbImages(path).classes == list("abc")  # it is right, so its names are, too
    assert read_index(path).database is not None


@pytest.mark.parametrize("kind", ["images", "datum"])
def test_a_copied_database_keeps_its_index(tmp_path, kind):
    """Copying changes the time; labels of a list are nowhere but in the index."""
    write_folders(tmp_path, "abc")
    write_text(tmp_path / "list.txt", "c/0.jpg 0\na/0.jpg 1\nb/0.jpg 2\n")
    output = tmp_path / "made.lmdb"
    options = ["-R", str(tmp_path), "--format", kind, "-o", str(output)]
    assert make_lmdb.main([str(tmp_path / "list.txt"), *options]) == 0
    age(output, 1000)
    source = LmdbImages(output)
    assert {source._key(i).decode()[-7]: source.label(i) for i in range(3)} == {
        "c": 0,
        "a": 1,
        "b": 2,
    }
    assert make_lmdb.main([str(tmp_path / "list.txt"), *options]) == 0  # it is there already


def test_image_files_made_anew_beside_an_old_index(tmp_path):
    path = tmp_path / "train.lmdb"
    write_raw(path, "abc")
    age(path)
    assert labels(LmdbImages(path)) == [0, 0, 1, 1, 2, 2]
    shutil.rmtree(path)
    write_raw(path, "abx")
    age(path)
    source = LmdbImages(path)
    assert (source.classes, labels(source)) == (["a", "b", "x"], [0, 0, 1, 1, 2, 2])
    index = json.loads(index_path(path).read_text())
    del index["derived"]  # one that has labels of a list
    index["samples"][0][0] = "other"
    index_path(path).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"train.lmdb.json: not the index of .*; remove it"):
        LmdbImages(path)


def test_an_index_that_is_right_is_not_made_again(tmp_path, monkeypatch):
    from datasets import lmdb_index

    path = tmp_path / "train.lmdb"
    write_datums(path, [0, 1, 2])
    age(path)
    LmdbImages(path)
    monkeypatch.setattr(lmdb_index, "_derive", None)
    monkeypatch.setattr(lmdb_index, "_confirms", None)
    assert LmdbImages(path).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "pickle"}, {"classes": 3}, {"classes": [1, 2]}, {"samples": {"a": 1}}, {"samples": [["a"]]},
        {"samples": [[1, "a"]]}, {"samples": [["a", "1"]]}, {"samples": [["a", 1.5]]}, {"samples": [["a", True]]},
        {"samples": [["a", 2**31]]}, {"samples": [["a", 10**400]]}, {"database": "yes"}, {"samples": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_of_wrong_types(tmp_path, change):
    path = tmp_path / "train.lmdb"
    write_datums(path, [0])
    right = {"kind": "datum", "classes": ["0"], "samples": [["00000000", 0]]}
    index_path(path).write_text(json.dumps({**right, **change}))
    with pytest.raises(InputError, match=r"train.lmdb.json: not the index of .*; remove it"):
        LmdbImages(path)
