"""Making another folder of images from one: the common part of crop.py and enlarge.py."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from datasets.folders import find_images
from datasets.labeled import read_list
from errors import InputError
from files import write_text
from parallel import in_parallel
from PIL import Image

from tools.common import (
    Parser,
    integer,
    make_folder,
    partial_folder,
    print_table,
    progress,
    require_folder,
)

SETTINGS = ".settings.json"
"""File of the output folder that says how its images were made."""

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif")
KEPT_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
FORMATS = {"jpg": ".jpg", "png": ".png"}


def add_arguments(parser: Parser) -> None:
    """Adds the arguments that ``convert`` uses."""
    add = parser.add_argument
    # fmt: off
    add("source", type=Path, help="folder of the images")
    add("output", type=Path, help="folder to write; it gets the same folders and names")
    add("--list", "-l", type=Path, action="append", default=[], metavar="FILE",
        help="only the images of this list file, which is written to OUTPUT, too; may be repeated")
    add("--format", choices=("keep", *FORMATS), default="keep",
        help="keep (default): formats that hold full colour stay what they are, others become PNG")
    add("--quality", type=integer(1), default=95, metavar="N", help="of JPEG, 1 to 100 (default 95)")
    # fmt: on
    parser.add_workers()


def convert(
    args: Namespace, settings: dict[str, Any], change: Callable[[Path], numpy.ndarray]
) -> int:
    """Writes what ``change`` makes of each image; what is there already and not older stays.

    Args:
        args: The arguments of ``add_arguments``.
        settings: What else the pixels depend on: a folder made with others is refused.
        change: Takes a path, returns uint8 (height, width, 3).

    Returns:
        Exit status: 1 if some images could not be used.

    Raises:
        InputError: Nothing can be done at all.
    """
    source = require_folder(args.source, "source")
    if args.quality > 100:
        raise InputError(f"--quality {args.quality}: allowed are 1 to 100")
    names = _names(args, source)
    targets = _targets(names, args.format)
    if args.output.resolve() == source.resolve():
        raise InputError(f"output {args.output}: is the source; choose another folder")
    output = make_folder(args.output, "output")
    _check_settings(output, {**settings, "format": args.format, "quality": args.quality})
    full_disk = threading.Event()
    numbers = itertools.count()

    def one(name: Path) -> bool:
        old, new = source / name, output / targets[name]
        try:
            if new.stat().st_mtime_ns >= old.stat().st_mtime_ns:
                return False
        except OSError:
            pass  # not there yet, or the source is missing, which `change` reports
        if full_disk.is_set():
            raise InputError("not done: no space left")
        pixels = change(old)
        new.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_files / f"{next(numbers)}{new.suffix}"
        try:
            _save(pixels, partial, args.quality)
            partial.replace(new)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                full_disk.set()
            raise InputError(f"{new}: cannot be written ({e.strerror or e})") from e
        finally:
            partial.unlink(missing_ok=True)
        return True

    bad: list[tuple[str, str]] = []
    written = 0
    with partial_folder(output) as partial_files:
        done = in_parallel(one, names, args.workers)
        for name, result in progress(done, total=len(names), unit="image"):
            if isinstance(result, InputError):
                bad.append((str(name), str(result)))
            else:
                written += result
            if full_disk.is_set():
                raise InputError(f"output {output}: no space left; free some, and run the same "
                                 f"command again: it continues")  # fmt: skip
    _write_lists(args.list, targets, output)
    kept = len(names) - written - len(bad)
    print(f"{output}: {written} images written, {kept} were there already, {len(bad)} failed")
    if bad:
        print_table(("image", "problem"), [(n, p.split(": ", 1)[-1]) for n, p in bad])
    return 1 if bad else 0


def _names(args: Namespace, source: Path) -> list[Path]:
    if args.list:
        names = [Path(name) for path in args.list for name, _ in read_list(path)]
        outside = next((n for n in names if n.is_absolute() or ".." in n.parts), None)
        if outside is not None:
            raise InputError(f"--list: {outside} is not below {source}; use relative paths")
        return list(dict.fromkeys(names))
    names = list(find_images(source))
    if not names:
        raise InputError(f"source {source}: there are no images in it; give their folder")
    return names


def _targets(names: list[Path], file_format: str) -> dict[Path, Path]:
    """Returns the new name of each image."""
    targets: dict[Path, Path] = {}
    origin: dict[Path, Path] = {}
    for name in names:
        suffix = name.suffix.lower()
        if file_format == "keep":
            new = name if suffix in KEPT_SUFFIXES else name.with_suffix(".png")
        elif file_format == "jpg" and suffix in JPEG_SUFFIXES:
            new = name
        else:
            new = name.with_suffix(FORMATS[file_format])
        if new in origin:
            raise InputError(
                f"source: {origin[new]} and {name} would both become {new}; rename one of them"
            )
        origin[new] = name
        targets[name] = new
    return targets


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / SETTINGS
    wanted = json.loads(json.dumps(settings))
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        write_text(path, json.dumps(settings) + "\n")
        return
    except (OSError, ValueError):
        found = "something unreadable"
    if found != wanted:
        raise InputError(
            f"output {output}: was made with {json.dumps(found)}, not {json.dumps(wanted)}; "
            f"choose another folder, or remove this one"
        )


def _save(pixels: numpy.ndarray, path: Path, quality: int) -> None:
    image = Image.fromarray(pixels)
    suffix = path.suffix.lower()
    if suffix in JPEG_SUFFIXES:
        image.save(path, "JPEG", quality=quality)
    elif suffix == ".webp":
        image.save(path, "WEBP", lossless=True)
    else:
        image.save(path)


def _write_lists(lists: list[Path], targets: dict[Path, Path], output: Path) -> None:
    for path in lists:
        lines = [f"{targets[Path(name)]} {label}\n" for name, label in read_list(path)]
        if os.path.exists(output / path.name) and os.path.samefile(path, output / path.name):
            continue
        write_text(output / path.name, "".join(lines))
