"""Caffe's Datum: an image and its label as a protocol buffer.

Fields: channels 1, height 2, width 3, data 4 (bytes), label 5, float_data 6, encoded 7.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy

from datasets.decoding import Need, Size, decode, encoded_size

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Datum(NamedTuple):
    """A parsed Datum.

    Attributes:
        channels: 1 or 3.
        height: In pixels.
        width: In pixels.
        data: Planes of unsigned bytes, blue, green, red; or an encoded image.
        label: The class.
        encoded: Whether ``data`` is an image file.
    """

    channels: int
    height: int
    width: int
    data: memoryview
    label: int
    encoded: bool

    def size(self) -> Size:
        """Returns width and height; ValueError if the data do not have them."""
        if self.encoded:
            return encoded_size(self.data)
        if self.channels not in (1, 3) or self.channels * self.height * self.width != len(
            self.data
        ):
            raise ValueError(
                f"{len(self.data)} bytes are not {self.channels} channels of "
                f"{self.width}x{self.height}"
            )
        return self.width, self.height

    def image(self, name: str, need: Need | None = None) -> numpy.ndarray:
        """Returns uint8 RGB, (height, width, 3); ValueError or InputError if it cannot be."""
        if self.encoded:
            return decode(bytes(self.data), name, need)
        self.size()
        planes = numpy.frombuffer(self.data, numpy.uint8)
        planes = planes.reshape(self.channels, self.height, self.width)
        if self.channels == 1:
            return planes[0][:, :, None].repeat(3, axis=2)
        return numpy.ascontiguousarray(planes[::-1].transpose(1, 2, 0))


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
        shift += 7
    raise ValueError("not a Datum: a number does not end")


def parse(value: memoryview) -> Datum:
    """Parses a Datum; the image stays where it is.

    Raises:
        ValueError: It is not one.
    """
    numbers = {1: 0, 2: 0, 3: 0, 5: 0, 7: 0}
    image = memoryview(b"")
    at = 0
    try:
        while at < len(value):
            key, at = _varint(value, at)
            field, kind = key >> 3, key & 7
            if kind == _VARINT:
                number, at = _varint(value, at)
                if field in numbers:
                    numbers[field] = number
            elif kind == _BYTES:
                length, at = _varint(value, at)
                if at + length > len(value):
                    raise ValueError("not a Datum: it is truncated")
                if field == 4:
                    image = value[at : at + length]
                at += length
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                raise ValueError("not a Datum: unknown type of a field")
    except IndexError as e:
        raise ValueError("not a Datum: it is truncated") from e
    if not image:
        raise ValueError("not a Datum with bytes: it has no image (float_data is not read)")
    label = numbers[5] - (1 << 64 if numbers[5] >> 63 else 0)
    return Datum(numbers[1], numbers[2], numbers[3], image, label, bool(numbers[7]))


def serialize(data: bytes, label: int, shape: tuple[int, int, int] | None = None) -> bytes:
    """Returns a Datum.

    Args:
        data: An image file, or planes of bytes, blue, green, red.
        label: The class, from 0.
        shape: Channels, height and width of planes; None: an image file.
    """

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    out = b""
    for field, number in zip((1, 2, 3), shape or (), strict=False):
        out += varint(field << 3) + varint(number)
    out += varint(4 << 3 | _BYTES) + varint(len(data)) + data + varint(5 << 3) + varint(label)
    return out + (varint(7 << 3) + varint(1) if shape is None else b"")
