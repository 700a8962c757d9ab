#!/usr/bin/env python
"""Writes the images of a list, or of a folder of class folders, into an LMDB database.

    python examples/imagenet/tools/make_lmdb.py train.txt -R images -o train.lmdb

The values are the files as they are, under their paths (--format images, default), or Caffe's
Datum with the encoded file (--format datum). OUTPUT is one file, with an index of keys and labels
beside it (OUTPUT.json). A folder that lacks some of the classes needs --classes. An interrupted run
continues; OUTPUT appears when it is whole. The database grows as needed: no size has to be known in
advance.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import datum
from datasets.decoding import DAMAGE, damaged, encoded_size, read_bytes
from datasets.folders import read_folders
from datasets.labeled import Pair, read_lines, read_list
from datasets.lmdb_index import DATUM, RAW, Index, index_path, read_index
from errors import InputError, is_utf8
from files import write_text
from parallel import in_parallel

from tools.common import Parser, print_table, progress, run

FORMATS = {"images": RAW, "datum": DATUM}
FIRST_MAP_SIZE = 64 << 20
"""Bytes of address space that a new database gets; it doubles when it is full."""
CHUNK_BYTES = 32 << 20
"""A transaction is committed when it has so many bytes, or so many images."""
CHUNK_IMAGES = 1024
MAX_KEY = 511
"""Bytes of a key that LMDB allows."""

Sample = tuple[str, str, int]
"""Key, path relative to the root, label."""


def read_samples(args: Namespace) -> tuple[list[Sample], list[str], bool, Path]:
    """Returns what to write, the names of the classes, whether they are numbers, and the root."""
    names = read_lines(args.classes) if args.classes else None
    if args.source.is_dir():
        pairs, classes = read_folders(args.source, names)
        root = args.source
    else:
        pairs, root = read_list(args.source), args.root
        n = max(label for _, label in pairs) + 1
        classes = names or [str(i) for i in range(n)]
        if len(classes) < n:
            raise InputError(f"--classes {args.classes}: {len(classes)} names for {n}")
    numbered = not args.source.is_dir() and names is None
    return _keys(pairs, args.format), classes, numbered, root


def _keys(pairs: list[Pair], file_format: str) -> list[Sample]:
    samples = []
    seen = set()
    for i, (path, label) in enumerate(pairs):
        key = path if file_format == "images" else f"{i:08d}_{path}"
        if key in seen:
            raise InputError(f"{path} is in the list twice; check.py shows where")
        if not is_utf8(key):
            raise InputError(f"{path}: the name is not UTF-8, as keys are; rename the file")
        if len(key.encode()) > MAX_KEY:
            raise InputError(
                f"{path}: the path is longer than {MAX_KEY} bytes; LMDB allows no more"
            )
        seen.add(key)
        samples.append((key, path, label))
    return samples


def _chunks(results: Iterator[tuple[Sample, Any]], bad: list[tuple[str, str]]) -> Iterator[Any]:
    """Yields lists of keys and values."""
    chunk: list[tuple[bytes, bytes]] = []
    for (key, path, _), value in results:
        if isinstance(value, InputError):
            bad.append((path, str(value).split(": ", 1)[-1]))
            continue
        chunk.append((key.encode(), value))
        if len(chunk) >= CHUNK_IMAGES or sum(len(v) for _, v in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def make_own_folder(folder: Path) -> None:
    """Makes a folder, unless this user has made it before.

    Its name has to be known when an interrupted run continues, so others could have put something there.

    Raises:
        InputError: It cannot be made, or what is there is no folder of this user.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        return
    except OSError as e:
        if not os.path.lexists(folder):
            raise InputError(
                f"{folder}: cannot be made ({e.strerror}); choose another output"
            ) from e
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise InputError(
            f"{folder}: is there, and is no folder of yours; remove it, or choose another output"
        )


def put(env: Any, chunk: list[tuple[bytes, bytes]]) -> None:
    """Writes a chunk in one transaction; makes room first if the map is full."""
    import lmdb

    while True:
        try:
            with env.begin(write=True) as txn:
                for key, value in chunk:
                    txn.put(key, value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def make_lmdb(args: Namespace) -> int:
    """Writes a database; returns the exit status."""
    try:
        import lmdb
    except ImportError as e:
        raise InputError("needs the package lmdb; run `pip install lmdb`") from e
    samples, classes, numbered, root = read_samples(args)
    keys = [(key, label) for key, _, label in samples]
    index = Index(kind=FORMATS[args.format], classes=classes, samples=keys, numbered=numbered)
    text = index.model_dump_json(include={"kind", "classes", "samples"})
    output: Path = args.output
    if output.exists():
        there = read_index(output)
        if there and there.model_dump_json(include={"kind", "classes", "samples"}) == text:
            print(f"{output}: {len(samples)} images are there already")
            return 0
        raise InputError(
            f"--output {output}: is there with other images; remove it or choose another"
        )
    partial = output.with_name(output.name + ".partial")
    begun = partial / "begun.json"
    digest = json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest()})
    data = partial / "data.mdb"
    make_own_folder(partial)
    if not data.exists():
        write_text(begun, digest)
    elif not begun.is_file() or begun.read_text() != digest:
        raise InputError(f"{partial}: was begun with other images; remove it")

    def value(sample: Sample) -> bytes:
        _, path, label = sample
        data = read_bytes(root / path)
        try:
            encoded_size(data)
        except DAMAGE as e:
            raise damaged(str(root / path), e) from e
        return data if args.format == "images" else datum.serialize(data, label)

    bad: list[tuple[str, str]] = []
    env = None
    try:
        # the map cannot be smaller than what is in it already
        size = max(FIRST_MAP_SIZE, 2 * data.stat().st_size if data.exists() else 0)
        env = lmdb.open(str(partial), map_size=size)
        with env.begin() as txn:
            done = {bytes(key) for key in txn.cursor().iternext(values=False)}
        todo = [sample for sample in samples if sample[0].encode() not in done]
        shown = progress(total=len(samples), initial=len(samples) - len(todo), unit="image")
        for chunk in _chunks(in_parallel(value, todo, args.workers), bad):
            put(env, chunk)
            shown.update(len(chunk))
        shown.close()
    except (lmdb.Error, OSError) as e:
        raise InputError(
            f"{partial}: cannot be written ({e}); free space, or remove it if it is damaged, and run "
            f"the same command again"
        ) from e
    finally:
        if env is not None:
            env.close()
    if bad:
        print_table(("image", "problem"), bad)
        raise InputError(
            f"{len(bad)} of {len(samples)} images cannot be used (above); repair them and run the "
            f"same command again: it continues"
        )
    index.note(data)
    write_text(index_path(output), index.model_dump_json())
    data.rename(output)
    shutil.rmtree(partial)
    print(
        f"{output}: {len(samples)} images of {len(classes)} classes, {output.stat().st_size} bytes"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("source", type=Path, help="list file, or folder with a folder for each class")
    add("--output", "-o", type=Path, required=True, metavar="FILE", help="the database to write")
    add("--root", "-R", type=Path, default=Path("."), metavar="DIR",
        help="folder of the paths in the list (default: here)")
    add("--format", choices=tuple(FORMATS), default="images", help="what the values are")
    add("--classes", type=Path, metavar="FILE",
        help="names of the classes, from make_list.py; they also number those of folders")
    # fmt: on
    parser.add_workers()
    args = parser.parse_args(argv)
    return run(lambda: make_lmdb(args))


if __name__ == "__main__":
    sys.exit(main())
