"""Edits of ``chainermn``, which is part of Chainer's distribution."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace

EDITS = (
    Edit(
        "chainermn.iterators.multi_node_iterator",
        "NumPy 2.4 refuses int() of an array with a dimension; ranks other than the master do it",
        (Replace("int(_size)", "int(_size[0])"),),
    ),
    Edit(
        "chainermn.communicators",
        "hierarchical, two_dimensional and single_node left ChainerMN 7: map them to successors",
        (
            Replace(
                "\n    if mpi_comm is None:\n        try:\n            import mpi4py.MPI\n",
                "    from chainer_ooc.compat.communicators import current_name\n"
                "    communicator_name = current_name(communicator_name)\n"
                "    if mpi_comm is None:\n        try:\n            import mpi4py.MPI\n",
            ),
        ),
    ),
)
