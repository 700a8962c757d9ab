"""Finds the CUDA kernels in the (edited) source text of Chainer and ChainerMN and compiles them
with NVRTC.

Needs CuPy and NVRTC, no GPU. A program of its own: ``python chainer_kernels.py 80 e`` compiles for
compute capability 8.0 with float16 and prints what did not compile.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import pkgutil
import re
import sys
import warnings
from typing import Any, NamedTuple

DTYPES = {"e": "float16", "f": "float32", "d": "float64"}


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
        attempts, headers = [(None, 1)], ""
    else:
        letters = _letters(*kernel.arguments[:2])
        # What a letter stands for, and how a raw array is indexed, is seen only at run time.
        choices = [dict.fromkeys((DTYPES[dtype], "float32", "int32")) for _ in letters]
        types = [dict(zip(letters, c, strict=True)) for c in itertools.product(*choices)]
        types = [t for t in types if not t or DTYPES[dtype] in t.values()]
        types.append(dict.fromkeys(letters, "int32"))  # works on indices only
        raw = "raw" in ",".join(kernel.arguments[:2])
        attempts = list(itertools.product(types, (1, 2, 3) if raw else (1,)))
    complaint = None
    for types, ndim in attempts:
        if types is None:
            code, name = kernel.arguments[0], kernel.arguments[1]
        else:
            code, name = _code(kernel, types, ndim)
        options = (*kernel.options.get("options", ()), *core.assemble_cupy_compiler_options(()))
        try:
            program = compiler._NVRTCProgram(headers + code, f"{name}.cu", (), (), method="ptx")
            program.compile(
                (*options, f"-arch=compute_{arch}", "--device-as-default-execution-space")
            )
        except compiler.CompileException as error:
            complaint = (
                complaint or f"{kernel.module}:{kernel.line} {name} {types}\n{str(error)[:1500]}"
            )
            continue
        return None
    return complaint


def main() -> None:
    import chainer_ooc.compat.finder

    chainer_ooc.compat.finder.install()
    arch, dtype = sys.argv[1:3]
    found, dynamic = kernels()
    found += generated(dtype)
    problems = [p for p in (problem(kernel, arch, dtype) for kernel in found) if p is not None]
    print(json.dumps({"kernels": len(found), "dynamic": dynamic, "problems": problems}))


if __name__ == "__main__":
    main()
