"""The error of estimates."""

from __future__ import annotations

from chainer_ooc.errors import OutOfCoreError

__all__ = ["EstimateError"]


class EstimateError(OutOfCoreError, ValueError):
    """What was asked cannot be estimated. The message names the value, and what would do."""
