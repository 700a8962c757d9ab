"""The error of estimates."""

from __future__ import annotations

from chainer_ooc.errors import OutOfCoreError

__all__ = ["DependsOnDataError", "EstimateError"]


class EstimateError(OutOfCoreError, ValueError):
    """The request cannot be estimated. The message names the value and gives what would work."""


class DependsOnDataError(EstimateError):
    """A shape depends on values that are not there."""
