"""The import hook: it edits modules of Chainer and ChainerMN, and redirects modules that CuPy removed.

The hook sits first in :data:`sys.meta_path` and answers only for

* ``chainer`` itself, whose version it checks;
* the modules that :mod:`chainer_ooc.compat.edits` names: found by the other finders as usual, their
  source text is edited before it is compiled. No file is written: an edited module has no bytecode
  cache;
* the modules of ``REDIRECTS``: when nothing else provides them, another module takes their name.

Everything else is left to the other finders after one dictionary lookup.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, SourceFileLoader

from chainer_ooc.compat import installation

TYPE_CHECKING = False  # typing and importlib.abc take longer to import than all the rest
if TYPE_CHECKING:
    from importlib.abc import Loader

__all__ = ["REDIRECTS", "CompatFinder", "EditedSourceLoader", "install"]

#: Module name -> module that stands in for it when no other finder has it (CuPy 14 dropped its
#: cuDNN modules).
REDIRECTS = {
    "cupy.cudnn": "chainer_ooc.compat.cudnn.cupy_cudnn",
    "cupy.cuda.cudnn": "chainer_ooc.compat.cudnn.cupy_cuda_cudnn",
}

_EDITED_PACKAGES = frozenset({"chainer", "chainermn", "onnx_chainer"})


class EditedSourceLoader(SourceFileLoader):
    """Load one module from its file with the edits applied.

    Tracebacks and :func:`inspect.getsource` show the edited text, the text that runs.
    """

    def __init__(self, fullname: str, path: str, original: Loader) -> None:
        super().__init__(fullname, path)
        self._original = original

    def get_source(self, fullname: str) -> str:
        """Return the edited source text.

        Raises:
            ImportError: If the text to replace is not in the file.
        """
        from chainer_ooc.compat import edits

        text = self._original.get_source(fullname)  # type: ignore[attr-defined]
        if text is None:
            raise ImportError(
                f"chainer_ooc edits {fullname} while it loads but found no source text for it "
                f"({self.path}); {installation.reinstall()}",
                name=fullname,
                path=self.path,
            )
        return edits.apply(fullname, text, self.path)

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        """Compile the edited text, every time: processes without the hook would read a cache of it."""
        text = self.get_source(fullname)
        import linecache

        # An entry without a modification time is never compared with the file, which holds the
        # unedited text.
        linecache.cache[self.path] = (len(text), None, text.splitlines(keepends=True), self.path)
        return self.source_to_code(text.encode(), self.path)


class _RedirectLoader:
    """Give an existing module (or one that can be imported) a second name."""

    def __init__(self, target: str) -> None:
        self._target = target

    def create_module(self, spec: ModuleSpec):  # type: ignore[no-untyped-def]
        import importlib

        module = importlib.import_module(self._target)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]
        # The import system has just replaced the module's spec by the second name's.
        module.__spec__ = self._own_spec


class CompatFinder:
    """Find the modules to edit or to redirect. See the module."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        """Return the spec of a module to edit or to redirect, ``None`` for every other module.

        Raises:
            ImportError: If Chainer is installed in a version other than 7.8.1, or missing.
        """
        if fullname in REDIRECTS:
            return self._find_redirect(fullname, path)
        if fullname.partition(".")[0] not in _EDITED_PACKAGES:
            return None

        from chainer_ooc.compat import edits

        edited = edits.wanted(fullname)
        if not edited and fullname not in _EDITED_PACKAGES:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        if spec is None or spec.origin is None or spec.loader is None:
            if fullname in _EDITED_PACKAGES:  # not installed, or an empty directory
                _refuse_missing(fullname)
            return spec
        if fullname == "chainer":
            _check_version(spec)
        if edited:
            spec.loader = EditedSourceLoader(fullname, spec.origin, spec.loader)
            spec.cached = None
        return spec

    def _find_elsewhere(self, fullname, path, target=None):  # type: ignore[no-untyped-def]
        for finder in sys.meta_path:
            if isinstance(finder, CompatFinder):
                continue
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None

    def _find_redirect(self, fullname, path):  # type: ignore[no-untyped-def]
        from chainer_ooc.compat.cudnn import choice

        # CuPy 13 has modules with these names, which may fail to load.
        if not choice.stands_in(self._find_elsewhere(fullname, path) is not None):
            return None
        target = REDIRECTS[fullname]
        loader = _RedirectLoader(target)
        return ModuleSpec(fullname, loader, origin=target)  # type: ignore[arg-type]


def _check_version(spec: ModuleSpec) -> None:
    """Raise ``ImportError`` if ``spec`` is another version of Chainer, or another one was installed over this."""
    import os
    import re

    assert spec.origin is not None
    path = os.path.join(os.path.dirname(spec.origin), "_version.py")
    try:
        with open(path, encoding="utf-8") as file:
            match = re.search(r"^__version__ = ['\"](.+)['\"]", file.read(), re.MULTILINE)
    except OSError:
        match = None
    found = [match.group(1) if match else "of unknown version"]
    directory = os.path.dirname(os.path.dirname(spec.origin))
    if found == [installation.CHAINER_VERSION]:
        found = installation.other_versions(directory)
    if found:
        raise ImportError(
            f"chainer_ooc works with Chainer {installation.CHAINER_VERSION}, but Chainer {', '.join(found)} is "
            f"installed in {directory}; {installation.replace()}",
            name="chainer",
            path=spec.origin,
        )


def _refuse_missing(package: str) -> None:
    raise ModuleNotFoundError(
        f"{package} is missing: it comes with chainer_ooc and has been removed; {installation.reinstall()}",
        name=package,
    )


def install() -> CompatFinder:
    """Install the hook for this process, unless that is done, and return it.

    Modules imported earlier keep their unedited code.
    """
    for finder in sys.meta_path:
        if isinstance(finder, CompatFinder):
            return finder
    hook = CompatFinder()
    # The finder of _chainer_ooc_startup only waits for the first import to call this function: it
    # has done its work.
    others = [f for f in sys.meta_path if getattr(f, "__module__", "") != "_chainer_ooc_startup"]
    sys.meta_path[:] = [hook, *others]
    return hook
