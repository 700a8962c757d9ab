"""The import hook: what it edits, what it refuses, what it leaves alone."""

from __future__ import annotations

import importlib
import inspect
import json
import linecache
import re
import sys
import traceback
from pathlib import Path

import chainer
import pytest

from chainer_ooc.compat import edits, finder, installation
from chainer_ooc.compat.edits import Edit, Replace, ReplaceTail, backprop

EDITED = sorted(edits._table())
#: What the edit of ``chainer`` expects in a file.
END = "disable_experimental_feature_warning = False\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that writes modules of a package that the hook may edit."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(finder, "_EDITED_PACKAGES", finder._EDITED_PACKAGES | {"edited_package"})
    monkeypatch.setattr(edits, "_edits", {k: list(v) for k, v in edits._table().items()})
    finder.install()
    directory = tmp_path / "edited_package"
    directory.mkdir()
    (directory / "__init__.py").write_text("")

    def write(name: str, text: str) -> str:
        (directory / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"edited_package.{name}"

    yield write
    for name in [n for n in sys.modules if n.partition(".")[0] == "edited_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("module", EDITED)
def test_every_edit_fits_the_installed_source_and_compiles(module):
    path = Path(chainer.__file__).parents[1].joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text()
    for edit in edits._table()[module]:
        assert edit.reason and edit.replacements
        for replacement in edit.replacements:
            changed = edits._replace(edit, replacement, text, str(path))
            assert changed != text
            text = changed
    compile(text, path, "exec")


def test_edits_apply_only_where_their_condition_holds(package):
    name = package("conditional", "a = 1\nb = 1\n")
    edits.register(
        Edit(name, "yes", (Replace("a = 1", "a = 2"),), when=lambda: True),
        Edit(name, "no", (Replace("b = 1", "b = 2"),), when=lambda: False),
    )
    module = importlib.import_module(name)
    assert (module.a, module.b) == (2, 1)


def test_edits_of_several_sets_compose_in_order(package):
    name = package("composed", "value = 1\nrest = 0\n")
    edits.register(Edit(name, "first", (Replace("value = 1", "value = 2"),)))
    edits.register(
        Edit(name, "second", (Replace("value = 2", "value = 3"), ReplaceTail("rest", "tail = 4\n")))
    )
    module = importlib.import_module(name)
    assert module.value == 3
    assert module.tail == 4
    assert not hasattr(module, "rest")


@pytest.mark.parametrize("times", [1, 3])
def test_text_that_is_not_as_expected_is_a_clear_error(package, times):
    name = package("changed", "value = 1\nvalue = 1\n")
    edits.register(Edit(name, "some reason", (Replace("value = 1", "value = 2", times=times),)))
    with pytest.raises(ImportError, match=r"changed \(some reason\).*'value = 1'.*found it 2 time"):
        importlib.import_module(name)


def test_edits_registered_too_late_are_refused():
    with pytest.raises(RuntimeError, match=r"chainer\.variable is already imported"):
        edits.register(Edit("chainer.variable", "late", (Replace("a", "b"),)))


def test_tracebacks_and_getsource_show_the_text_that_runs(package):
    name = package("shown", "def f():\n    raise ValueError('old')\n")
    edits.register(Edit(name, "shown", (Replace("def f", "\n\n# moved down\ndef f"),)))
    edits.register(Edit(name, "shown", (Replace("ValueError('old')", "ValueError('new')"),)))
    module = importlib.import_module(name)
    linecache.checkcache()
    assert "ValueError('new')" in inspect.getsource(module.f)
    assert "ValueError('new')" in module.__loader__.get_source(name)
    with pytest.raises(ValueError, match="new") as caught:
        module.f()
    assert "raise ValueError('new')" in traceback.format_tb(caught.tb)[-1]


def test_no_bytecode_of_edited_text_is_written(package, tmp_path):
    name = package("uncached", "value = 1\n")
    edits.register(Edit(name, "any", (Replace("value = 1", "value = 2"),)))
    importlib.import_module(name)
    cached = [path.name for path in (tmp_path / "edited_package").rglob("*.pyc")]
    assert not [file for file in cached if file.startswith("uncached")]


def test_modules_without_edits_keep_their_loader():
    assert finder.CompatFinder().find_spec("chainer.utils", chainer.__path__) is None
    assert finder.CompatFinder().find_spec("json") is None


def test_install_twice_installs_one_hook():
    assert finder.install() is finder.install()
    assert sum(isinstance(f, finder.CompatFinder) for f in sys.meta_path) == 1


@pytest.mark.parametrize("version", ["7.8.0", "8.0.0rc1", None])
def test_another_version_of_chainer_is_a_clear_error(run_python, tmp_path, version):
    package = tmp_path / "other" / "chainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    if version:
        (package / "_version.py").write_text(f"__version__ = '{version}'\n")
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); import chainer_ooc, chainer"
    done = run_python("-c", code)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "chainer_ooc works with Chainer 7.8.1" in last
    assert (version or "unknown version") in last


@pytest.mark.parametrize(
    "name", ["chainer-7.7.0.dist-info", "chainer-7.7.0-py3.11.egg-info", "chainer-7.7.0.egg-info"]
)
def test_another_version_that_was_overwritten_is_a_clear_error(run_python, tmp_path, name):
    package = tmp_path / "site" / "chainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"print('imported')\n{END}")
    (package / "_version.py").write_text("__version__ = '7.8.1'\n")
    for other in ("chainer-7.8.1.dist-info", "chainer_ooc-7.7.0.dist-info", "chainer.egg-info"):
        (package.parent / other).mkdir()
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); import chainer_ooc, chainer"
    assert run_python("-c", code).stdout == "imported\n"
    (package.parent / name).mkdir()
    done = run_python("-c", code)
    last = done.stderr.splitlines()[-1]
    assert f"but Chainer 7.7.0 is installed in {package.parent}; " in last
    assert last.count("uninstall") == 2


@pytest.mark.parametrize("package", ["chainer", "chainermn", "onnx_chainer"])
@pytest.mark.parametrize("there", ["nothing", "an empty directory"])
def test_a_package_that_was_removed_is_a_clear_error(run_python, tmp_path, package, there):
    if there != "nothing":
        (tmp_path / package).mkdir()
    code = (
        "import sys; from importlib.machinery import PathFinder; import chainer_ooc\n"
        "original = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    where = [{str(tmp_path)!r}] if name == {package!r} else path\n"
        "    return original(name, where, target)\n"
        "PathFinder.find_spec = find_spec\n"
        f"try: import {package}\n"
        "except ModuleNotFoundError as error: print(error.name, '|', error)"
    )
    (line,) = run_python("-c", code).stdout.splitlines()
    assert line.startswith(f"{package} | {package} is missing: it comes with chainer_ooc and has")
    assert re.search("; (uv )?pip install ", line)


@pytest.mark.parametrize(
    "origin, installer, command",
    [
        (None, "pip", "pip install --force-reinstall --no-deps chainer_ooc"),
        ({"url": "file:///a/b%20c", "dir_info": {}}, "pip", "--no-deps '/a/b c'"),
        ({"url": "file:///a", "dir_info": {"editable": True}}, "pip", "--no-deps -e /a"),
        (
            {"url": "file:///a.whl", "archive_info": {}},
            "uv",
            "uv pip install --reinstall --no-deps /a.whl",
        ),
        ({"url": "https://x/y", "vcs_info": {"vcs": "git"}}, "pip", "--no-deps git+https://x/y"),
    ],
)
def test_the_command_that_reinstalls_names_where_it_came_from(
    tmp_path, monkeypatch, origin, installer, command
):
    (tmp_path / "chainer_ooc.egg-info").mkdir()  # of a build in the clone
    (tmp_path / "chainer_ooc.egg-info" / "PKG-INFO").write_text("Name: chainer_ooc\n")
    info = tmp_path / "installed" / "chainer_ooc-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: chainer_ooc\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(info.parent)])
    assert installation.reinstall().endswith(command)
    info.rename(tmp_path / "gone")
    root = Path(installation.__file__).parents[2]
    assert installation.reinstall() == f"pip install {root}"


def test_a_missing_module_is_provided_by_its_redirect(tmp_path, monkeypatch):
    (tmp_path / "with_no_cudnn").mkdir()
    (tmp_path / "with_no_cudnn" / "__init__.py").write_text("")
    (tmp_path / "stand_in.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(finder.REDIRECTS, "with_no_cudnn.cudnn", "stand_in")
    monkeypatch.setenv("CHAINER_OOC_CUDNN", "own")
    finder.install()
    try:
        import stand_in
        import with_no_cudnn.cudnn

        assert with_no_cudnn.cudnn is stand_in is sys.modules["with_no_cudnn.cudnn"]
        assert stand_in.value == 7
        assert stand_in.__name__ == stand_in.__spec__.name == "stand_in"
    finally:
        for name in ("with_no_cudnn", "with_no_cudnn.cudnn", "stand_in"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("module", EDITED)
def test_every_edited_module_is_in_the_documentation(module):
    if module in {edit.module for edit in backprop.EDITS}:
        return  # described as a whole
    text = (Path(finder.__file__).parents[2] / "docs" / "compatibility.md").read_text()
    assert f"`{module}`" in text
