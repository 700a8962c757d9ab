"""The C API that is called, compared with cuDNN's own headers, where they are."""

from __future__ import annotations

import ctypes
from unittest import mock

import cudnn_headers
import pytest

from chainer_ooc.compat.cudnn import constants, library, prototypes

pytestmark = pytest.mark.skipif(bool(cudnn_headers.missing()), reason=cudnn_headers.missing())


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    return cudnn_headers.read(tmp_path_factory.mktemp("headers"))


def test_what_was_compared(headers, capsys):
    """Say of which version, and how much: with -s, or without capturing, for docs/cuda.md."""
    values = [name for name in vars(constants) if name.startswith("CUDNN_")]
    told = f"{len(prototypes.PROTOTYPES)} functions, {len(values)} constants, 3 structs"
    with capsys.disabled():
        print(f"\ncuDNN {headers.version} has {len(headers.functions)} functions; compared: {told}")
    assert headers.version.startswith("9.")


def test_prototypes(headers):
    ours = prototypes.PROTOTYPES
    assert {name: headers.functions.get(name) for name in ours} == ours
    assert {headers.results[name] for name in ours} == {"cudnnStatus_t"}


def test_constants(headers):
    ours = {name: value for name, value in vars(constants).items() if name.startswith("CUDNN_")}
    assert {name: headers.constants.get(name) for name in ours} == ours


@pytest.mark.parametrize("way", ["Fwd", "BwdData", "BwdFilter"])
def test_structs(headers, way):
    # ctypes has one type for size_t and for unsigned long long.
    kinds = {ctype: kind for kind, ctype in reversed(prototypes.CTYPES.items())}
    kinds[ctypes.c_int * 3] = "int[3]"
    ours = [f"{name}:{kinds[ctype]}" for name, ctype in prototypes.AlgorithmPerformance._fields_]
    assert headers.structs[f"cudnnConvolution{way}AlgoPerf_t"] == ours


class Library:
    """Stands for the library: keeps what is declared of the functions that are called."""

    def __getattr__(self, name):
        function = mock.Mock(return_value=b"")
        setattr(self, name, function)
        return function


def test_functions_that_return_no_status(headers):
    dll = Library()
    library.Library(dll, "").error(1, "cudnnCreate")
    kinds = {ctypes.c_size_t: "size", ctypes.c_char_p: "ptr", ctypes.c_int: "int", None: "void"}
    declared = {
        name: [kinds[one] for one in (function.restype, *function.argtypes)]
        for name, function in vars(dll).items()
    }
    assert len(declared) == 4
    for name, ours in declared.items():
        parameters = [one.partition(":")[2] for one in headers.functions[name].split()]
        assert [headers.results[name], *parameters] == ours
