"""Edits of Chainer's modules that import SciPy or h5py, which takes 38 MiB and half a second."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace


def _later(module: str, line: str, name: str, library: str) -> Edit:
    new = f"    import chainer_ooc.compat.later as {name}; {name} = {name}.later({library!r})\n"
    reason = (
        f"{library} takes memory and time, and few programs use it: it is imported at its first use"
    )
    return Edit(module, reason, (Replace(f"    {line}\n", new),))


_SPECIAL = ("from scipy import special", "special", "scipy.special")

EDITS = (
    _later("chainer.serializers.hdf5", "import h5py", "h5py", "h5py"),
    _later("chainer.datasets.svhn", "from scipy import io", "io", "scipy.io"),
    _later("chainer.distributions.multivariate_normal", "import scipy.linalg", "scipy", "scipy"),
    _later("chainer.functions.math.erfcinv", *_SPECIAL),
    _later("chainer.functions.math.erfcx", *_SPECIAL),
    _later("chainer.functions.math.erfinv", *_SPECIAL),
    _later("chainer.functions.math.ndtri", *_SPECIAL),
    _later(
        "chainer.functions.math.sparse_matmul", "from scipy import sparse", "sparse", "scipy.sparse"
    ),
)
