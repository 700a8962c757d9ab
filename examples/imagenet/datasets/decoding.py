"""From the bytes of an image file to RGB pixels, fast for JPEG and right for all the rest.

JPEG in colour or grey is decoded by simplejpeg (libjpeg-turbo straight into an array), everything
else, and everything where simplejpeg is not installed, by Pillow; both give the same pixels. What
a camera or an editor may have put into the file is undone: EXIF orientation, CMYK, palettes,
16 bits per sample, transparency (shown on white). Of an animation the first frame is taken.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy
from errors import InputError
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Size = tuple[int, int]
"""Width and height in pixels, in Pillow's order."""

Need = Callable[[int, int], Size | None]
"""Takes the width and height of an image; returns a width and height that suffice, None: all.

A larger JPEG may then come out smaller, by a factor of up to 8, but not smaller than that: its
frequencies are decoded only as far as needed, which is several times faster.
"""

# Pillow reports damaged data by OSError and SyntaxError, and broken headers by the others too.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError,
          Image.DecompressionBombError)  # fmt: skip


def read_bytes(path: str | Path) -> bytes:
    """Returns the contents of an image file.

    Raises:
        InputError: The file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as e:
        raise InputError(f"image {path}: no such file; correct the list file or --root/-R") from e
    except (OSError, ValueError) as e:
        raise InputError(
            f"image {path}: cannot be read ({getattr(e, 'strerror', None) or e}); "
            f"correct the list file or the file's permissions"
        ) from e


def damaged(name: str, error: Exception | str) -> InputError:
    """Returns the error for an image that cannot be decoded."""
    reason = " ".join(str(error).split())
    # Where Pillow names the file, it only says that this is not an image.
    unknown = reason.startswith("cannot identify image file")
    why = "not an image in a format that Pillow reads" if unknown or not reason else reason
    return InputError(
        f"image {name}: cannot be decoded ({why}); replace it or remove it from the list"
    )


def decode(data: bytes, name: str, need: Need | None = None) -> numpy.ndarray:
    """Decodes an image.

    Args:
        data: The bytes of the file.
        name: What errors call the image.
        need: Says how many pixels suffice; None: all.

    Returns:
        uint8 RGB, C-contiguous, (height, width, 3), upright.

    Raises:
        InputError: Not an image, truncated or otherwise damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                return _decode_jpeg(data, image, need)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except DAMAGE as e:
        raise damaged(name, e) from e


def read_image(path: str | Path, need: Need | None = None) -> numpy.ndarray:
    """Reads and decodes an image file; see ``decode``.

    Raises:
        InputError: The file is missing, not an image, truncated or otherwise damaged.
    """
    return decode(read_bytes(path), str(path), need)


def encoded_size(data: bytes | memoryview) -> Size:
    """Returns the width and height of an image, upright, from the header of its file's bytes.

    Raises:
        OSError, SyntaxError, ValueError: Not an image.
    """
    with Image.open(io.BytesIO(data)) as image:
        return _upright_size(image)


def image_size(path: str | Path) -> Size:
    """Returns the width and height of an image, upright, from the header of its file.

    Raises:
        InputError: The file is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except FileNotFoundError as e:
        raise InputError(f"image {path}: no such file; correct the list file or --root/-R") from e
    except DAMAGE as e:
        raise damaged(str(path), e) from e


def _upright_size(image: Image.Image) -> Size:
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Newer versions of Pillow turn this size already, older ones do not.
        width, height = (
            image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)
        )
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    if image.format in ("JPEG", "MPO") and "exif" not in image.info:
        return 1  # most images: nothing to parse
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _decode_jpeg(data: bytes, image: Image.Image, need: Need | None) -> numpy.ndarray:
    orientation = _orientation(image)
    turned = -1 if orientation >= 5 else 1
    at_least = need(*image.size[::turned]) if need is not None else None
    width, height = at_least[::turned] if at_least is not None else (0, 0)
    if simplejpeg is not None:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height)
    else:
        if at_least is not None:
            image.draft(None, (width, height))
        pixels = numpy.asarray(image.convert("RGB"))
    return upright(pixels, orientation)


def upright(pixels: numpy.ndarray, orientation: int) -> numpy.ndarray:
    """Undoes an EXIF orientation (1 to 8; anything else counts as 1), contiguous."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return numpy.ascontiguousarray(pixels)


def _rgb(image: Image.Image) -> numpy.ndarray:
    mode = image.mode
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if mode == "I" or mode.startswith("I;16"):
        # Pillow's own conversion would clip everything above 255.
        samples = numpy.asarray(image).astype(numpy.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        grey = ((samples + 128) // 257).astype(numpy.uint8)
        return numpy.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = numpy.asarray(image.convert("RGBA")).astype(numpy.uint16)
        alpha = rgba[:, :, 3:]
        on_white = (rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
        return on_white.astype(numpy.uint8)
    return numpy.array(image.convert("RGB"))
