"""Every image file becomes upright 8-bit RGB, exactly, and large JPEGs quickly."""

import io
import subprocess

import numpy
import pytest
from datasets import decoding
from datasets.decoding import decode, image_size, read_image
from datasets.resizing import parse_size, resize
from errors import InputError
from photographs import photographs
from PIL import ExifTags, Image, ImageOps

IMAGEMAGICK = "/usr/bin/convert"


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(*shape: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, shape, dtype=numpy.uint8)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, file_format, orientation):
    image = Image.fromarray(noise(6, 10, 3).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, file_format, exif=exif, quality=90)
    path = tmp_path / "a"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as opened:
        expected = numpy.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    numpy.testing.assert_array_equal(decode(data, "a"), expected)
    assert expected.shape == ((80, 48, 3) if orientation >= 5 else (48, 80, 3))
    assert image_size(path) == expected.shape[1::-1]


def test_cmyk_as_photoshop_writes_it():
    inverted = encoded(Image.fromarray(noise(8, 8, 4), "CMYK").resize((64, 64)), "JPEG", quality=95)
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    assert marker in inverted  # the marker by which a reader knows that the values are inverted
    with Image.open(io.BytesIO(inverted)) as image:
        cyan, magenta, yellow, black = numpy.moveaxis(numpy.asarray(image).astype(float), 2, 0)
    expected = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    error = decode(inverted, "a") - numpy.stack(expected, axis=2)
    assert abs(error).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(file_format):
    samples = numpy.arange(65536, dtype=numpy.uint16).reshape(256, 256)
    pixels = decode(encoded(Image.fromarray(samples), file_format), "a")
    expected = numpy.rint(samples / 257).astype(numpy.uint8)
    for channel in range(3):
        numpy.testing.assert_array_equal(pixels[:, :, channel], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode):
    rgba = noise(5, 256, 4)
    rgba[:, :, 3] = numpy.arange(256)
    image = Image.fromarray(rgba).convert(mode)
    whole = numpy.asarray(image.convert("RGBA")).astype(float)
    alpha = whole[:, :, 3:] / 255
    expected = numpy.rint(whole[:, :, :3] * alpha + 255 * (1 - alpha))
    numpy.testing.assert_array_equal(decode(encoded(image, "PNG"), "a"), expected)


def test_transparent_palette_and_first_frame_of_an_animation():
    frames = [Image.new("P", (4, 4), i) for i in (0, 1)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 200, 100, 0] + [0] * 750)
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(animation, "a") == (10, 20, 30)).all()
    clear = encoded(frames[1], "PNG", transparency=1)
    assert (decode(clear, "a") == 255).all()


def test_floating_point_pixels_are_refused_with_the_reason():
    data = encoded(Image.fromarray(numpy.ones((4, 4), numpy.float32)), "TIFF")
    with pytest.raises(InputError, match=r"image a\.tif: cannot be decoded \(.*floating-point"):
        decode(data, "a.tif")


def test_simplejpeg_and_pillow_give_the_same_pixels(monkeypatch):
    pytest.importorskip("simplejpeg")
    for path in photographs():
        fast = read_image(path)
        monkeypatch.setattr(decoding, "simplejpeg", None)
        numpy.testing.assert_array_equal(read_image(path), fast)
        monkeypatch.undo()


@pytest.mark.parametrize("library", ["simplejpeg", "pillow"])
def test_scaled_decoding_is_smaller_but_large_enough_and_looks_the_same(monkeypatch, library):
    if library == "pillow":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    photo = Image.open(photographs()[0]).resize((1920, 1281), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(photo, "JPEG", quality=92, exif=exif)
    small = decode(data, "a", lambda width, height: (256, 300))
    assert 256 <= small.shape[1] < 1281 and 300 <= small.shape[0] < 1920
    assert small.shape[0] > small.shape[1]
    full = resize(decode(data, "a"), (128, 192), "bicubic")
    difference = resize(small, (128, 192), "bicubic").astype(float) - full
    assert abs(difference).mean() < 4


def reference_resize(image: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
    """Resizes pixel by pixel, from the definition of Mitchell and Netravali's filter."""

    def k(x: float, b: float = 1 / 3, c: float = 1 / 3) -> float:
        x = abs(x)
        if x < 1:
            return ((12 - 9 * b - 6 * c) * x**3 + (-18 + 12 * b + 6 * c) * x**2 + 6 - 2 * b) / 6
        if x < 2:
            cubic = (-b - 6 * c) * x**3 + (6 * b + 30 * c) * x**2 + (-12 * b - 48 * c) * x
            return (cubic + 8 * b + 24 * c) / 6
        return 0.0

    def matrix(old: int, new: int) -> numpy.ndarray:
        centres = [(i + 0.5) * old / new for i in range(new)]
        rows = numpy.array([[k(j + 0.5 - centre) for j in range(old)] for centre in centres])
        return rows / rows.sum(axis=1, keepdims=True)

    tall = numpy.einsum("ij,jkc->ikc", matrix(image.shape[0], size[1]), image.astype(float))
    wide = numpy.einsum("ij,kjc->kic", matrix(image.shape[1], size[0]), tall.clip(0, 255))
    return wide.clip(0, 255)


@pytest.mark.parametrize("size", [(37, 29), (40, 9), (11, 60)])
def test_enlarging_is_mitchells_cubic(size):
    image = noise(9, 11, 3)
    result = resize(image, size)
    assert result.shape == (size[1], size[0], 3)
    assert abs(result - reference_resize(image, size)).max() < 0.51


@pytest.mark.parametrize("size", [(1280, 1280), (300, 1000), (256, 256), (500, 400)])
def test_resizing_agrees_with_imagemagick(tmp_path, size):
    """All but one sample of 500 are equal, the rest is off by one level."""
    try:
        version = subprocess.run([IMAGEMAGICK, "-version"], capture_output=True, text=True).stdout
    except OSError:
        version = ""
    if "ImageMagick" not in version:
        pytest.skip("no ImageMagick")
    image = read_image(photographs()[0])
    Image.fromarray(image).save(tmp_path / "a.png")
    exact = f"{size[0]}x{size[1]}!"
    subprocess.run(
        [IMAGEMAGICK, "a.png", "-resize", exact, "b.ppm"], cwd=tmp_path, check=True, timeout=60
    )
    theirs = numpy.asarray(Image.open(tmp_path / "b.ppm")).astype(int)
    difference = abs(resize(image, size) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1 / 500


def test_sizes_are_read_and_refused_by_name():
    assert parse_size("2560x1440") == (2560, 1440)
    assert parse_size("2560x2560!") == parse_size("2560") == (2560, 2560)
    for text in ("0x5", "big", "3x", "-3", "1x2x3", ""):
        with pytest.raises(InputError, match=r"--enlarge .*: not a size; give WIDTHxHEIGHT"):
            parse_size(text, "--enlarge")
