"""Finds the CUDA kernels in the (edited) source text of Chainer and ChainerMN and compiles them
with NVRTC.

Needs CuPy and NVRTC, no GPU. A program of its own: ``python chainer_kernels.py 80 e`` compiles for
compute capability 8.0 with float16 and prints what did not compile.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import sys
import warnings
from typing import Any, NamedTuple
from unittest import mock

DTYPES = {"e": "float16", "f": "float32", "d": "float64"}

#: What a type placeholder stands for where that is not the arrays' floating type: kernel -> letters.
OTHER_TYPES = {
    # Indices, labels and sizes.
    "inverse_indices": {"S": "int32"},
    "resize_images_interpolate_bilinear": {"S": "int32"},
    "resize_images_interpolate_grad_bilinear": {"S": "int32"},
    "embed_id_bwd": {"S": "int32"},
    "embed_id_bwd_ignore_label": {"S": "int32"},
    "ctc_label_prob_sum": {"I": "int32"},
    "softmax_crossent_bwd": {"S": "int32"},
    "softmax_crossent_weight_bwd": {"S": "int32"},
    # Addresses, and what lies there.
    "pad_sequence_fwd": {"P": "uint64"},
    "_memcpy_gather": {"T": "uint64", "X": "int32", "Y": "int32"},
    "_memcpy_scatter": {"T": "uint64", "X": "int32", "Y": "int32"},
    # Rates of an optimizer: float32 for parameters of float16.
    "amsbound": {"T": "float32"},
    "adabound": {"T": "float32"},
}


class Kernel(NamedTuple):
    module: str
    line: int
    kind: str  # elementwise, reduce, raw
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _sources(package: str) -> Any:
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        if info.name.startswith(("chainer.testing", "chainer.links.caffe.protobuf3")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # an optional dependency is missing
                continue
        spec = module.__spec__
        # Some names are other modules' (chainer.cuda).
        if spec is not None and spec.name == info.name and hasattr(spec.loader, "get_source"):
            yield module, spec.loader.get_source(info.name)


def kernels() -> tuple[list[Kernel], list[str]]:
    """Return the kernels whose text the source gives, and where one is put together at run time."""
    found, dynamic = [], []
    for package in ("chainer", "chainermn"):
        for module, source in _sources(package):
            if not source or "cuda." not in source:
                continue
            for node in ast.walk(ast.parse(source)):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                kind, owner = node.func.attr, ast.unparse(node.func.value)
                if kind not in ("elementwise", "reduce", "raw") or owner not in (
                    "cuda",
                    "chainer.cuda",
                ):
                    continue
                try:
                    values = [eval(ast.unparse(a), vars(module)) for a in node.args]
                    options = {
                        k.arg: eval(ast.unparse(k.value), vars(module)) for k in node.keywords
                    }
                except NameError:
                    dynamic.append(f"{module.__name__}:{node.lineno}")
                    continue
                found.append(Kernel(module.__name__, node.lineno, kind, tuple(values), options))
    return found, dynamic


def generated(dtype: str) -> list[Kernel]:
    """Return kernels that Chainer puts together at run time, for two and three axes where that
    matters."""
    import numpy
    from chainer.functions.pooling import average_pooling_nd_kernel, max_pooling_nd_kernel
    from chainer.utils import conv_nd_kernel

    classes = [
        (conv_nd_kernel.Im2colNDKernel, 1), (conv_nd_kernel.Col2imNDKernel, 1),
        (average_pooling_nd_kernel.AveragePoolingNDKernelForward, 0),
        (average_pooling_nd_kernel.AveragePoolingNDKernelBackward, 0),
        (max_pooling_nd_kernel.MaxPoolingNDKernelForward, 0),
        (max_pooling_nd_kernel.MaxPoolingNDKernelBackward, 0),
    ]  # fmt: skip
    found = [
        Kernel(cls.__module__, 0, "elementwise", cls.generate(ndim), {})
        for cls, _ in classes
        for ndim in (2, 3)
    ]
    name = numpy.dtype(dtype).name
    found.append(
        Kernel(
            "chainermn.communicators.pure_nccl_communicator",
            0,
            "elementwise",
            ("", f"{name} x", "x *= (1.0/4)", "div_by_size"),
            {},
        )
    )
    return found


def recorded() -> list[Kernel]:
    """Return kernels that Chainer's code puts together from its arguments: it runs on mocks."""
    from chainer.backends import cuda
    from chainer.functions.rnn import tree_lstm
    from chainer.optimizers import rmsprop

    found: list[Kernel] = []

    def record(*arguments: Any, **options: Any) -> Any:
        module = sys._getframe(1).f_globals["__name__"]
        found.append(Kernel(module, 0, "elementwise", arguments, options))
        return lambda *_arrays: (mock.MagicMock(), mock.MagicMock())

    with (
        mock.patch.object(cuda, "elementwise", record),
        mock.patch.object(tree_lstm.backend, "get_array_module", lambda *_arrays: mock.MagicMock()),
    ):
        for branches in (2, 3):
            inputs = [mock.MagicMock(shape=(2, 4)) for _ in range(branches)]
            inputs.append(mock.MagicMock(shape=(2, 4 * (3 + branches))))
            function = tree_lstm.TreeLSTM()
            function.forward(tuple(inputs))
            function.backward(tuple(inputs), (mock.MagicMock(), mock.MagicMock()))
        for inside in (False, True):
            rule = rmsprop.RMSpropRule(eps_inside_sqrt=inside)
            rule._state = {"ms": mock.MagicMock()}
            rule.update_core_gpu(mock.MagicMock(**{"grad.dtype.type": float}))
    assert len(found) == 6
    return found


def _letters(*params: str) -> list[str]:
    """Return the type placeholders of parameter lists: single capital letters."""
    return sorted(set(re.findall(r"(?:^|,|\braw\b|\bconst\b)\s*([A-Z])\s", ",".join(params))))


def _code(kernel: Kernel, types: dict[str, str], ndim: int) -> tuple[str, str]:
    """Return the CUDA source that CuPy makes of a kernel, and the function's name."""
    import cupy
    import numpy
    from cupy._core import _carray, _kernel, _reduction

    post = kernel.arguments[4] if kernel.kind == "reduce" else ""

    def scalar(p: Any) -> bool:
        """Return whether the expression at the end uses an input: then it is passed as a number."""
        return p.is_const and not p.raw and re.search(rf"\b{p.name}\b", post) is not None

    def infos(params: Any) -> tuple[Any, ...]:
        made = []
        for p in params:
            if p.ctype is None and p.dtype is None:
                made.append(_kernel._ArgInfo(2, _carray.Indexer, None, 1, True, True))
                continue
            dtype = p.dtype if p.dtype is not None else numpy.dtype(types[p.ctype]).type
            if p.name == "_block_stride" or scalar(p):
                made.append(_kernel._ArgInfo(3, type(None), dtype, 0, True, True))
            else:
                made.append(
                    _kernel._ArgInfo(1, cupy.ndarray, dtype, ndim if p.raw else 1, False, True)
                )
        return tuple(made)

    pairs = tuple((letter, numpy.dtype(name).type) for letter, name in sorted(types.items()))
    if kernel.kind == "elementwise":
        k = cupy.ElementwiseKernel(*kernel.arguments, **kernel.options)
        code = _kernel._get_elementwise_kernel_code(
            infos(k.params), _kernel._TypeMap(pairs), k.params, k.operation, k.name, k.preamble,
            **k.kwargs,
        )  # fmt: skip
        return code, k.name
    k = cupy.ReductionKernel(*kernel.arguments, **kernel.options)
    reduce_type = k.reduce_type
    if reduce_type is None:
        reduce_type = k.out_params[0].ctype
    ins = "".join(f"const {p.ctype or numpy.dtype(p.dtype).name} {p.name} = _raw_{p.name}[_in_ind.get()];"
                  for p in k.in_params if not p.raw and not scalar(p))  # fmt: skip
    outs = "".join(f"{p.ctype or numpy.dtype(p.dtype).name} &{p.name} = _raw_{p.name}[_out_ind.get()];"
                   for p in k.out_params if not p.raw)  # fmt: skip
    body = _reduction._create_reduction_function_code(
        k.name, 512, reduce_type, k._params, infos(k._params), k.identity, k.map_expr,
        k.reduce_expr, k.post_map_expr, _kernel._TypeMap((*pairs, ("IndexT", numpy.int32))), ins,
        outs, k.preamble, k.options,
    )  # fmt: skip
    return body, k.name


def problem(kernel: Kernel, arch: str, dtype: str) -> str | None:
    """Compile a kernel with the floating types ``dtype``; return NVRTC's complaint, if any."""
    from cupy._core import core
    from cupy.cuda import compiler

    headers = "".join(f"#include <{name}>\n" for name in core._cupy_header_list)
    if kernel.kind == "raw":
        sources, headers, types = [kernel.arguments[:2]], "", {}
    else:
        types = dict.fromkeys(_letters(*kernel.arguments[:2]), DTYPES[dtype])
        types |= OTHER_TYPES.get(_name(kernel), {})
        # How a raw array is indexed, by one number or by several, is seen only at run time.
        raw = "raw" in ",".join(kernel.arguments[:2])
        sources = [_code(kernel, types, ndim) for ndim in ((1, 2, 3) if raw else (1,))]
    options = (*kernel.options.get("options", ()), *core.assemble_cupy_compiler_options(()))
    complaints = []
    for code, name in sources:
        try:
            program = compiler._NVRTCProgram(headers + code, f"{name}.cu", (), (), method="ptx")
            program.compile(
                (*options, f"-arch=compute_{arch}", "--device-as-default-execution-space")
            )
        except compiler.CompileException as error:
            complaints.append(f"{kernel.module}:{kernel.line} {name} {types}\n{str(error)[:1500]}")
        else:
            return None
    return complaints[0]


def _name(kernel: Kernel) -> str:
    return str(kernel.arguments[3 if kernel.kind == "elementwise" else 6])


def main() -> None:
    import chainer_ooc.compat.finder

    chainer_ooc.compat.finder.install()
    arch, dtype = sys.argv[1:3]
    report = {"kernels": 0, "dynamic": [], "problems": [], "unknown": unknown(arch)}
    if not report["unknown"]:
        found, report["dynamic"] = kernels()
        found += [*generated(dtype), *recorded()]
        report["kernels"] = len(found)
        problems = (problem(kernel, arch, dtype) for kernel in found)
        report["problems"] = [complaint for complaint in problems if complaint is not None]
    print(json.dumps(report))


def unknown(arch: str) -> str | None:
    """Return why nothing can be compiled for ``arch``: CUDA 13 knows 7.5 and later only."""
    from cupy_backends.cuda.libs import nvrtc

    version = nvrtc.getVersion()
    if version >= (13, 0) and int(arch) < 75:
        return f"NVRTC {version[0]}.{version[1]} does not compile for {arch[0]}.{arch[1]}"
    return None


if __name__ == "__main__":
    main()
