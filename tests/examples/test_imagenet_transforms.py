"""Every transform does what its formula says, from its own generator, on uint8 and on floats."""

import colorsys
import json

import numpy
import pytest
from datasets.labeled import LabeledImages, read_list
from datasets.preprocessed import PreprocessedImages
from datasets.statistics import channel_statistics
from errors import InputError
from photographs import photographs
from PIL import Image
from transforms import AUGMENTATIONS, Compose, colour, geometry, training, validation
from transforms.steps import like

IMAGE = numpy.random.default_rng(1).integers(0, 256, (12, 17, 3), dtype=numpy.uint8)
STEPS = [
    geometry.Scale(9), geometry.RandomScale(8, 11), geometry.Resize(7, 5), geometry.CenterCrop(6),
    geometry.RandomCrop(6), geometry.RandomCrop(12, 4), geometry.RandomSizedCrop(8),
    geometry.RandomSizedCrop(8, log_aspect=True), geometry.TenCrop(6), geometry.HorizontalFlip(),
    geometry.Rotation(30), geometry.Warp(20, 0.2, 0.1),
    colour.ToFloat(), colour.Normalize((0.5,) * 3, (0.2,) * 3), colour.Brightness(0.4),
    colour.Contrast(0.4), colour.Saturation(0.4), colour.ColorJitter(), colour.Lighting(),
    colour.HSVJitter(), colour.Noise(0.1), colour.Smoothing(1.0),
]  # fmt: skip


class Fixed:
    """A generator whose uniform numbers are all the same part of their range."""

    def __init__(self, part):
        self.part = part

    def random(self):
        return self.part

    def uniform(self, low, high):
        return low + self.part * (high - low)

    def permutation(self, n):
        return numpy.arange(n)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: type(s).__name__)
def test_steps_draw_from_their_generator_alone_and_leave_the_image(step):
    for image in (IMAGE, IMAGE.astype(numpy.float32) / 255):
        before = image.copy()
        numpy.random.seed(0)
        first = step(image, numpy.random.default_rng(5))
        numpy.random.seed(1)
        second = step(image, numpy.random.default_rng(5))
        numpy.testing.assert_array_equal(first, second)
        numpy.testing.assert_array_equal(image, before)
        assert first.shape[-1] == 3
        normalized = isinstance(step, colour.ToFloat | colour.Normalize)
        assert first.dtype == (numpy.float32 if normalized else image.dtype)
        if image.dtype == numpy.float32 and not normalized:
            scaled = step(IMAGE, numpy.random.default_rng(5)) / 255.0
            assert abs(scaled - first).mean() < 0.03  # both types mean the same


def test_random_steps_differ_between_generators():
    for step in STEPS:
        results = {step(IMAGE, numpy.random.default_rng(seed)).tobytes() for seed in range(12)}
        fixed = isinstance(step, geometry.Scale | geometry.Resize | geometry.CenterCrop
                           | geometry.TenCrop | colour.ToFloat | colour.Normalize)  # fmt: skip
        assert (len(results) == 1) == fixed, step


def test_scale_keeps_the_aspect_ratio():
    assert geometry.Scale(6)(IMAGE, None).shape == (6, 8, 3)  # 17 * 6 / 12 = 8.5, to even
    assert geometry.Scale(24)(IMAGE.transpose(1, 0, 2), None).shape == (34, 24, 3)
    assert geometry.Scale(12)(IMAGE, None) is IMAGE
    sizes = {
        min(geometry.RandomScale(8, 11)(IMAGE, numpy.random.default_rng(i)).shape[:2])
        for i in range(60)
    }
    assert sizes == {8, 9, 10, 11}


def test_random_crop_reaches_every_place_with_padding_too():
    image = numpy.arange(1, 10, dtype=numpy.uint8).reshape(3, 3)[:, :, None].repeat(3, axis=2)
    seen = {
        geometry.RandomCrop(3, padding=1)(image, numpy.random.default_rng(i))[:, :, 0].tobytes()
        for i in range(200)
    }
    padded = numpy.pad(image[:, :, 0], 1)
    expected = {padded[y : y + 3, x : x + 3].tobytes() for y in range(3) for x in range(3)}
    assert seen == expected


@pytest.mark.parametrize("log_aspect", [False, True])
def test_random_sized_crop_has_the_distribution_of_its_formula(log_aspect):
    step = geometry.RandomSizedCrop(10, log_aspect=log_aspect)
    rng = numpy.random.default_rng(0)
    boxes = [step._choose(400, 300, rng) for _ in range(3000)]
    boxes = numpy.array([box for box in boxes if box is not None])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 400).all() and (top + height <= 300).all()
    area = width * height / 120000
    aspect = width / height
    assert 0.079 < area.min() < 0.1 and area.max() > 0.9
    assert 0.73 < aspect.min() < 0.78 and 1.3 < aspect.max() < 1.36
    # Crops of large areas are refused more often; small ones are uniform from 0.08 on.
    small = area[area < 0.4]
    assert abs(small.mean() - 0.24) < 0.01
    # Wide and high ones are equally frequent, by the logarithm or by changing places.
    assert abs((aspect[area < 0.4] > 1).mean() - 0.5) < 0.04
    # what cannot be fitted in ten tries: the centre of the scaled image
    thin = numpy.zeros((3, 500, 3), numpy.uint8)
    assert step._choose(500, 3, rng) is None
    assert step(thin, numpy.random.default_rng(0)).shape == (10, 10, 3)


def test_ten_crop_is_corners_centre_and_mirrors():
    ten = geometry.TenCrop(6)(IMAGE, None)
    assert ten.shape == (10, 6, 6, 3)
    numpy.testing.assert_array_equal(ten[0], IMAGE[:6, :6])
    numpy.testing.assert_array_equal(ten[3], IMAGE[6:, 11:])
    numpy.testing.assert_array_equal(ten[4], geometry.CenterCrop(6)(IMAGE, None))
    numpy.testing.assert_array_equal(ten[5:], ten[:5, :, ::-1])


def test_warp_turns_by_the_angle_and_about_the_centre():
    image = numpy.asarray(Image.open(photographs()[0]).crop((100, 100, 201, 201)))
    quarter = geometry.Warp(rotation=360)(image, Fixed(0.75))  # (0.75 - 0.5) * 360 = 90 degrees
    assert abs(quarter.astype(int) - numpy.rot90(image)).max() <= 1
    same = geometry.Warp(30, 0.5, 0.2)(image, Fixed(0.5))
    numpy.testing.assert_array_equal(same, image)
    double = geometry.Warp(scale=1.0)(image, Fixed(1.0))
    assert abs(double[50, 50].astype(int) - image[50, 50]).max() <= 1
    expected = Image.fromarray(image[25:76, 25:76]).resize((101, 101), Image.BILINEAR)
    assert abs(double.astype(float) - numpy.asarray(expected)).mean() < 6
    numpy.testing.assert_array_equal(geometry.Rotation(360)(image, Fixed(0.75)), quarter)


def test_blends_are_those_of_fb_resnet_torch():
    x = IMAGE.astype(numpy.float64) / 255
    image = x.astype(numpy.float32)
    grey = 0.299 * x[:, :, 0] + 0.587 * x[:, :, 1] + 0.114 * x[:, :, 2]
    for part in (0.0, 0.25, 1.0):
        a = 1 + 0.4 * (2 * part - 1)
        rng = Fixed(part)
        expected = {
            colour.Brightness(0.4): x * a,
            colour.Contrast(0.4): x * a + grey.mean() * (1 - a),
            colour.Saturation(0.4): x * a + grey[:, :, None] * (1 - a),
        }
        for step, values in expected.items():
            numpy.testing.assert_allclose(step(image, rng), values, rtol=0, atol=1e-6)
    jitter = colour.ColorJitter(0.4, 0.3, 0.2)
    orders = set()
    for seed in range(40):
        order = tuple(numpy.random.default_rng(seed).permutation(3))
        result = jitter(image, numpy.random.default_rng(seed))
        rng = numpy.random.default_rng(seed)
        rng.permutation(3)
        manual = image
        for i in order:
            manual = (colour.Brightness(0.4), colour.Contrast(0.3), colour.Saturation(0.2))[i](
                manual, rng
            )
        numpy.testing.assert_array_equal(result, manual)
        orders.add(order)
    assert len(orders) == 6


def test_lighting_adds_the_components():
    class Ones(Fixed):
        def normal(self, mean, std, n):
            return numpy.array([1.0, 0.0, 0.0]) * std

    result = colour.Lighting(0.1)(numpy.zeros((2, 2, 3), numpy.float32), Ones(0))
    expected = 0.1 * 0.2175 * numpy.array([-0.5675, -0.5808, -0.5836])
    numpy.testing.assert_allclose(result[0, 0], expected, rtol=1e-5)
    # The components are orthonormal: what they explain is what their values say.
    vectors = colour.Lighting.VECTORS
    numpy.testing.assert_allclose(vectors.T @ vectors, numpy.eye(3), atol=2e-3)


def test_hsv_is_that_of_colorsys():
    rgb = numpy.random.default_rng(0).random((6, 7, 3))
    rgb[0] = 0.5
    rgb[1, :3] = [[0, 0, 0], [1, 1, 1], [1, 0, 0]]
    hsv = numpy.stack(colour.to_hsv(rgb), axis=2)
    expected = numpy.array([[colorsys.rgb_to_hsv(*p) for p in row] for row in rgb])
    numpy.testing.assert_allclose(hsv, expected, atol=1e-12)
    back = colour.from_hsv(*numpy.moveaxis(hsv, 2, 0))
    numpy.testing.assert_allclose(back, rgb, atol=1e-6)
    red = numpy.zeros((1, 1, 3), numpy.float32)
    red[:, :, 0] = 1
    green = colour.HSVJitter(1 / 3, 0, 0)(red, Fixed(1.0))
    numpy.testing.assert_allclose(green[0, 0], [0, 1, 0], atol=1e-6)


def test_noise_and_smoothing():
    flat = numpy.full((200, 200, 3), 0.5, numpy.float32)
    noisy = colour.Noise(0.1)(flat, numpy.random.default_rng(0)) - 0.5
    assert abs(noisy.std() - 0.1) < 0.002 and abs(noisy.mean()) < 0.002
    numpy.testing.assert_allclose(colour.Smoothing(2)(flat, Fixed(1.0)), flat, rtol=1e-5)
    point = numpy.zeros((41, 41, 3), numpy.float32)
    point[20, 20] = 1
    blurred = colour.Smoothing(2)(point, Fixed(1.0))[:, :, 0]
    y, x = numpy.mgrid[-20:21, -20:21]
    expected = numpy.exp(-(x**2 + y**2) / 8)
    numpy.testing.assert_allclose(blurred, expected / expected.sum(), atol=2e-4)


def test_uint8_results_are_rounded_and_clipped():
    values = numpy.array([[[-3.0, 254.6, 300.0]]])
    assert like(IMAGE, values).tolist() == [[[0, 255, 255]]]


def test_normalize_is_mean_and_deviation_of_zero_to_one():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (IMAGE / 255.0 - mean) / std
    for image in (IMAGE, (IMAGE / 255.0).astype(numpy.float32)):
        result = colour.Normalize(mean, std)(image, None)
        numpy.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_named_transforms_give_the_networks_input(name):
    insize = 32 if name == "cifar" else 56
    size = (32, 32) if name == "cifar" else (90, 120)
    image = numpy.random.default_rng(0).integers(0, 256, (*size, 3), dtype=numpy.uint8)
    normal = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for seed in range(5):
        x = training(name, insize, *normal)(image, "a", numpy.random.default_rng(seed))
        assert x.shape == (3, insize, insize) and x.dtype == numpy.float32
        assert x.flags.c_contiguous
    y = validation(name, insize, *normal)(image, "a", None)
    if name != "cifar":
        scaled = Image.fromarray(image).resize((85, 64), Image.BILINEAR if name == "resnet" else
                                               Image.BICUBIC)  # fmt: skip
        crop = numpy.asarray(scaled)[4:60, 14:70]
    else:
        crop = image
    numpy.testing.assert_allclose(y, (crop.transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-5)


def test_names_and_sizes_that_do_not_fit_are_errors():
    with pytest.raises(InputError, match=r"augmentation 'flip': allowed are torch7, resnet"):
        training("flip", 32, (0,) * 3, (1,) * 3)
    with pytest.raises(InputError, match=r"image a.jpg: 17x12 pixels are less than the crop"):
        Compose([geometry.CenterCrop(13)])(IMAGE, "a.jpg", None)


@pytest.mark.parametrize("name", ["torch7", "resnet", "none"])
def test_scaled_decoding_of_large_photographs_changes_little(tmp_path, name):
    photo = Image.open(photographs()[0]).resize((1920, 1281), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.jpg", quality=92)
    (tmp_path / "l.txt").write_text("a.jpg 0\n")
    images = LabeledImages(read_list(tmp_path / "l.txt"), tmp_path)
    sizes = []

    class Watched(LabeledImages):
        def image(self, i, need=None):
            result = super().image(i, need)
            sizes.append(result.shape[0])
            return result

    class Whole(LabeledImages):
        def image(self, i, need=None):
            return super().image(i)

    normal = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    transform = training(name, 112, *normal)
    seed = None if name == "none" else (0,)
    fast = PreprocessedImages(Watched([("a.jpg", 0)], tmp_path), transform, seed)
    whole = PreprocessedImages(Whole([("a.jpg", 0)], tmp_path), transform, seed)
    for i in range(6):
        a, b = fast.get(i)[0], whole.get(i)[0]
        difference = abs(a - b).mean() * 0.25 * 255
        assert difference < 8, difference  # levels of 255
        numpy.testing.assert_array_equal(a, fast.get(i)[0])
    assert min(sizes) < 1281
    assert len(images) == 1


def test_channel_statistics_are_cached_until_the_data_change(lists, tmp_path):
    source = LabeledImages(read_list(lists.train), lists.root)
    stack = numpy.stack([source.image(i) for i in range(len(source))]) / 255.0
    cache = tmp_path / "cache"
    mean, std = channel_statistics(source, cache=cache)
    numpy.testing.assert_allclose(mean, stack.mean(axis=(0, 1, 2)), rtol=1e-12)
    numpy.testing.assert_allclose(std, stack.std(axis=(0, 1, 2)), rtol=1e-12)
    read = []

    class Counting(LabeledImages):
        def image(self, i, need=None):
            read.append(i)
            return super().image(i)

    counting = Counting(read_list(lists.train), lists.root)
    assert channel_statistics(counting, cache=cache) == (mean, std)
    assert read == []
    part = channel_statistics(counting, n=7, seed=1, cache=cache)
    assert len(set(read)) == 7 and part != (mean, std)
    assert channel_statistics(counting, n=7, seed=2) != part
    Image.new("RGB", (45, 45), (255, 255, 255)).save(source.path(3))
    assert channel_statistics(counting, cache=cache)[0] > mean
    next(cache.iterdir()).write_text("{")
    assert channel_statistics(counting, cache=cache)[0] > mean


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [float("nan")] * 3}, {"std": [0.1, float("inf"), 0.1]}, {"std": [0.1, 0.1]},
        {"mean": [0.1, -0.1, 0.1]}, {"mean": "abc"}, {"std": [0.1, "0.1", 0.1]}, {"mean": None},
        {"mean": [[0.1], [0.1], [0.1]]}, {"std": [0.1, 25.0, 0.1]},
    ],
)  # fmt: skip
def test_channel_statistics_that_are_none_are_made_anew(lists, tmp_path, change):
    source = LabeledImages(read_list(lists.train), lists.root)
    expected = channel_statistics(source, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert channel_statistics(source, cache=tmp_path / "cache") == expected


def test_a_channel_without_deviation_is_an_error_not_a_division_by_zero(tmp_path):
    pixels = numpy.zeros((9, 9, 3), numpy.uint8)
    pixels[:, :4] = 255, 0, 0
    Image.fromarray(pixels).save(tmp_path / "b.png")
    source = LabeledImages([("b.png", 0)], tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match=r"green is the same in all pixels .*--normalization"):
            channel_statistics(source, cache=tmp_path / "cache")
