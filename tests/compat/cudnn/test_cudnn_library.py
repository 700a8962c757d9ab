"""The C API's facts, loading the library, its errors, handles, and which modules Chainer gets."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import types
import warnings

import pytest
from fake_cudnn import FakeCuDNN

FACTS = json.loads((pathlib.Path(__file__).parent / "header_facts.json").read_text())


# The C API


def test_prototypes_are_the_headers(cudnn):
    from chainer_ooc.compat.cudnn.prototypes import PROTOTYPES

    assert FACTS["functions"] == PROTOTYPES


def test_constants_are_the_headers(cudnn):
    from chainer_ooc.compat.cudnn import constants

    values = {name: v for name, v in vars(constants).items() if name.startswith("CUDNN_")}
    assert values == FACTS["constants"]


def test_every_function_is_called_in_some_test_double(cudnn):
    """The double has an implementation of every function of the table, so a new one cannot go
    untested."""
    missing = [
        name
        for name in FACTS["functions"]
        if not hasattr(cudnn.fake, "do_" + name.removeprefix("cudnn"))
    ]
    assert missing == []


def test_unknown_functions_are_refused(cudnn):
    with pytest.raises(AttributeError, match="cudnnSetLRNDescriptor is not a function"):
        _ = cudnn.library.loaded().cudnnSetLRNDescriptor


def test_public_names_are_those_that_chainer_uses(cudnn):
    import chainer

    folder = pathlib.Path(chainer.__file__).parent
    source = "\n".join(path.read_text() for path in (folder / "functions").rglob("*.py"))
    source += (folder / "backends" / "cuda.py").read_text()
    low = set(re.findall(r"\b(?:libcudnn|cuda\.cudnn)\.(\w+)", source))
    high = set(re.findall(r"(?<![.\w])(?:cuda\.cupy\.|cuda\.)?cudnn\.(\w+)", source))
    assert len(low) > 20 and len(high) > 25
    high -= {"h"}  # a file name
    both = high & low  # chainer.backends.cuda.cudnn is cupy.cudnn; cupy.cuda.cudnn is the other
    for name in (high - both) | {n for n in both if not n.startswith(("CUDNN_", "getVersion"))}:
        assert hasattr(cudnn.cupy_cudnn, name) or hasattr(cudnn.cupy_cuda_cudnn, name), name
    for name in low - high:
        assert hasattr(cudnn.cupy_cuda_cudnn, name) or hasattr(cudnn.cupy_cudnn, name), name


# Loading


def test_library_says_what_it_is(cudnn):
    library = cudnn.library.loaded()
    assert (library.version, library.cuda_version) == (92800, 12090)
    assert repr(library) == "<cuDNN 9.28.0 for CUDA 12 at the double>"
    assert cudnn.cupy_cuda_cudnn.getVersion() == 92800


@pytest.fixture
def loader(cudnn, monkeypatch, tmp_path):
    """Loading from directories, where a file's text is ``version cuda_version``."""

    def open_(path, mode=0):
        try:
            version, cuda = map(int, pathlib.Path(path).read_text().split())
        except (OSError, ValueError):
            raise OSError(f"{path}: not a library") from None
        return FakeCuDNN(version, cuda)

    monkeypatch.setattr(ctypes, "CDLL", open_)
    monkeypatch.setattr(cudnn.library.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "none"))
    for name in ("CUDNN_HOME", "CUDNN_PATH", "CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)

    def write(folder, text):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / folder / "libcudnn.so.9"
        path.write_text(text)
        return str(path)

    return types.SimpleNamespace(load=cudnn.library.load, write=write, root=tmp_path)


def test_a_path_is_taken_at_its_word(loader):
    path = loader.write("a/lib", "91000 12080")
    for given in (path, str(loader.root / "a"), str(loader.root / "a" / "lib")):
        library = loader.load(12, given)
        assert (library.path, library.version) == (path, 91000)


def test_the_wheel_comes_first(loader, cudnn, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", str(loader.root / "toolkit"))
    loader.write("toolkit/lib64", "90100 12040")
    assert loader.load(12).version == 90100
    loader.write("wheel/lib", "92800 12090")
    spec = types.SimpleNamespace(submodule_search_locations=[str(loader.root / "wheel")])
    monkeypatch.setattr(cudnn.library.importlib.util, "find_spec", lambda _name: spec)
    assert loader.load(12).version == 92800


def test_a_library_for_another_cuda_is_passed_over(loader, monkeypatch):
    monkeypatch.setenv("CUDNN_HOME", str(loader.root / "old"))
    monkeypatch.setenv("CUDA_PATH", str(loader.root / "new"))
    loader.write("old/lib", "92800 13000")
    loader.write("new/lib64", "92000 12090")
    assert loader.load(12).version == 92000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8907 12020", "is cuDNN version number 8907, not a cuDNN 9"),
        ("92800 13000", "is for CUDA 13, but CuPy uses CUDA 12"),
        ("garbage", "cannot be loaded"),
    ],
)
def test_wrong_library_is_one_line_with_the_command(loader, text, message):
    path = loader.write("a", text)
    with pytest.raises(ImportError, match=message) as info:
        loader.load(12, path)
    assert "pip install 'nvidia-cudnn-cu12>=9,<10'" in str(info.value)
    assert "\n" not in str(info.value)


def test_missing_library_is_one_line_with_the_command(loader):
    with pytest.raises(ImportError) as info:
        loader.load(13)
    assert str(info.value) == (
        "cuDNN 9 for CUDA 13: libcudnn.so.9 was not found; "
        "run: pip install 'nvidia-cudnn-cu13>=9,<10'"
    )


@pytest.mark.parametrize(
    ("folder", "message"), [("empty", "holds no"), ("absent", "does not exist")]
)
def test_bad_path_names_the_variable(loader, folder, message):
    (loader.root / "empty").mkdir()
    with pytest.raises(ImportError, match=f"CHAINER_OOC_CUDNN=.*{folder} {message}"):
        loader.load(12, str(loader.root / folder))


# Errors


def test_errors_name_function_status_and_cause(cudnn):
    with pytest.raises(cudnn.library.CuDNNError) as info:
        cudnn.library.loaded().cudnnDestroyTensorDescriptor(0x5)
    assert info.value.status == 4000 and info.value.function == "cudnnDestroyTensorDescriptor"
    assert "CUDNN_STATUS_OF_THE_DOUBLE (4000): AssertionError: Tensor at 5 does not exist" in str(
        info.value
    )
    assert not info.value.not_supported
    assert not isinstance(info.value, MemoryError)


@pytest.mark.parametrize("status", [3000, 4004])
def test_errors_survive_the_way_between_processes(cudnn, status):
    error = cudnn.library.loaded().error(status, "cudnnConvolutionForward")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert (str(other), other.status, other.function) == (str(error), status, error.function)
    assert isinstance(error, cudnn.device.OutOfMemoryError) is (status == 4004)


# Handles


def test_one_handle_per_thread_reused_after_it(cudnn):
    own = cudnn.handles.get_handle()
    assert cudnn.handles.get_handle() == own

    def other():
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cudnn.handles.get_handle()))
        thread.start()
        thread.join()
        gc.collect()
        return seen[0]

    first = other()
    assert first != own
    assert other() == first, "a handle of a thread that ended is used again"


def test_handles_belong_to_devices(cudnn, monkeypatch):
    own = cudnn.handles.get_handle()
    monkeypatch.setattr(cudnn.device, "current_device", lambda: 1)
    assert cudnn.handles.get_handle() != own


def test_memory_is_made_for_a_handle(cudnn, monkeypatch):
    import fake_cupy

    from_pool, attempts = fake_cupy.memory.freed_cache, []
    create = FakeCuDNN.do_Create

    def stubborn(self, handle):
        attempts.append(fake_cupy.memory.freed_cache - from_pool)
        assert attempts[-1], "no memory"
        create(self, handle)

    monkeypatch.setattr(FakeCuDNN, "do_Create", stubborn)
    monkeypatch.setattr(cudnn.device, "current_device", lambda: 2)
    assert cudnn.handles.get_handle()
    assert attempts == [0, 1]


# Which modules Chainer gets


@pytest.fixture
def choice(monkeypatch):
    from chainer_ooc.compat.cudnn import choice

    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "native_usable", lambda: True)
    monkeypatch.setattr(choice, "_said", set())
    return choice


CHOICES = {
    # setting: with native modules that load, that do not, without native modules
    None: (False, True, True),
    "auto": (False, True, True),
    "native": (False, False, False),
    "own": (True, True, True),
    "/some/where": (True, True, True),
}


@pytest.mark.parametrize(("value", "expected"), CHOICES.items())
def test_choice(choice, monkeypatch, value, expected):
    if value is not None:
        monkeypatch.setenv(choice.VARIABLE, value)
    loads = choice.stands_in(native=True)
    monkeypatch.setattr(choice, "native_usable", lambda: False)
    assert (loads, choice.stands_in(native=True), choice.stands_in(native=False)) == expected
    assert choice.library_path() == (value if value == "/some/where" else None)


def test_off_is_an_import_error(choice, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "off")
    with pytest.raises(ImportError, match="switched off by CHAINER_OOC_CUDNN=off"):
        choice.stands_in(native=False)


def test_unknown_word_is_told_aloud(choice, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "offf")
    with (
        pytest.raises(
            ImportError, match=r"'offf' is not understood: use one of auto, native, own, off"
        ),
        pytest.warns(RuntimeWarning, match="'offf'"),
    ):
        choice.stands_in(native=False)


def test_nothing_is_loaded_before_it_is_asked_for():
    """The package and the choice import neither CuPy nor a library: every interpreter start pays
    for them."""
    code = (
        "import sys, chainer_ooc.compat.cudnn.choice\n"
        "print([m for m in sys.modules if m.startswith('cupy') or m.endswith('cudnn.library')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_module_without_a_library_warns_once_and_fails(cudnn, monkeypatch):
    def absent():
        raise cudnn.library.LibraryNotFoundError("cuDNN 9 for CUDA 12: run: pip install it")

    monkeypatch.setattr(cudnn.library, "loaded", absent)
    monkeypatch.delitem(sys.modules, "chainer_ooc.compat.cudnn.cupy_cuda_cudnn")
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(ImportError, match="pip install it"),
    ):
        warnings.simplefilter("always")
        importlib.import_module("chainer_ooc.compat.cudnn.cupy_cuda_cudnn")
    assert [str(w.message) for w in caught] == [
        "Chainer runs without cuDNN, many times slower: cuDNN 9 for CUDA 12: run: pip install it"
    ]


LEFT_OUT = {
    # What is set: what is printed; nothing where it was wanted or there is nothing to say.
    "CHAINER_OOC_CUDNN=/absent/libcudnn.so.9": (
        r"/absent/libcudnn\.so\.9 does not exist; .*pip install 'nvidia-cudnn-cu1[23]>=9,<10'"
    ),
    "CHAINER_OOC_CUDNN=offf": "CHAINER_OOC_CUDNN='offf' is not understood: use one of auto, native",
    "CHAINER_OOC_CUDNN_MATH=bf16": "CHAINER_OOC_CUDNN_MATH='bf16' is not understood: use 'fp32'",
    "CHAINER_OOC_CUDNN_WORKSPACE=8M": "CHAINER_OOC_CUDNN_WORKSPACE='8M' is not understood: give",
    "CHAINER_OOC_CUDNN=off": None,
    "CHAINER_CUDNN=0": None,
}


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
@pytest.mark.parametrize(("given", "expected"), LEFT_OUT.items(), ids=list(LEFT_OUT))
def test_what_the_user_sees_when_cudnn_is_left_out(run_python, given, expected):
    """One line in all: Chainer's own advice, to reinstall CuPy, would lead astray."""
    variable, _, value = given.partition("=")
    code = (
        "import chainer_ooc, chainer\n"
        "print(chainer.backends.cuda.available, chainer.backends.cuda.cudnn_enabled)\n"
        "chainer.backends.cuda.check_cuda_available()"
    )
    environment = {"CHAINER_OOC_CUDNN": "own", variable: value}
    done = run_python("-W", "default", "-c", code, env=environment)
    if done.stdout.startswith("False"):
        pytest.skip("needs CUDA's libraries")
    assert done.stdout == "True False\n"
    lines = done.stderr.splitlines()
    if expected is None:
        assert lines == []
    else:
        assert len(lines) == 1
        assert re.match(
            "<chainer_ooc>:1: RuntimeWarning: Chainer runs without cuDNN, .*" + expected, lines[0]
        )


def test_module_without_a_gpu_fails_in_silence(cudnn, monkeypatch):
    monkeypatch.delenv("CHAINER_OOC_CUDNN", raising=False)
    monkeypatch.setattr(cudnn.device, "available", lambda: False)
    monkeypatch.delitem(sys.modules, "chainer_ooc.compat.cudnn.cupy_cuda_cudnn")
    with warnings.catch_warnings(), pytest.raises(ImportError, match="there is no CUDA device"):
        warnings.simplefilter("error")
        importlib.import_module("chainer_ooc.compat.cudnn.cupy_cuda_cudnn")
