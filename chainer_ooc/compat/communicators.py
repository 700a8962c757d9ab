"""The replacements of the ChainerMN communicators that version 7 removed."""

from __future__ import annotations

import warnings

__all__ = ["REMOVED", "current_name"]

REMOVED = ("hierarchical", "two_dimensional", "single_node")


def current_name(name: str) -> str:
    """Return the name of the communicator to use for ``name``.

    For the removed ones this is, with a warning, ``pure_nccl`` with a GPU and NCCL, ``flat`` (which needs a
    CUDA-aware MPI) with a GPU only, and ``naive`` without a GPU. Every other name is returned unchanged.
    """
    if name not in REMOVED:
        return name
    gpu, nccl = _has_gpu(), _has_nccl()
    replacement = "pure_nccl" if gpu and nccl else "flat" if gpu else "naive"
    found = "a GPU and NCCL" if gpu and nccl else "a GPU but no NCCL" if gpu else "no GPU"
    warnings.warn(
        f"the communicator {name!r} was removed in ChainerMN 7; using {replacement!r}, as there is "
        f"{found}. Allowed: pure_nccl, flat, non_cuda_aware, naive, dummy",
        stacklevel=3,
    )
    return replacement


def _has_gpu() -> bool:
    try:
        import cupy

        return bool(cupy.cuda.is_available())
    except Exception:  # CuPy raises many kinds when a library is missing
        return False


def _has_nccl() -> bool:
    try:
        from cupy.cuda import nccl

        return bool(nccl.get_version())
    except Exception:
        return False
