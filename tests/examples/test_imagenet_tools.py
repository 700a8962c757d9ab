"""The data tools: complete, resumable, the same again, and clear about what is wrong."""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compute_mean
import numpy
import pytest
from datasets import statistics
from datasets.decoding import read_image
from datasets.labeled import LabeledImages, read_list
from datasets.resizing import resize
from errors import InputError
from imagenet_cli import IMAGENET, environment
from photographs import photographs, write_class_folders
from PIL import Image
from tools import check, converting, crop, enlarge, make_list, make_mini


@pytest.fixture
def photos(tmp_path):
    return write_class_folders(tmp_path / "photos")


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def run(tool, *args: object) -> int:
    return tool.main([str(a) for a in args])


def test_make_list_splits_each_class(photos, tmp_path, capsys):
    out = tmp_path / "lists"
    assert run(make_list, photos, "-o", out, "--val", 1 / 3) == 0
    train, val = read_list(out / "train.txt", 2), read_list(out / "val.txt", 2)
    assert sorted(name for name, _ in train + val) == sorted(
        f"{c}/{c} {i}.jpg" for c in ("china", "flower") for i in range(6)
    )
    assert collections.Counter(label for _, label in train) == {0: 4, 1: 4}
    assert collections.Counter(label for _, label in val) == {0: 2, 1: 2}
    names = (out / "classes.txt").read_text().split()
    assert all(name.startswith(names[label]) for name, label in train + val)
    before = files(out)
    assert run(make_list, photos, "-o", out, "--val", 1 / 3) == 0
    assert files(out) == before
    assert run(make_list, photos, "-o", out, "--val", 1 / 3, "--seed", 1) == 0
    assert files(out) != before


def test_make_list_of_train_and_val_folders_and_of_loose_validation_images(photos, tmp_path):
    root = tmp_path / "root"
    (root / "val").mkdir(parents=True)
    photos.rename(root / "train")
    for i, c in ((4, "flower"), (5, "china")):
        (root / "train" / c / f"{c} {i}.jpg").rename(root / "val" / f"v{i}.JPEG")
    truth = tmp_path / "truth.txt"
    truth.write_text("v4 flower\nv5.JPEG china\n")
    assert run(make_list, root, "-o", tmp_path, "--val-labels", truth) == 0
    assert read_list(tmp_path / "val.txt") == [("val/v4.JPEG", 1), ("val/v5.JPEG", 0)]
    assert len(read_list(tmp_path / "train.txt")) == 10
    truth.write_text("v9 flower\n")
    assert run(make_list, root, "-o", tmp_path, "--val-labels", truth) == 2


def test_make_list_errors(photos, tmp_path, capsys):
    (photos / "empty").mkdir()
    assert run(make_list, photos, "-o", tmp_path / "l") == 2
    assert "photos/empty: no images" in capsys.readouterr().err
    assert not (tmp_path / "l" / "train.txt").exists()
    assert run(make_list, photos, "-o", tmp_path / "l", "--skip-empty") == 0
    assert run(make_list, photos / "china", "-o", tmp_path / "l") == 2
    assert "one folder for each class" in capsys.readouterr().err
    (photos / "china" / " odd.jpg ").touch()
    (photos / "china" / " odd.jpg").touch()
    (photos / "china" / "line\nbreak.jpg").touch()
    assert run(make_list, photos, "-o", tmp_path / "m", "--skip-empty") == 2
    assert "a list cannot hold this name" in capsys.readouterr().err


def test_make_mini_takes_the_same_classes_of_both_lists(tmp_path):
    for name, n in (("train", 5), ("val", 2)):
        lines = [f"{name}/{c}/{i}.jpg {c}\n" for c in range(40) for i in range(n)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    (tmp_path / "classes.txt").write_text("".join(f"class {c}\n" for c in range(40)))
    lists = [tmp_path / "train.txt", tmp_path / "val.txt"]
    assert run(make_mini, *lists, "-n", 16, "--classes", tmp_path / "classes.txt") == 0
    train = read_list(tmp_path / "train016.txt", 16)
    val = read_list(tmp_path / "val016.txt", 16)
    assert {label for _, label in train} == {label for _, label in val} == set(range(16))
    assert (len(train), len(val)) == (80, 32)
    old = {label: int(name.split("/")[1]) for name, label in train}
    assert old == {label: int(name.split("/")[1]) for name, label in val}
    assert list(old.values()) == sorted(old.values()) != list(range(16))
    names = (tmp_path / "classes016.txt").read_text().splitlines()
    assert names == [f"class {old[label]}" for label in range(16)]
    first = (tmp_path / "train016.txt").read_bytes()
    assert run(make_mini, *lists, "-n", 16) == 0
    assert (tmp_path / "train016.txt").read_bytes() == first
    assert run(make_mini, *lists, "-n", 16, "--seed", 1, "--per-class", 1) == 0
    other = read_list(tmp_path / "train016.txt", 16)
    assert len(other) == 16
    assert {int(name.split("/")[1]) for name, _ in other} != set(old.values())
    assert run(make_mini, *lists, "-n", 41) == 2


def test_enlarge_writes_exact_sizes_once(photos, tmp_path, capsys):
    Image.open(photographs()[0]).crop((0, 0, 90, 70)).convert("P").save(photos / "china" / "g.gif")
    (tmp_path / "all.txt").write_text("china/g.gif 0\nflower/flower 1.jpg 1\n")
    out = tmp_path / "large"
    args = (photos, out, "--size", "310x205", "--list", tmp_path / "all.txt")
    assert run(enlarge, *args) == 0
    assert read_list(out / "all.txt") == [("china/g.png", 0), ("flower/flower 1.jpg", 1)]
    expected = resize(read_image(photos / "china" / "g.gif"), (310, 205))
    numpy.testing.assert_array_equal(read_image(out / "china" / "g.png"), expected)
    name = "flower/flower 1.jpg"
    difference = read_image(out / name).astype(float) - resize(
        read_image(photos / name), (310, 205)
    )
    assert abs(difference).mean() < 2  # JPEG
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.*g")}
    assert run(enlarge, *args) == 0
    assert "0 images written, 2 were there already" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*.*g")}
    os.utime(photos / name, ns=(time.time_ns() + 10**9,) * 2)  # the original was edited
    assert run(enlarge, *args) == 0
    assert "1 images written, 1 were there already" in capsys.readouterr().out
    assert run(enlarge, photos, out, "--size", "310x206") == 2
    assert "choose another folder" in capsys.readouterr().err
    assert run(enlarge, photos, photos) == 2


def test_enlarge_reports_bad_images_and_does_the_rest(photos, tmp_path, capsys):
    (photos / "china" / "china 1.jpg").write_bytes(b"no image")
    assert run(enlarge, photos, tmp_path / "large", "--size", "50") == 1
    out = capsys.readouterr().out
    assert "11 images written, 0 were there already, 1 failed" in out
    assert "china/china 1.jpg  cannot be decoded" in out
    assert not (tmp_path / "large" / "china" / "china 1.jpg").exists()


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(
    photos, tmp_path, capsys, monkeypatch
):
    written = itertools.count()

    def save(pixels, path, quality):
        path.write_bytes(b"half")
        if next(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(converting, "_save", save)
    assert run(enlarge, photos, tmp_path / "large", "--size", "50", "-j", 1) == 2
    assert "no space left; free some, and run the same command again" in capsys.readouterr().err
    assert len(list((tmp_path / "large").rglob("*.jpg"))) == 3
    assert not list((tmp_path / "large").glob(".partial*"))


def test_a_killed_run_continues_to_the_same_result(photos, tmp_path):
    out, whole = tmp_path / "large", tmp_path / "whole"
    args = ["--size", "900x900", "-j", "1"]
    command = [sys.executable, str(IMAGENET / "tools" / "enlarge.py"), str(photos), str(out), *args]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.jpg"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [p for p in out.rglob("*.jpg") if ".partial" not in str(p)]
    assert 0 < len(done) < 12
    for path in done:
        assert read_image(path).shape == (900, 900, 3)
    assert run(enlarge, photos, out, *args) == 0
    assert run(enlarge, photos, whole, *args) == 0
    assert files(out) == files(whole)


def test_two_images_of_one_new_name_are_refused(photos, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(photos / "china" / "china 1.png")
    assert run(enlarge, photos, tmp_path / "large", "--format", "jpg") == 2
    assert "would both become china/china 1.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(600, 300), (300, 600), (100, 100)])
def test_crop_takes_the_middle_of_the_scaled_image(tmp_path, size):
    (tmp_path / "in").mkdir()
    Image.open(photographs()[1]).resize(size).save(tmp_path / "in" / "a.png")
    assert run(crop, tmp_path / "in", tmp_path / "out", "--size", 64) == 0
    result = read_image(tmp_path / "out" / "a.png")
    assert result.shape == (64, 64, 3)
    scale = 64 / min(size)
    box = [(n - 64 / scale) / 2 for n in size] + [(n + 64 / scale) / 2 for n in size]
    expected = Image.open(tmp_path / "in" / "a.png").resize((64, 64), Image.BICUBIC, box=box)
    assert abs(result - numpy.asarray(expected).astype(float)).mean() < 4


def test_check_lists_every_problem(photos, tmp_path, capsys):
    good = (photos / "china" / "china 0.jpg").read_bytes()
    (photos / "china" / "cut.jpg").write_bytes(good[: len(good) // 2])
    path = tmp_path / "list.txt"
    path.write_text(
        "china/china 0.jpg 0\nchina/cut.jpg 0\nflower/flower 0.jpg 2\nmissing.jpg 1\n"
        "flower/flower 1.jpg\nchina/china 0.jpg 1\nflower/flower 2.jpg -1\n"
    )
    report = tmp_path / "report.json"
    args = (path, "-R", photos, "-n", 2, "--json", report)
    assert run(check, *args) == 1
    problems = {(p["line"], p["problem"].split(" (")[0]) for p in json.loads(report.read_text())}
    assert problems == {
        (2, "cannot be decoded"),
        (3, "label out of range; allowed are 0 to 1"),
        (4, "no such file"),
        (5, "not a path and a label"),
        (6, "twice: also line 1"),
        (7, "label out of range; allowed are 0 to 1"),
    }
    out = capsys.readouterr().out
    assert "2     china/cut.jpg        0      cannot be decoded" in out
    path.write_text("china/china 0.jpg 0\nflower/flower 0.jpg 1\n")
    assert run(check, *args) == 0
    assert "all of 120x90 pixels" in capsys.readouterr().out
    assert run(check, *args, "--insize", 91) == 1
    assert "120x90 is less than --insize" in capsys.readouterr().out


def test_check_decodes_again_only_what_changed(photos, tmp_path, monkeypatch, capsys):
    run(make_list, photos, "-o", tmp_path, "--val", 0)
    decoded = []
    monkeypatch.setattr(check, "read_image", lambda p: decoded.append(p.name) or read_image(p))
    assert run(check, tmp_path / "train.txt", "-R", photos) == 0
    assert len(decoded) == 12
    (photos / "china" / "china 3.jpg").write_bytes(b"damaged since")
    decoded.clear()
    assert run(check, tmp_path / "train.txt", "-R", photos) == 1
    assert decoded == ["china 3.jpg"]


def test_mean_and_deviation_are_exact_whoever_adds(photos, tmp_path):
    run(make_list, photos, "-o", tmp_path, "--val", 0)
    source = LabeledImages(read_list(tmp_path / "train.txt"), photos)
    stack = numpy.stack([source.image(i) for i in range(12)]).astype(numpy.float64)
    for workers in (1, 3):
        sums = statistics.collect(source, workers=workers)
        expected = stack.mean(axis=0).transpose(2, 0, 1).astype(numpy.float32)
        numpy.testing.assert_array_equal(sums.mean_image, expected)
        numpy.testing.assert_allclose(sums.mean, stack.mean(axis=(0, 1, 2)), rtol=1e-12)
        numpy.testing.assert_allclose(sums.std, stack.std(axis=(0, 1, 2)), rtol=1e-12)


def test_interrupted_mean_continues(photos, tmp_path, monkeypatch):
    run(make_list, photos, "-o", tmp_path, "--val", 0)
    pairs = read_list(tmp_path / "train.txt") * 20
    partial = tmp_path / "partial"
    monkeypatch.setattr(statistics, "SAVE_EVERY", -1.0)
    read = []

    class Source(LabeledImages):
        def image(self, i, need=None):
            read.append(i)
            if i == failing:
                raise InputError("stopped here")
            return super().image(i)

    source, failing = Source(pairs, photos), 200
    with pytest.raises(InputError, match="stopped here"):
        statistics.collect(source, workers=2, resume=partial)
    assert partial.exists()
    failing = None
    read.clear()
    resumed = statistics.collect(source, workers=2, resume=partial)
    assert len(read) < 240 - 64
    assert not partial.exists()
    whole = statistics.collect(source)
    assert resumed.n_images == 240
    numpy.testing.assert_array_equal(resumed.image_sum, whole.image_sum)
    numpy.testing.assert_array_equal(resumed.channel_squares, whole.channel_squares)
    # What was saved for another list is of no use.
    failing = 200
    with pytest.raises(InputError, match="stopped here"):
        statistics.collect(source, workers=2, resume=partial)
    other = LabeledImages(pairs[:100], photos)
    assert statistics.collect(other, resume=partial).n_images == 100


def test_compute_mean_enlarges_and_writes_the_statistics(photos, tmp_path, capsys):
    run(make_list, photos, "-o", tmp_path, "--val", 0)
    stats, output = tmp_path / "stats.json", tmp_path / "mean.npy"
    args = (tmp_path / "train.txt", "-R", photos, "-o", output, "--stats", stats, "-j", 2)
    assert run(compute_mean, *args, "--enlarge", "130x140") == 0
    images = [
        resize(read_image(photos / name), (130, 140)).astype(float)
        for name, _ in read_list(tmp_path / "train.txt")
    ]
    expected = numpy.mean(images, axis=0).transpose(2, 0, 1).astype(numpy.float32)
    numpy.testing.assert_array_equal(numpy.load(output), expected)
    values = json.loads(stats.read_text())
    numpy.testing.assert_allclose(values["std"], numpy.std(images, axis=(0, 1, 2)), rtol=1e-12)
    assert run(compute_mean, *args, "--per-channel") == 0
    assert numpy.load(output).shape == (3,)


def test_compute_mean_says_in_one_line_what_is_wrong_with_its_command_line(capsys):
    with pytest.raises(SystemExit) as info:
        compute_mean.main(["train.txt", "-j", "0"])
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("error: argument --workers/-j: '0' is not an integer of at least 1\n")
    assert error.count("\n") == 1
