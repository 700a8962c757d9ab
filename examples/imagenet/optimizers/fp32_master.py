"""Update rules whose float32 copy of a float16 parameter is part of a snapshot."""

from __future__ import annotations

from typing import Any

import chainer
import numpy


class Fp32MasterRule(chainer.optimizer.UpdateRule):
    """Base of update rules that resume bit for bit with ``use_fp32_update``.

    Chainer updates a float16 parameter through a float32 copy when ``use_fp32_update`` is on, but
    leaves the copy out of snapshots: a resumed run starts it again from the rounded parameter.
    Here the copy is saved beside the state as ``fp32_param``.
    """

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the state and, where there is one, the float32 parameter."""
        super().serialize(serializer)
        reading = isinstance(serializer, chainer.serializer.Deserializer)
        master = self._fp32_param
        if not reading:
            if master is not None and master.array is not None:
                serializer("fp32_param", master.array)
            return
        try:
            array = serializer("fp32_param", None if master is None else master.array)
        except KeyError:  # written without use_fp32_update, or by another rule
            return
        if array is None:
            return
        if master is None:
            self._fp32_param = chainer.Parameter(numpy.asarray(array, dtype=numpy.float32))
        elif master.array is not array:
            master.array = array

    def update(self, param: chainer.Parameter) -> None:
        """Updates the parameter; the float32 copy follows it to its device first."""
        if self._fp32_param is not None:
            self._fp32_param.to_device(param.device)
        super().update(param)
