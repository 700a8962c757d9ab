"""Settings: what is allowed, where it comes from, and errors that say what is not."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import linecache
import pydoc
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import chainer
import numpy as np
import psutil
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import SettingError
from chainer_ooc.settings import (
    Settings,
    _default_directory,
    _file_system,
    check_environment,
    parse_bytes,
    parse_limit,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("8G", 8 << 30),
        ("1.5k", 1536),
        ("2 MB", 2_000_000),
        ("7", 7),
        ("512b", 512),
        (12, 12),
    ],
)
def test_bytes(text, nbytes):
    assert parse_bytes("min_bytes", text) == nbytes


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 1.5, 0.0, -0.5, 3.0, True, [], float("nan"), float("inf"), 1j, b"8GiB"),
        *(
            "8 gigs",
            "0",
            "0GiB",
            "1.5",
            "",
            "many",
            "8,5GiB",
            "80%",
            "-1",
            "inf",
            "nan",
            "²",
            "1e3",
        ),
        *(np.bool_(True), np.array([1 << 30]), np.float32(2), np.int64(-1), object),
    ],
    ids=repr,
)
def test_a_bad_limit_is_named(value):
    if isinstance(value, str) and value == "":
        assert parse_limit(value) is None
        return
    with pytest.raises(SettingError) as error:
        chainer_ooc.enable(limit=value)
    assert "limit=" in str(error.value)
    assert "8GiB" in str(error.value)
    assert not chainer_ooc.is_enabled()


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (None, None),
        ("none", None),
        (0.5, 0.5),
        ("0.5", 0.5),
        (1.0, 1.0),
        ("1GiB", 1 << 30),
        ("8 GB", 8 * 10**9),
        (" 8 gib ", 8 << 30),
        ("8589934592", 8 << 30),
        ("8e9", 8 * 10**9),
        (8e9, 8 * 10**9),
        (np.int64(8 << 30), 8 << 30),
        (np.uint32(1 << 31), 1 << 31),
        (np.float32(0.5), 0.5),
        (np.float64(1), 1.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_a_good_limit(value, limit):
    found = parse_limit(value)
    assert (found, type(found)) == (limit, type(limit))


@pytest.mark.parametrize("value, unit", [(8, "8GiB"), ("16", "16GiB"), (np.int32(512), "512GiB")])
def test_a_limit_without_its_unit_warns_at_the_users_line(value, unit):
    with pytest.warns(RuntimeWarning, match=f'is {int(value)} bytes.*"{unit}"') as told:
        chainer_ooc.enable(value)  # this line
    chainer_ooc.disable()
    (one,) = told
    assert one.filename == __file__
    assert "# this line" in linecache.getline(one.filename, one.lineno)


def test_warnings_point_at_the_users_line_however_deep(monkeypatch):
    monkeypatch.setattr("chainer_ooc.settings._file_system", lambda path: "tmpfs")
    with pytest.warns(RuntimeWarning) as told:
        with chainer_ooc.out_of_core_mode(swap_dir="/tmp"):  # line 1
            pass
        chainer.out_of_core_mode(swap_dir="/tmp").__enter__()  # line 2
        stack = contextlib.ExitStack()
        stack.enter_context(chainer_ooc.out_of_core_mode(swap_dir="/tmp"))  # line 3
    state.local.stack.clear()
    state.void_levels()
    lines = [linecache.getline(one.filename, one.lineno).partition("# ")[2] for one in told]
    assert lines == ["line 1\n", "line 2\n", "line 3\n"]


@pytest.mark.parametrize("path", [b"swap", "swap", Path("swap")])
def test_paths_are_of_any_type_and_stay_where_they_are(path, tmp_path, monkeypatch):
    (tmp_path / "swap").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings.resolve({"swap_dir": path, "trace": path and "t.json"})
    monkeypatch.chdir("/")
    assert settings.swap_dir == str(tmp_path / "swap")
    assert settings.trace == str(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["swap_dir", "trace"])
@pytest.mark.parametrize("path", [3, "", b"", "a\0b", ["x"]])
def test_what_is_no_path_is_named(name, path):
    with pytest.raises(SettingError, match=rf"{name}=.* is not a path"):
        Settings.resolve({name: path})


@pytest.mark.parametrize(
    "variable, meant",
    [
        ("CHAINER_OOC_LIMT", "did you mean CHAINER_OOC_LIMIT"),
        ("CHAINER_OOC_Limit", "did you mean CHAINER_OOC_LIMIT"),
        ("CHAINEROOC_SWAPDIR", "did you mean CHAINER_OOC_SWAP_DIR"),
        ("CHAINER_OOC_SINGLE_BACKWARDS", "did you mean CHAINER_OOC_SINGLE_BACKWARD"),
        ("CHAINER_OOC_CUDN", "did you mean CHAINER_OOC_CUDNN"),
        ("CHAINER_OOC_XYZ", "there are CHAINER_OOC_LIMIT, "),
    ],
)
def test_a_misspelt_variable_is_named_with_the_nearest(monkeypatch, variable, meant):
    monkeypatch.setenv(variable, "")  # as good as unset
    Settings.resolve({})
    monkeypatch.setenv(variable, "8GiB")
    with pytest.raises(SettingError, match=f"{variable}='8GiB' .*{meant}"):
        chainer_ooc.enable(limit="1GiB")
    assert not chainer_ooc.is_enabled()


def test_the_packages_own_variables_are_no_misspelt_ones(monkeypatch):
    sources = "".join(path.read_text() for path in Path(chainer_ooc.__file__).parent.rglob("*.py"))
    variables = set(re.findall(r"CHAINER_OOC_[A-Z_]*[A-Z]", sources)) - {"CHAINER_OOC_LIMT"}
    assert {"CHAINER_OOC_CUDNN_WORKSPACE", "CHAINER_OOC_WITHOUT_EXTENSION"} <= variables
    for variable in variables:
        monkeypatch.setenv(variable, "1")
    check_environment()


def test_arguments_go_before_the_environment(monkeypatch):
    monkeypatch.setenv("CHAINER_OOC_LIMIT", "1GiB")
    monkeypatch.setenv("CHAINER_OOC_STRICT", "yes")
    monkeypatch.setenv("CHAINER_OOC_MIN_BYTES", "")
    assert Settings.resolve({}) == Settings(limit=1 << 30, strict=True)
    assert Settings.resolve({"limit": 2 << 20, "strict": False}) == Settings(limit=2 << 20)


def test_a_bad_variable_is_named(monkeypatch):
    monkeypatch.setenv("CHAINER_OOC_SWAP_ALL", "maybe")
    with pytest.raises(SettingError, match=r"swap_all='maybe'.*CHAINER_OOC_SWAP_ALL"):
        Settings.resolve({})


def test_an_inner_mode_inherits(monkeypatch):
    monkeypatch.setenv("CHAINER_OOC_LIMIT", "1GiB")
    outer = Settings(limit=5, strict=True)
    assert Settings.resolve({"min_bytes": 1}, outer) == Settings(limit=5, strict=True, min_bytes=1)


def test_an_unknown_setting_is_named():
    for take in (chainer_ooc.enable, chainer_ooc.out_of_core_mode):
        with pytest.raises(TypeError, match=r"limits=3: .* 'limits'; did you mean 'limit'\?"):
            take(limits=3)
        with pytest.raises(TypeError, match=r"colour=3: .*there are \['limit', "):
            take(colour=3)
    assert not chainer_ooc.is_enabled()


PUBLIC = {
    "limit": None,
    "swap_dir": None,
    "host_limit": None,
    "strict": False,
    "single_backward": False,
    "recompute": "auto",
    "parameters": "stay",
    "split": "never",
    "plan": True,
    "verify": False,
    "trace": None,
}


def test_users_are_shown_the_settings_that_are_theirs():
    enable = inspect.signature(chainer_ooc.enable).parameters
    assert {name: one.default for name, one in enable.items()} == PUBLIC
    assert enable["limit"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert enable["host_limit"].annotation == int | str | None
    inner = inspect.signature(chainer_ooc.out_of_core_mode).parameters
    assert {name: inner[name] for name in PUBLIC if name != "limit"} == {
        name: enable[name] for name in PUBLIC if name != "limit"
    }
    assert [name for name in inner if name not in PUBLIC] == [
        "enabled", "async_", "fine_granularity", "debug", "devices"
    ]  # fmt: skip


def test_help_describes_each_setting():
    text = pydoc.plain(pydoc.render_doc(chainer_ooc.enable))
    described = re.findall(r"^ {8}(\w+): \S", text.split("Args:")[1].split("Raises:")[0], re.M)
    assert described == [*PUBLIC]
    assert "Leave smaller" not in text


def test_every_setting_is_for_users_or_for_tests():
    fields = [field.name for field in dataclasses.fields(Settings)]
    tests = ["swap_all", "swap_parameters", "discard_all", "min_bytes", "shares"]
    assert fields == [*PUBLIC, *tests]
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        assert chainer_ooc.is_enabled()


@pytest.mark.parametrize(
    ("given", "named"), [((1, 2), {}), ((1,), {"limit": 2})], ids=["two", "twice"]
)
def test_only_the_limit_is_given_by_position_and_once(given, named):
    with pytest.raises(TypeError):
        chainer_ooc.enable(*given, **named)
    assert not chainer_ooc.is_enabled()


def test_the_limit_may_be_given_by_position():
    chainer_ooc.enable("8GiB", strict=True)
    try:
        assert state.current() == Settings(limit=8 << 30, strict=True)
    finally:
        chainer_ooc.disable()


def test_the_swap_directory_must_be_there(tmp_path):
    with pytest.raises(SettingError, match=r"swap_dir=.*is not a directory"):
        chainer_ooc.enable(swap_dir=tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SettingError, match=r"swap_dir=.*is not a directory"):
        chainer_ooc.enable(swap_dir=file)


def test_a_full_swap_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    with pytest.raises(SettingError, match=r"swap_dir=.* is full: 5 MiB are free"):
        chainer_ooc.enable(swap_dir=tmp_path)


def test_a_swap_directory_in_memory_warns(monkeypatch):
    monkeypatch.setattr("chainer_ooc.settings._file_system", lambda path: "tmpfs")
    with pytest.warns(RuntimeWarning, match=r"swap_dir='/dev/shm' is a tmpfs, that is memory"):
        Settings.resolve({"swap_dir": "/dev/shm"})


def test_the_default_directory_is_on_a_disk(monkeypatch, tmp_path):
    _default_directory.cache_clear()
    monkeypatch.setattr("chainer_ooc.settings._file_system", lambda path: "ext4")
    assert _default_directory(str(tmp_path)) == str(tmp_path)
    _default_directory.cache_clear()
    monkeypatch.setattr("chainer_ooc.settings._file_system", lambda path: "tmpfs")
    assert _default_directory(str(tmp_path)) == "/var/tmp"
    _default_directory.cache_clear()


def test_file_systems_are_told_apart():
    assert _file_system("/proc") == "proc"
    if any(one.mountpoint == "/" for one in psutil.disk_partitions(all=True)):  # not in a chroot
        assert _file_system("/") not in ("", "proc")


def test_modes_nest_like_using_config():
    assert not chainer_ooc.is_enabled()
    with chainer_ooc.out_of_core_mode():
        assert chainer_ooc.is_enabled()
        with chainer_ooc.out_of_core_mode(False):
            assert not chainer_ooc.is_enabled()
            with chainer_ooc.out_of_core_mode(limit=0.5):
                assert chainer_ooc.is_enabled()
        assert chainer_ooc.is_enabled()
    assert not chainer_ooc.is_enabled()


def test_enable_is_for_all_threads_and_a_mode_for_its_own():
    import threading

    seen = []
    chainer_ooc.enable()
    try:
        with chainer_ooc.out_of_core_mode(False):
            thread = threading.Thread(target=lambda: seen.append(chainer_ooc.is_enabled()))
            thread.start()
            thread.join()
            assert not chainer_ooc.is_enabled()
    finally:
        chainer_ooc.disable()
    assert seen == [True]
    assert not chainer_ooc.is_enabled()


IBM = """
import numpy as np, chainer, chainer.functions as F
{imports}
x = chainer.Variable(np.ones((4, 5), "f"))
with {call}:
    loss = F.sum(F.tanh(x))
    import chainer_ooc
    print(chainer_ooc.is_enabled())
print(chainer_ooc.is_enabled())
loss.backward()
"""


@pytest.mark.parametrize("imports", ["", "import chainer_ooc", "import chainer as chainer_too"])
@pytest.mark.parametrize(
    "call",
    [
        "chainer.out_of_core_mode()",
        "chainer.out_of_core_mode(async_=True, fine_granularity=True)",
        "chainer.out_of_core_mode(True, True)",
        "chainer.out_of_core_mode(False)",  # not asynchronous, but on
        "chainer.out_of_core_mode(False, False, False, [0])",
        "chainer.out_of_core_mode(fine_granularity=True, devices={0: 1}.values())",
        "chainer.out_of_core_mode(**{'async': False}, limit='8GiB')",
        "getattr(chainer, 'out_of_core_mode')()",
    ],
)
def test_ibms_scripts_run_as_they_are(forked_python, run_python, tmp_path, call, imports):
    (tmp_path / "ibm.py").write_text(IBM.format(imports=imports, call=call))
    python = sys.executable if call == "chainer.out_of_core_mode()" else forked_python
    done = run_python("ibm.py", python=python)
    assert (done.stdout, done.stderr) == ("True\nFalse\n", "")


def test_ibms_mode_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="fine_granularty=True: there is no"):
        chainer.out_of_core_mode(fine_granularty=True)


def test_arguments_of_ibms_mode(capsys):
    with chainer_ooc.out_of_core_mode(
        **{"async": True}, fine_granularity=True, debug=True, devices=(0, -1)
    ):
        assert chainer_ooc.is_enabled()
    told, table = (
        [line.split("  ")[0] for line in text.partition("\n\n")[0].splitlines()]
        for text in (capsys.readouterr().out, str(chainer_ooc.stats()))
    )
    assert told == table
    assert told[:2] == ["limit", "peak"]
    with pytest.raises(TypeError, match="'sync'"):
        chainer_ooc.out_of_core_mode(sync=True)
    with pytest.raises(SettingError, match="enabled=3"):
        chainer_ooc.out_of_core_mode(3)
