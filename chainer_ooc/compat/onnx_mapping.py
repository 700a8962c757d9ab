"""The two tables of ``onnx.mapping`` that ``onnx_chainer`` reads and ONNX has removed."""

from __future__ import annotations

import numpy
from onnx import TensorProto, helper

__all__ = ["NP_TYPE_TO_TENSOR_TYPE", "STORAGE_TENSOR_TYPE_TO_FIELD"]

#: NumPy dtype -> ONNX element type.
NP_TYPE_TO_TENSOR_TYPE = {
    numpy.dtype(code): int(helper.np_dtype_to_tensor_dtype(numpy.dtype(code)))
    for code in "?bBhHiIlLqQefdFDO"
}

#: ONNX element type -> field of ``TensorProto`` that holds its elements as plain numbers.
STORAGE_TENSOR_TYPE_TO_FIELD = {
    int(TensorProto.FLOAT): "float_data",
    int(TensorProto.DOUBLE): "double_data",
    int(TensorProto.INT32): "int32_data",
    int(TensorProto.UINT16): "int32_data",
    int(TensorProto.BOOL): "int32_data",
    int(TensorProto.INT64): "int64_data",
    int(TensorProto.UINT32): "uint64_data",
    int(TensorProto.UINT64): "uint64_data",
    int(TensorProto.STRING): "string_data",
}
