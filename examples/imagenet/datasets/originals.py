"""Files as their authors publish them: finding them, and reading them without trusting them."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from errors import InputError
from files import read_arrays


class Expected(NamedTuple):
    """A file that a data set needs.

    Attributes:
        name: Path below the data root.
        md5: Checksum that its authors or the large frameworks publish; empty if there is none.
    """

    name: str
    md5: str


def missing(what: str, root: Path, forms: Sequence[tuple[str, Sequence[Expected]]]) -> InputError:
    """Returns the error for a data set that is not there.

    Args:
        what: The data set.
        root: Where it was looked for.
        forms: For each accepted form what it is called, with a place to get it, and its files.
    """
    lines = []
    gap = "is not there"
    for form, files in forms:
        single = [f.name.removesuffix(".gz") for f in files if not f.name.endswith(".tar.gz")]
        absent = [name for name in single if find(root, name) is None]
        if 0 < len(absent) < len(single):
            gap = f"is not all there, {', '.join(absent)} is missing"
        names = "; ".join(f"{f.name}" + (f" (md5 {f.md5})" if f.md5 else "") for f in files)
        lines.append(f"{form}: {names}")
    return InputError(
        f"--data-root {root}: {what} {gap}; nothing is downloaded, so put the files of one "
        f"of these forms there: " + " | ".join(lines)
    )


Warn = Callable[[str], None]


def compare_checksums(files: Sequence[tuple[Path, Expected]], warn: Warn | None) -> None:
    """Warns, in one line, of files that are not the published ones, which are used all the same.

    Files without a published checksum, or compressed otherwise than published, are not compared.

    Args:
        files: Files that are there, and what was published.
        warn: Takes the warning; None: nothing is compared.

    Raises:
        InputError: A file cannot be read.
    """
    if warn is None:
        return
    wrong = []
    for path, expected in files:
        if expected.md5 and path.name == Path(expected.name).name:
            try:
                with open(path, "rb") as f:
                    md5 = hashlib.file_digest(f, "md5").hexdigest()
            except OSError as e:
                raise broken(path, e) from e
            if md5 != expected.md5:
                wrong.append(f"{path} (md5 {md5}, published {expected.md5})")
    if wrong:
        warn(f"not as published, and used as they are; get them again unless you changed them on "
             f"purpose: {'; '.join(wrong)}")  # fmt: skip


def find(root: Path, name: str) -> Path | None:
    """Returns the file ``name`` or its compressed form ``name.gz`` below ``root``, if there."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read(path: Path) -> bytes:
    """Returns the contents of a file, uncompressed if its name ends in ``.gz``.

    Raises:
        InputError: It cannot be read or is truncated.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as e:
        raise broken(path, e) from e


def broken(path: Path | str, why: object) -> InputError:
    """Returns the error for a file that is there but cannot be used."""
    reason = " ".join(str(why).split()) or type(why).__name__
    return InputError(f"{path}: damaged or not what its name says ({reason}); get it again")


def read_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Returns members of a .tar.gz, without unpacking it to the disk.

    Raises:
        InputError: It cannot be read, or a member is missing.
    """
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in names and member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as e:
        raise broken(path, e) from e
    absent = [name for name in names if name not in found]
    if absent:
        raise broken(path, f"it does not contain {absent[0]}")
    return found


class _Dtype:
    """Stands for ``numpy.dtype`` in a pickle: only numbers of one value."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch("[biuf][1248]", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, which no data needs")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands for an array in a pickle: NumPy's own would believe any address that it is told."""

    def __init__(self, *_: Any) -> None:
        self.value = numpy.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else bytes(data)
        values = numpy.frombuffer(data, numpy.dtype(dtype.order + dtype.code))
        self.value = values.reshape(shape, order="F" if fortran else "C")


def _from_buffer(buffer: Any, dtype: _Dtype, shape: Any, order: str, axes: Any = None) -> _Array:
    """Stands for what NumPy writes in pickles of protocol 5; from NumPy 2.5 on also with an order of axes."""
    if axes is not None:
        raise pickle.UnpicklingError(
            "an array whose axes are in another order, which no data needs"
        )
    array = _Array()
    array.__setstate__((None, shape, dtype, order == "F", buffer))
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Makes what stands for arrays, and Python's own plain types; all else in a pickle is refused."""

    ALLOWED = {  # noqa: RUF012  a constant
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for one of the few names that arrays consist of."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data needs")
        return self.ALLOWED[module, name]


def unpickle(data: bytes, path: Path | str) -> dict[str, Any]:
    """Returns the dictionary in a pickle of Python 2, without running anything that it contains.

    Raises:
        InputError: It is damaged, no dictionary, or asks for more than arrays of numbers.
    """
    try:
        value = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as e:  # a damaged pickle can raise anything
        raise broken(path, e) from e
    if not isinstance(value, dict):
        raise broken(path, "it is not a dictionary")
    return {key: v.value if isinstance(v, _Array) else v for key, v in value.items()}


def read_npz(path: Path, channels_first: bool) -> dict[str, numpy.ndarray]:
    """Returns the arrays x_train, y_train, x_test and y_test of an .npz file.

    Args:
        path: The file.
        channels_first: Whether images of shape (n, 3, height, width) become (n, height, width, 3).

    Raises:
        InputError: It is damaged, or one is missing.
    """
    arrays = read_arrays(path, ("x_train", "y_train", "x_test", "y_test"))
    for key in ("x_train", "x_test"):
        x = arrays[key]
        if channels_first and x.ndim == 4 and x.shape[1] == 3 and x.shape[3] != 3:
            arrays[key] = numpy.ascontiguousarray(x.transpose(0, 2, 3, 1))
    for key in ("y_train", "y_test"):
        arrays[key] = arrays[key].reshape(-1)
    return arrays
