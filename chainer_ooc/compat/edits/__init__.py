"""The edits of stock Chainer's modules, made while they are imported, and the reason of each.

Every module that :data:`EDIT_SETS` names has one tuple ``EDITS`` of :class:`Edit`. If several edits concern
one module, they are applied in the order of ``EDIT_SETS``, each to the text that those before it left.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from chainer_ooc.compat import installation

__all__ = ["EDIT_SETS", "Edit", "Replace", "ReplaceTail", "apply", "register", "wanted"]

#: Modules with a tuple ``EDITS``, in the order in which they are applied.
EDIT_SETS = (
    "chainer_ooc.compat.edits.backprop",
    "chainer_ooc.compat.edits.chainer",
    "chainer_ooc.compat.edits.chainermn",
    "chainer_ooc.compat.edits.cupy",
    "chainer_ooc.compat.edits.later",
    "chainer_ooc.compat.edits.onnx",
    "chainer_ooc.compat.edits.parameters",
)


class Replace(NamedTuple):
    """Replace ``old``, which must occur exactly ``times`` times, by ``new``.

    Keep the number of lines where it can be kept: debuggers read the unedited file.
    """

    old: str
    new: str
    times: int = 1


class ReplaceTail(NamedTuple):
    """Replace everything from ``start``, which must occur exactly once, to the file's end."""

    start: str
    new: str


class Edit(NamedTuple):
    """One edit of one module.

    Attributes:
        module: The full name of the module.
        reason: The reason for the edit, one sentence.
        replacements: The replacements, applied in order.
        when: Called once, when the module is imported. If it returns ``False``, the edit is left out.
            ``None``: always apply.
    """

    module: str
    reason: str
    replacements: tuple[Replace | ReplaceTail, ...]
    when: Callable[[], bool] | None = None


_edits: dict[str, list[Edit]] | None = None


def _table() -> dict[str, list[Edit]]:
    global _edits
    if _edits is None:
        table: dict[str, list[Edit]] = {}
        for name in EDIT_SETS:
            for edit in import_module(name).EDITS:
                table.setdefault(edit.module, []).append(edit)
        _edits = table
    return _edits


def register(*edits: Edit) -> None:
    """Add edits after those of ``EDIT_SETS``. Call it before the edited modules are imported.

    Raises:
        RuntimeError: If a module to edit is already imported.
    """
    import sys

    for edit in edits:
        if edit.module in sys.modules:
            raise RuntimeError(
                f"{edit.module} is already imported and can no longer be edited ({edit.reason}); "
                "register edits earlier"
            )
        _table().setdefault(edit.module, []).append(edit)


def wanted(module: str) -> bool:
    """Return whether ``module`` has edits. Their conditions are not evaluated yet."""
    return module in _table()


def apply(module: str, text: str, path: str = "?") -> str:
    """Return ``text``, the source of ``module``, with all its edits whose condition holds.

    Raises:
        ImportError: If the text to replace does not occur as often as the edit says.
    """
    for edit in _table().get(module, ()):
        if edit.when is None or edit.when():
            for replacement in edit.replacements:
                text = _replace(edit, replacement, text, path)
    return text


def _replace(edit: Edit, replacement: Replace | ReplaceTail, text: str, path: str) -> str:
    if isinstance(replacement, Replace):
        old, new, times = replacement
    else:
        (old, new), times = replacement, 1
    found = text.count(old)
    if found != times:
        raise ImportError(
            f"chainer_ooc cannot edit {edit.module} ({edit.reason}): expected {old!r} "
            f"{times} time(s) in {path}, found it {found} time(s); the file is not that "
            f"of Chainer 7.8.1; {installation.reinstall()}",
            name=edit.module,
            path=path,
        )
    if isinstance(replacement, Replace):
        return text.replace(old, new)
    return text[: text.index(old)] + new
