"""Reads cuDNN's C headers: the functions' parameters, the enumerations' values and the version."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable

HEADERS = ("cudnn_graph.h", "cudnn_ops.h", "cudnn_cnn.h", "cudnn_adv.h")

_KINDS = {
    "int": "int",
    "int32_t": "int",
    "uint32_t": "uint",
    "unsigned": "uint",
    "size_t": "size",
    "unsigned long long": "ull",
    "float": "float",
    "double": "double",
}

#: Types that are pointers although they are not spelled with a star.
_OPAQUE = re.compile(r"cudnn\w*(Handle|Descriptor)_t|cudaStream_t|cudnnHandle_t")


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


def text(folder: str) -> str:
    """Return all headers as one text without comments."""
    parts = []
    for name in HEADERS:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            parts.append(file.read())
    joined = re.sub(r"/\*.*?\*/", " ", "\n".join(parts), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", " ", joined)


def kind_of(declaration: str) -> str:
    """Return ``name:kind`` of one parameter's C declaration, in the words of the prototype
    table."""
    words = declaration.replace("const", " ").strip()
    name = re.search(r"(\w+)\s*(\[\])?$", words)
    assert name is not None, declaration
    type_ = words[: name.start()].strip()
    if "*" in type_ or name.group(2) or _OPAQUE.fullmatch(type_):
        return f"{name.group(1)}:ptr"
    if type_ in _KINDS:
        return f"{name.group(1)}:{_KINDS[type_]}"
    assert re.fullmatch(r"cudnn\w+_t", type_), declaration  # an enumeration
    return f"{name.group(1)}:int"


def functions(source: str, names: Iterable[str]) -> dict[str, str]:
    """Return the parameters of the named functions in the form of the prototype table."""
    wanted = set(names)
    found = {}
    for match in re.finditer(r"\bCUDNNWINAPI\s+(cudnn\w+)\s*\(([^;]*?)\)\s*;", source):
        name, parameters = match.groups()
        if name not in wanted:
            continue
        if parameters.strip() in ("", "void"):
            found[name] = ""
        else:
            found[name] = " ".join(kind_of(part) for part in parameters.split(","))
    return found


def constants(source: str) -> dict[str, float]:
    """Return the values of all enumerators and of the numeric macros."""
    found: dict[str, float] = {}
    for body in re.findall(r"typedef\s+enum\s*\w*\s*\{(.*?)\}", source, flags=re.DOTALL):
        value = -1
        for part in body.split(","):
            match = re.match(
                r"\s*(CUDNN_\w+)(?:\s+CUDNN_DEPRECATED_ENUM)?\s*(?:=\s*(\w+))?\s*$", part
            )
            if match is None:
                continue
            name, given = match.groups()
            if given is None:
                value += 1
            elif given in found:
                value = int(found[given])
            else:
                value = int(given.rstrip("U"), 0)
            found[name] = value
    for name, given in re.findall(
        r"#define\s+(CUDNN_\w+)\s+([-\d.]+)\s*$", source, flags=re.MULTILINE
    ):
        found[name] = float(given)
    return found
