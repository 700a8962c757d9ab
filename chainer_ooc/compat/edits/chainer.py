"""Edits of ``chainer`` for today's Python, NumPy, SciPy and protobuf."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace, ReplaceTail
from chainer_ooc.compat.edits._conditions import h5py_3, numpy_2, protobuf_has_builder

_REQUIREMENTS = '''
import importlib.metadata


def _satisfied(requirements):
    """Tell whether all requirements ("name>=1.0") are installed."""
    from packaging.requirements import Requirement
    for requirement in map(Requirement, requirements):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            return False
        if not requirement.specifier.contains(version, prereleases=True):
            return False
    return True
'''

_OUT_OF_CORE = '''disable_experimental_feature_warning = False


def out_of_core_mode(
        async_=True, fine_granularity=False, debug=False, devices=None,
        **settings):
    """Turns out-of-core mode on for a with statement, with the arguments of IBM's Chainer and the settings."""
    import chainer_ooc
    return chainer_ooc.out_of_core_mode(
        async_=async_, fine_granularity=fine_granularity, debug=debug,
        devices=devices, **settings)


from chainer_ooc.compat.run import start as _start  # NOQA
_start()
'''

EDITS = (
    Edit(
        "chainer",
        "IBM's out-of-core Chainer has chainer.out_of_core_mode; 'python -m chainer_ooc run' turns the mode on here",
        (ReplaceTail("disable_experimental_feature_warning = False\n", _OUT_OF_CORE),),
    ),
    Edit(
        "chainer._environment_check",
        "numpy.distutils (gone from NumPy 2) and pkg_resources (gone from setuptools 81) served "
        "only checks of the environment; 'python -m chainer_ooc doctor' does them",
        (
            Replace("import numpy.distutils.system_info\nimport pkg_resources\n", "\n\n"),
            ReplaceTail("def check():\n", "def check():\n    pass\n"),
        ),
    ),
    Edit(
        "chainer.functions.array.as_strided",
        "numpy.sctypes is gone from NumPy 2",
        (
            Replace("np.sctypes['int']", "(np.int8, np.int16, np.int32, np.int64)"),
            Replace("np.sctypes['float']", "(np.float16, np.float32, np.float64, np.longdouble)"),
        ),
        when=numpy_2,
    ),
    Edit(
        "chainer.functions.array.resize_images",
        "numpy.float, an alias of float, is gone since NumPy 1.24",
        (Replace("dtype=numpy.float)", "dtype=float)", times=6),),
    ),
    Edit(
        "chainer.functions.pooling.pooling_nd",
        "with cuDNN a pooling and its helper referred to each other, so that each iteration's graph up to there lived, "
        "with its memory, until the next garbage collection",
        (
            Replace("        self.func = func\n", "\n"),
            Replace("self._cudnn_pool.forward(x)", "self._cudnn_pool.forward(x, self)"),
            Replace("self._cudnn_pool.backward(gy)", "self._cudnn_pool.backward(gy, self)"),
            Replace("forward(self, x):\n        func = self.func\n", "forward(self, x, func):\n\n"),
            Replace(
                "backward(self, gy):\n        func = self.func\n", "backward(self, gy, func):\n\n"
            ),
        ),
    ),
    Edit(
        "chainer.functions.loss.softmax_cross_entropy",
        "a bug of the 7.8.1 release: of labels that do not fit it said 'An Expr instance cannot be evaluated as bool'",
        (
            Replace(
                "if t_type.dtype.kind == 'i':", "if type_check.eval(t_type.dtype.kind) == 'i':"
            ),
            Replace(
                "t_type.ndim == x_type.ndim - 1,\n",
                "x_type.ndim >= 2, t_type.ndim == x_type.ndim - 1,\n",
            ),
        ),
    ),
    *(
        Edit(
            f"chainer.functions.activation.{name}",
            "a bug of the 7.8.1 release: of a wrong axis it said 'An Expr instance cannot be evaluated as bool'",
            (
                Replace(
                    "-x_type.ndim <= self.axis < x_type.ndim,",
                    "-x_type.ndim <= self.axis, self.axis < x_type.ndim,",
                ),
            ),
        )
        for name in ("softmax", "log_softmax")
    ),
    Edit(
        "chainer.function_node",
        "a bug of the 7.8.1 release: of inputs with too few dimensions many functions said 'tuple index out of range'",
        (
            Replace(
                "except type_check.InvalidType:\n            # Ignore errors on first run\n",
                "except (type_check.InvalidType, IndexError):\n            # Ignore errors on first run\n",
            ),
        ),
    ),
    Edit(
        "chainer.distributions.categorical",
        "numpy.meshgrid returns a tuple since NumPy 2",
        (
            Replace(
                "self.log_p[mg + [x.data.astype(numpy.int32)]]",
                "self.log_p[(*mg, x.data.astype(numpy.int32))]",
            ),
            Replace(
                "self.log_p[mg + [x.astype(numpy.int32)]]",
                "self.log_p[(*mg, x.astype(numpy.int32))]",
            ),
        ),
        when=numpy_2,
    ),
    Edit(
        "chainer.functions.array.pad_sequence",
        "NumPy 2 raises, and 1.26 warns, where a negative padding wraps around in an unsigned array",
        (
            Replace(
                "y[i, l:] = self.padding\n",
                "y[i, l:] = numpy.asarray(self.padding).astype(y.dtype)\n",
            ),
        ),
    ),
    Edit(
        "chainer.variable",
        "NumPy 2 arrays have an attribute 'device', so that debug_print said 'cpu', not 'CPU'",
        (
            Replace(
                "getattr(array, 'device', 'CPU')",
                "'CPU' if xp is numpy else getattr(array, 'device', 'CPU')",
            ),
        ),
        when=numpy_2,
    ),
    Edit(
        "chainer.functions.math.sparse_matmul",
        "SciPy refuses sparse matrices of float16: compute in float32, as on the GPU, then round",
        (
            Replace(
                "    _m, _k = A_shape\n    _n = B.shape[-1]\n    if B.ndim == 2:\n        sp_A",
                "    if A_data.dtype == numpy.float16: A_data = A_data.astype(numpy.float32)\n"
                "    (_m, _k), _n = A_shape, B.shape[-1]\n    if B.ndim == 2:\n        sp_A",
            ),
        ),
    ),
    Edit(
        "chainer.links.caffe.protobuf3.caffe_pb2",
        "protobuf no longer lets generated code create descriptors one by one; the serialized "
        "description in the same file builds them",
        (
            Replace(
                "DESCRIPTOR = _descriptor.FileDescriptor(\n  name='caffe.proto',\n"
                "  package='caffe',\n  syntax='proto2',\n  serialized_pb=_b(",
                "from google.protobuf import descriptor_pool\n"
                "from google.protobuf.internal import builder\n\n"
                "DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(\n  _b(",
            ),
            Replace("from google.protobuf import reflection as _reflection\n", "\n"),
            ReplaceTail(
                "_sym_db.RegisterFileDescriptor(DESCRIPTOR)\n\n_PHASE",
                "builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())\n"
                "builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, 'caffe_pb2', globals())\n",
            ),
        ),
        when=protobuf_has_builder,
    ),
    Edit(
        "chainer.testing.helper",
        "pkg_resources is gone from setuptools 81",
        (
            Replace("\nimport pkg_resources\n", _REQUIREMENTS),
            Replace(
                "    ws = pkg_resources.WorkingSet()\n    try:\n"
                "        ws.require(*requirements)\n        skip = False\n"
                "    except pkg_resources.ResolutionError:\n        skip = True\n",
                "    skip = not _satisfied(requirements)\n",
            ),
            Replace(
                "    ws = pkg_resources.WorkingSet()\n    try:\n"
                "        ws.require(*requirements)\n        skip = True\n"
                "    except pkg_resources.ResolutionError:\n        skip = False\n",
                "    skip = _satisfied(requirements)\n",
            ),
        ),
    ),
    Edit(
        "chainer.testing.doctest_helper",
        "pkg_resources is gone from setuptools 81",
        (
            Replace("\nimport pkg_resources\n", _REQUIREMENTS),
            Replace(
                "    ws = pkg_resources.WorkingSet()\n    try:\n        ws.require(*requirements)\n"
                "    except pkg_resources.ResolutionError:\n        return False\n"
                "    return skipif(True)\n",
                "    return skipif(True) if _satisfied(requirements) else False\n",
            ),
        ),
    ),
    Edit(
        "chainer.serializers.hdf5",
        "h5py 3 reads strings as bytes, so that a saved string came back as \"b'abc'\"",
        (
            Replace(
                "        if value is None:\n            return numpy.asarray(dataset)\n",
                "        if value is None or isinstance(value, str):\n"
                "            return _read(dataset, value)\n",
            ),
            Replace(
                "class HDF5Deserializer(serializer.Deserializer):\n",
                "def _read(dataset, value):\n"
                "    if h5py.check_string_dtype(dataset.dtype) is not None:\n"
                "        dataset = dataset.asstr()[()]\n"
                "    return numpy.asarray(dataset) if value is None else type(value)(dataset)\n\n\n"
                "class HDF5Deserializer(serializer.Deserializer):\n",
            ),
        ),
        when=h5py_3,
    ),
    Edit(
        "chainer.iterators.multiprocess_iterator",
        "Thread.setDaemon warns since Python 3.10",
        (Replace("thread.setDaemon(True)", "thread.daemon = True"),),
    ),
    Edit(
        "chainer.dataset.convert",
        "NumPy 2.4 warns of a positional output argument of numpy.maximum",
        (Replace("(shape, array.shape, shape)", "(shape, array.shape, out=shape)"),),
    ),
    Edit(
        "chainer.functions.math.fix",
        "NumPy 2.5 warns of numpy.fix; trunc is the same function",
        (Replace("xp.fix(x)", "xp.trunc(x)"),),
    ),
    Edit(
        "chainer.links.activation.maxout",
        "NumPy 2.5 warns of setting an array's shape: initialize a reshaped view instead",
        (
            Replace(
                "                array.shape = (out_size, pool_size, in_size)\n"
                "                initialW_orig(array)\n"
                "                array.shape = (linear_out_size, in_size)\n",
                "                initialW_orig(array.reshape(out_size, pool_size, in_size))\n\n\n",
            ),
            Replace(
                "                array.shape = (out_size, pool_size)\n"
                "                initial_bias_orig(array)\n"
                "                array.shape = linear_out_size,\n",
                "                initial_bias_orig(array.reshape(out_size, pool_size))\n\n\n",
            ),
        ),
    ),
)
