"""Read cuDNN's own C headers, as a compiler's preprocessor and a C parser understand them.

They are those of an installed ``nvidia-cudnn-cu*`` wheel, or in the folder that ``CUDNN_INCLUDE`` names.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

HEADERS = ("cudnn_graph.h", "cudnn_ops.h", "cudnn_cnn.h", "cudnn_adv.h")

# What the headers need of CUDA and of the C library, without a compiler's own words, which the parser does not know.
_STUBS = {
    "cuda_runtime.h": (
        "#pragma once\n#include <stddef.h>\ntypedef struct CUstream_st *cudaStream_t;\n"
        "typedef struct CUgraph_st *cudaGraph_t;\ntypedef int cudaDataType;\n"
        "typedef enum libraryPropertyType_t { MAJOR_VERSION } libraryPropertyType;\n"
    ),
    "cuda_runtime_api.h": "#include <cuda_runtime.h>\n",
    "library_types.h": "",
    "stddef.h": "#pragma once\ntypedef unsigned long size_t;\n#define NULL ((void *)0)\n",
    "stdint.h": (
        "#pragma once\ntypedef int int32_t; typedef unsigned int uint32_t;\n"
        "typedef long int64_t; typedef unsigned long uint64_t;\n"
        "typedef short int16_t; typedef unsigned short uint16_t;\n"
        "typedef signed char int8_t; typedef unsigned char uint8_t;\n"
    ),
}

#: C's words for a type, and those of the prototype table.
_KINDS = {
    "void": "void",
    "char": "char",
    "int": "int",
    "unsigned": "uint",
    "unsigned int": "uint",
    "long": "long",
    "unsigned long": "size",
    "unsigned long long": "ull",
    "float": "float",
    "double": "double",
}


def directory() -> str | None:
    """Return the folder of the headers of the installed wheel, if any."""
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = os.path.join(location, "include")
        if os.path.exists(os.path.join(folder, "cudnn_graph.h")):
            return folder
    return None


def missing() -> str:
    """Return why the headers cannot be read here and what to do; nothing if they can be."""
    named = os.environ.get("CUDNN_INCLUDE")
    if named and not Path(named, "cudnn_graph.h").exists():
        return f"CUDNN_INCLUDE={named} has no cudnn_graph.h"
    if not named and directory() is None:
        return "needs cuDNN's headers: CUDNN_INCLUDE=/path/to/include, or an nvidia-cudnn-cu* wheel"
    if shutil.which("cc") is None:
        return "needs a C compiler's preprocessor: cc was not found"
    if importlib.util.find_spec("pycparser") is None:
        return "needs pycparser: pip install pycparser"
    return ""


@dataclasses.dataclass
class Headers:
    """What the headers declare.

    Attributes:
        version: cuDNN's version.
        functions: ``name:kind`` of each function's parameters, in the words of the prototype table.
        results: The kind of what each function returns, and of enumerations their names.
        constants: The values of enumerators and of numeric macros.
        structs: ``name:kind`` of each struct's fields, by the name of its typedef.
    """

    version: str
    functions: dict[str, str]
    results: dict[str, str]
    constants: dict[str, float]
    structs: dict[str, list[str]]


def read(scratch: Path) -> Headers:
    """Read them. ``scratch`` is an empty folder."""
    from pycparser import c_ast, c_parser

    folder = os.environ.get("CUDNN_INCLUDE") or directory()
    for name, text in _STUBS.items():
        (scratch / name).write_text(text)
    command = ["cc", "-nostdinc", f"-I{scratch}", f"-I{folder}"]
    command += [part for name in HEADERS for part in ("-include", name)]

    def preprocessed(*options: str) -> str:
        given = [*command, "-E", *options, "-xc", os.devnull]
        return subprocess.run(given, capture_output=True, text=True, check=True).stdout

    source = re.sub(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)", "", preprocessed("-P"))
    tree = c_parser.CParser().parse(source)
    typedefs = {node.name: node.type for node in tree.ext if isinstance(node, c_ast.Typedef)}
    constants: dict[str, float] = {}

    def value(node: Any) -> int:
        if isinstance(node, c_ast.Constant):
            return int(node.value.rstrip("uUlL"), 0)
        if isinstance(node, c_ast.UnaryOp) and node.op == "-":
            return -value(node.expr)
        if isinstance(node, c_ast.BinaryOp) and node.op in ("+", "-", "<<", "|"):
            one, two = value(node.left), value(node.right)
            return {"+": one + two, "-": one - two, "<<": one << max(two, 0), "|": one | two}[
                node.op
            ]
        assert isinstance(node, c_ast.ID), node
        return int(constants[node.name])

    class Enumerations(c_ast.NodeVisitor):
        def visit_Enum(self, node: Any) -> None:
            last = -1
            for one in node.values.enumerators if node.values else ():
                last = last + 1 if one.value is None else value(one.value)
                constants[one.name] = last

    Enumerations().visit(tree)
    macros = dict(re.findall(r"#define (CUDNN_\w+) (.+)", preprocessed("-dM")))
    for name, text in macros.items():
        if re.fullmatch(r"\(?-?[\d.]+U?\)?", text):
            constants.setdefault(name, float(text.strip("()U")))

    def kind(node: Any) -> str:
        if isinstance(node, c_ast.PtrDecl):
            return "ptr"
        if isinstance(node, c_ast.ArrayDecl):  # of a parameter; a field has its length
            return "ptr" if node.dim is None else f"{kind(node.type)}[{value(node.dim)}]"
        if isinstance(node, c_ast.TypeDecl):
            return kind(node.type)
        if isinstance(node, c_ast.Enum):
            return "int"
        if isinstance(node, c_ast.Struct):
            return "struct"
        name = " ".join(node.names)
        return _KINDS.get(name) or kind(typedefs[name])

    def named(declarations: Any) -> list[str]:
        kinds = [(one.name, kind(one.type)) for one in declarations or ()]
        return [f"{name}:{what}" for name, what in kinds if what != "void"]

    functions, results, structs = {}, {}, {}
    for node in tree.ext:
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            functions[node.name] = " ".join(named(node.type.args and node.type.args.params))
            returned = node.type.type
            is_plain = isinstance(returned, c_ast.TypeDecl)
            names = getattr(returned.type, "names", [""]) if is_plain else [""]
            results[node.name] = names[0] if names[0].startswith("cudnn") else kind(returned)
    for name, node in typedefs.items():
        struct = getattr(node, "type", None)
        if isinstance(struct, c_ast.Struct) and struct.decls:
            structs[name] = named(struct.decls)
    parts = (macros[f"CUDNN_{part}"] for part in ("MAJOR", "MINOR", "PATCHLEVEL"))
    return Headers(".".join(parts), functions, results, constants, structs)
