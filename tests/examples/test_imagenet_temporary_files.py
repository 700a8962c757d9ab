"""In a folder that others write to, no link leads what is written to another file."""

import os
import secrets
import socket

import numpy
import pytest
from datasets import digits
from errors import InputError
from files import whole_file, write_text
from reports.units import write_atomically
from snapshot_files import MANIFEST, find_snapshots
from test_imagenet_resume import Trained
from tools import make_lmdb
from tools.common import partial_folder

from chainer_ooc.report.whole import replacing, write_whole

TOKEN = "0123456789abcdef"


@pytest.fixture
def victim(tmp_path):
    """A file, and a folder, that must stay as they are."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("precious")
    yield folder
    assert [p.name for p in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "precious"


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


WRITERS = {
    "write_text": write_text,
    "write_atomically": lambda path, text: write_atomically(path, lambda f: f.write(text.encode())),
    "write_whole": write_whole,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_links_under_names_that_could_be_guessed(write, out, victim):
    for suffix in (f"{socket.gethostname()}.{os.getpid()}", f"{os.getpid()}", "partial", "tmp"):
        (out / f".log.{suffix}").symlink_to(victim / "file")
    write(out / "log", "new")
    assert (out / "log").read_text() == "new" and not (out / "log").is_symlink()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_under_the_very_name(write, out, victim, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda n: TOKEN)
    link = out / f".log.{TOKEN}"
    link.symlink_to(victim / "file")
    with pytest.raises((InputError, FileExistsError), match=r"File exists"):
        write(out / "log", "new")
    assert link.is_symlink() and not (out / "log").exists()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_under_the_name_itself_is_replaced(write, out, victim):
    (out / "log").symlink_to(victim / "file")
    write(out / "log", "new")
    assert (out / "log").read_text() == "new" and not (out / "log").is_symlink()


def test_names_are_random_and_modes_are_those_of_other_files(out):
    names = set()
    for _ in range(20):
        with replacing(out / "a") as partial:
            assert partial.exists()
            names.add(partial.name)
    assert len(names) == 20
    (out / "b").write_text("")
    assert (out / "a").stat().st_mode == (out / "b").stat().st_mode
    with pytest.raises(KeyError), whole_file(out / "c"):
        raise KeyError
    assert sorted(p.name for p in out.iterdir()) == ["a", "b"]


def test_snapshots(out, victim):
    run = Trained(out)
    for name in (".snapshot_iter_1.partial", ".snapshot_iter_1.removed", "snapshot_iter_1"):
        (out / name).symlink_to(victim)
    run.update(1)
    run.snapshots(run.trainer)
    assert [p.name for p in find_snapshots(out)] == ["snapshot_iter_1"]
    folder = out / "snapshot_iter_1"
    assert sorted(os.listdir(folder)) == sorted([MANIFEST, "rank_0.npz", "trainer.npz"])
    assert folder.stat().st_mode == victim.stat().st_mode
    assert not folder.is_symlink()


def test_old_snapshots_that_are_links_are_unlinked(out, victim):
    run = Trained(out, keep=1)
    run.update(1)
    run.snapshots(run.trainer)
    old = out / "snapshot_iter_1"
    old.rename(out / "elsewhere")
    old.symlink_to(out / "elsewhere")
    run.update(1)
    run.snapshots(run.trainer)
    assert sorted(os.listdir(out)) == ["elsewhere", "snapshot_iter_2"]
    assert (out / "elsewhere" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["rank_0.npz", "trainer.npz", MANIFEST])
def test_a_link_within_a_snapshot_that_is_being_written(out, victim, monkeypatch, name):
    monkeypatch.setattr(secrets, "token_hex", lambda n: TOKEN)
    run = Trained(out)
    run.update(1)
    partial = out / f".snapshot_iter_1.{TOKEN}.partial"
    partial.mkdir()
    (partial / name).symlink_to(victim / "file")
    with pytest.raises(InputError, match=r"cannot write a snapshot \(File exists\)"):
        run.snapshots(run.trainer)


def test_digits(out, victim):
    (out / f".d.{os.getpid()}").symlink_to(victim)
    (out / ".d.partial").symlink_to(victim)
    digits.write_digits(out / "d", 8)
    assert (out / "d" / "mean.npy").exists()


def test_folders_of_partial_files(out, victim):
    (out / f".partial.{socket.gethostname()}.{os.getpid()}").symlink_to(victim)
    dead = out / f".partial.{socket.gethostname()}.99999999.{TOKEN}"
    dead.mkdir()
    with partial_folder(out) as folder:
        (folder / "image.jpg").write_text("new")
        assert not dead.exists()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a.lmdb.partial", "a.lmdb.partial-lock", "a.lmdb.partial.json"])
@pytest.mark.parametrize("to", ["file", "nothing", "folder"])
def test_make_lmdb(out, victim, lists, capsys, name, to):
    pytest.importorskip("lmdb")
    (out / name).symlink_to(
        {"folder": victim, "nothing": victim / "none", "file": victim / "file"}[to]
    )
    arguments = [str(lists.train), "-R", str(lists.root), "-o", str(out / "a.lmdb")]
    status = make_lmdb.main(arguments)
    if name == "a.lmdb.partial":
        assert status == 2
        assert "a.lmdb.partial: is there, and is no folder of yours" in capsys.readouterr().err
    else:
        assert status == 0


def test_make_lmdb_does_not_go_on_in_a_folder_of_others(out, lists, capsys, monkeypatch):
    pytest.importorskip("lmdb")
    (out / "a.lmdb.partial").mkdir()
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    arguments = [str(lists.train), "-R", str(lists.root), "-o", str(out / "a.lmdb")]
    assert make_lmdb.main(arguments) == 2
    assert "is no folder of yours" in capsys.readouterr().err


def test_the_sums_of_compute_mean(out, victim, lists):
    import compute_mean

    (out / "mean.npy.partial").symlink_to(victim / "file")
    arguments = [str(lists.train), "-R", str(lists.root), "-o", str(out / "mean.npy")]
    assert compute_mean.main(arguments) == 0
    assert numpy.load(out / "mean.npy").shape == (3, 45, 45)
