"""Edits of ``chainermn``, which is part of Chainer's distribution."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace

EDITS = (
    Edit(
        "chainermn.iterators.multi_node_iterator",
        "int() of an array with one dimension is deprecated and refused by NumPy 2.5; only ranks other than the master run it",
        (Replace("int(_size)", "int(_size[0])"),),
    ),
)
