"""Writes the functions of the double of cuDNN that check what they are given and do nothing else.

Their parameters are those of cuDNN's headers, as ``tests/compat/cudnn/header_facts.json`` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["functions"]

_FACTS = Path(__file__).parents[2] / "compat" / "cudnn" / "header_facts.json"
_TYPES = {
    "ptr": "void *",
    "int": "int ",
    "uint": "unsigned ",
    "size": "size_t ",
    "ull": "unsigned long long ",
    "float": "float ",
    "double": "double ",
}
#: Pointers to the host's memory.
_ON_HOST = re.compile(
    r"(alpha|beta)\w*|dimA|filterDimA|strideA|padA|filterStrideA|dilationA|windowDimA|paddingA|"
    r"returnedAlgoCount|perfResults|seqLengthArray|paddingFill|rstatus|tag"
)
_OUTPUT_SIZE = re.compile(r"sizeInBytes|weightSpaceSize|workSpaceSize|reserveSpaceSize")
_MAY_BE_NULL = {"zDesc", "dzDesc", "hDesc", "cDesc", "mDesc", "bDesc", "activationDesc"}
#: Of sizes that are asked for, but convolutions' workspace.
_SIZE = 1 << 16


def functions(written: str) -> str:
    """Return C code of all functions but those that ``written``, the rest of the double, has."""
    table = json.loads(_FACTS.read_text())["functions"]
    there = set(re.findall(r"\b(cudnn\w+)\(", written))
    parts = ['#include "cudnn.h"']
    for name, row in table.items():
        if name not in there:
            parameters = [tuple(one.split(":")) for one in row.split()]
            signature = ", ".join(_TYPES[kind] + parameter for parameter, kind in parameters)
            body = "\n    ".join(_body(name, parameters))
            parts.append(f"int {name}({signature})\n{{\n    ENTER;\n    {body}\n}}")
    return "\n".join(parts)


def _body(name: str, parameters: list[tuple[str, str]]) -> Iterator[str]:
    first = parameters[0][0]
    if name.startswith("cudnnCreate"):
        yield f"*(void **){first} = new_descriptor();"
        yield "return OK;"
        return
    if name == "cudnnGetRNNWeightParams":
        yield f'return double_unsupported("{name}", UNSUPPORTED);'
        return
    for index, (parameter, kind) in enumerate(parameters):
        if kind != "ptr" or _ON_HOST.fullmatch(parameter):
            continue
        before = parameters[index - 1][0] if index else ""
        after = parameters[index + 1] if index + 1 < len(parameters) else ("", "")
        if parameter == "handle" or parameter.lower().endswith("desc"):
            may = parameter in _MAY_BE_NULL or (parameter == "yDesc" and "BackwardEx" in name)
            null = "true" if may else "false"
            check = f'is_descriptor(__func__, "{parameter}", {parameter}, {null})'
        elif _OUTPUT_SIZE.fullmatch(parameter):
            size = "workspace_of(algo)" if "algo:int" in map(":".join, parameters) else str(_SIZE)
            yield f"*(size_t *){parameter} = {size};"
            continue
        else:
            size = "1"
            if before.lower().endswith("desc") and "RNN" not in name:
                size = f"size_of({before})"
            elif after[1] == "size":
                size = after[0]
            check = f'is_data(__func__, "{parameter}", {parameter}, {size})'
        yield f"if (!{check}) return BAD_PARAMETER;"
    if name.startswith("cudnnDestroy"):
        yield f"((struct object *){first})->destroyed = true;"
    if "perfResults:ptr" in map(":".join, parameters):
        yield "offer_algorithms(requestedAlgoCount, returnedAlgoCount, perfResults);"
    yield "return OK;"
