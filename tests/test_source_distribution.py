"""A source distribution is the whole project: what its documents name is in it, and its wheel is that of the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

import chainer_ooc
from tests.conftest import ROOT
from tests.install_matrix import clone
from tests.test_packaging import SETUPTOOLS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SETUPTOOLS < 77, reason="needs setuptools 77"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout"),
]
#: Builds in the current directory, with one file in place of Chainer, which comes from the package index.
BUILD = """
import sys; sys.path.insert(0, "backend")
import chainer_ooc_build as backend
backend.built_chainer = lambda: {"chainer/__init__.py": b""}
print(getattr(backend, f"build_{sys.argv[1]}")(sys.argv[2]))
"""


def build(kind, tree, folder):
    """Build a "wheel" or an "sdist" of a tree. Returns its path."""
    folder.mkdir()
    command = [*(sys.executable, "-c", BUILD), kind, str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Return a clone and what its source distribution unpacks to."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("trees")
    clone(folder / "clone")
    with tarfile.open(build("sdist", folder / "clone", folder / "sdist")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "clone", folder / f"chainer_ooc-{chainer_ooc.__version__}"


def links(document):
    """Return the files beside a Markdown document that it links to."""
    blocks = MarkdownIt("commonmark").enable("table").parse(document.read_text())
    attributes = [token.attrs for block in blocks for token in block.children or ()]
    targets = [str(one.get("href") or one.get("src") or "") for one in attributes]
    paths = [unquote(target.partition("#")[0]) for target in targets if "://" not in target]
    return {document.parent / path for path in paths if path}


def named(document, tree):
    """Return the paths in a tree that the words of a document name, such as those in its commands."""
    words = re.findall(r"[\w.-]*\w(?:/[\w.-]*\w)*", document.read_text())
    return {word for word in words if (tree / word).exists()}


def test_all_documents_link_to_files_that_are_in_it(trees):
    _, unpacked = trees
    documents = [*unpacked.glob("*.md"), *unpacked.glob("docs/*.md")]
    assert {"README.md", "CONTRIBUTING.md", "architecture.md"} <= {path.name for path in documents}
    found = {document.name: links(document) for document in documents}
    assert len(found["README.md"]) > 10
    missing = {
        name: [str(path) for path in paths if not path.exists()] for name, paths in found.items()
    }
    assert not any(missing.values()), missing


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "RELEASING.md"])
def test_paths_in_code_are_there(name):
    quoted = re.findall(r"`([\w.-]+/[\w./-]*)`", (ROOT / name).read_text())
    assert quoted
    assert [path for path in quoted if not (ROOT / path).exists()] == []


def test_versions_agree():
    cited = re.findall(r"(?m)^version: (.*)$", (ROOT / "CITATION.cff").read_text())
    newest = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert cited == newest[:1] == [chainer_ooc.__version__]


def test_what_readme_names_is_in_it(trees):
    clone, unpacked = trees
    names = named(clone / "README.md", clone)
    assert {"examples/imagenet/train.py", "docs/guide.md", "chainer_ooc"} <= names
    assert [name for name in names if not (unpacked / name).exists()] == []


def test_what_make_runs_is_in_it(trees):
    clone, unpacked = trees
    names = named(clone / "Makefile", clone)
    assert {"tests/native/sanitize.sh", "docs", "examples/imagenet/train.py"} <= names
    assert [name for name in names if not (unpacked / name).exists()] == []


def test_its_wheel_is_that_of_the_tree(trees, tmp_path):
    contents = []
    for tree in trees:
        with zipfile.ZipFile(build("wheel", tree, tmp_path / tree.name)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        (record,) = (name for name in files if name.endswith("/RECORD"))
        files[record] = sorted(files[record].splitlines())
        contents.append(files)
    of_tree, of_sdist = contents
    assert "chainer_ooc/py.typed" in of_tree
    assert of_tree.keys() == of_sdist.keys()
    assert [name for name in of_tree if of_tree[name] != of_sdist[name]] == []
