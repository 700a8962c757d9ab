"""The error of cuDNN's functions."""

from __future__ import annotations

from typing import Any

__all__ = ["CuDNNError"]


class CuDNNError(RuntimeError):
    """A cuDNN function failed.

    One that found no memory on the device is a :class:`~.device.CuDNNOutOfMemoryError`, which is
    CuPy's ``OutOfMemoryError`` as well.

    Attributes:
        status: The ``cudnnStatus_t`` that it returned.
        function: Its name in the C API.
    """

    def __init__(self, status: int, function: str, name: str, detail: str = "") -> None:
        super().__init__(
            f"{function} failed: {name} ({status})" + (f": {detail}" if detail else "")
        )
        self.status = status
        self.function = function
        self._given = status, function, name, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given

    @property
    def not_supported(self) -> bool:
        """Whether cuDNN has no implementation for these arguments (statuses 3000 to 3999)."""
        return 3000 <= self.status < 4000

    @property
    def bad_parameter(self) -> bool:
        """Whether cuDNN refused an argument (statuses 2000 to 2999)."""
        return 2000 <= self.status < 3000
