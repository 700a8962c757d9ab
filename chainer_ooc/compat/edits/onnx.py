"""Edits of ``onnx_chainer``, the exporter to ONNX in Chainer's distribution."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace
from chainer_ooc.compat.edits._conditions import onnx_without_mapping

_REASON = "onnx.mapping left ONNX: the same tables are in chainer_ooc.compat.onnx_mapping"
_IMPORT = (
    Replace(
        "from onnx.mapping import NP_TYPE_TO_TENSOR_TYPE\n",
        "from chainer_ooc.compat.onnx_mapping import NP_TYPE_TO_TENSOR_TYPE\n",
    ),
)

EDITS = (
    Edit("onnx_chainer.export", _REASON, _IMPORT, when=onnx_without_mapping),
    Edit("onnx_chainer.functions.math", _REASON, _IMPORT, when=onnx_without_mapping),
    Edit("onnx_chainer.functions.array", _REASON, _IMPORT, when=onnx_without_mapping),
    Edit(
        "onnx_chainer.context",
        _REASON,
        (
            Replace("import onnx\n", "from chainer_ooc.compat import onnx_mapping\n"),
            Replace("onnx.mapping.STORAGE", "onnx_mapping.STORAGE"),
        ),
        when=onnx_without_mapping,
    ),
)
