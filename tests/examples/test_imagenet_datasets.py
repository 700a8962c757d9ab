"""Images and lists: exact crops, reproducible order, and errors that name what is wrong."""

import compute_mean
import numpy
import pytest
from datasets import digits
from datasets.labeled import LabeledImages, read_image, read_list
from datasets.preprocessed import BadExample, EpochOrder, PreprocessedImages, generator
from errors import InputError
from PIL import Image
from transforms import CropAndNormalize, load_mean

ZERO_MEAN = numpy.zeros((3, 1, 1), numpy.float32)


def test_read_list_allows_spaces_in_paths_and_empty_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a b.jpg 0\n\nc.jpg\t2\n")
    assert read_list(path, 3) == [("a b.jpg", 0), ("c.jpg", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 3\n", r"line 1: label 3 of a.jpg is out of range; allowed are 0 to 2"),
        ("a.jpg 0\nb.jpg -1\n", r"line 2: label -1 of b.jpg is out of range"),
        ("a.jpg\n", r"line 1: 'a.jpg' is not a path and an integer label"),
        ("a.jpg cat\n", r"line 1: 'a.jpg cat' is not a path and an integer label"),
        ("\n", r"no images in it"),
    ],
)
def test_read_list_errors_name_the_line(tmp_path, text, message):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_list(path, 3)


def test_missing_list_is_named(tmp_path):
    with pytest.raises(InputError, match=r"list file .*none.txt: No such file"):
        read_list(tmp_path / "none.txt")


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    Image.new(mode, (7, 5)).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (5, 7, 3)
    assert image.dtype == numpy.uint8


def test_damaged_images_are_named(lists):
    good = (lists.root / "train 0.jpg").read_bytes()
    (lists.root / "cut.jpg").write_bytes(good[: len(good) // 2])
    (lists.root / "text.jpg").write_text("not an image")
    (lists.root / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(InputError, match=name) as info:
            read_image(lists.root / name)
        assert "\n" not in str(info.value)


def test_centre_crop_is_exact():
    image = numpy.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=numpy.uint8)
    mean = numpy.random.default_rng(1).random((3, 9, 8), dtype=numpy.float32) * 255
    x = CropAndNormalize(mean, 4)(image, "a", None)
    expected = (image[2:6, 2:6].transpose(2, 0, 1) - mean[:, 2:6, 2:6]) * numpy.float32(1 / 255)
    numpy.testing.assert_array_equal(x, expected)
    assert x.dtype == numpy.float32


def test_random_crop_reaches_every_offset_and_both_flips():
    # The pixel's value says where it is from: 3 rows x 3 columns of offsets, flipped or not.
    image = numpy.arange(36, dtype=numpy.uint8).reshape(6, 6)[:, :, None].repeat(3, axis=2)
    crop = CropAndNormalize(ZERO_MEAN, 4)
    seen = set()
    for i in range(300):
        x = crop(image, "a", numpy.random.default_rng(i)) * 255
        seen.add((round(float(x[0, 0, 0])), bool(x[0, 0, 0] > x[0, 0, 1])))
    offsets = [(y, x) for y in range(3) for x in range(3)]
    assert seen == {(6 * y + x, False) for y, x in offsets} | {
        (6 * y + x + 3, True) for y, x in offsets
    }


def test_flip_subtracts_the_mean_of_the_same_place():
    image = numpy.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    crop = CropAndNormalize(image.transpose(2, 0, 1).astype(numpy.float32), 4)
    for i in range(8):
        assert not crop(image, "a", numpy.random.default_rng(i)).any()


def test_image_as_large_as_the_crop_works_and_smaller_is_an_error():
    crop = CropAndNormalize(ZERO_MEAN, 4)
    rng = numpy.random.default_rng(0)
    assert crop(numpy.zeros((4, 4, 3), numpy.uint8), "a", rng).shape == (3, 4, 4)
    with pytest.raises(InputError, match=r"image b.jpg: 4x3 pixels are less than --insize 4"):
        crop(numpy.zeros((3, 4, 3), numpy.uint8), "b.jpg", rng)


def test_image_of_another_size_than_the_mean_is_an_error():
    crop = CropAndNormalize(numpy.zeros((3, 8, 8), numpy.float32), 4)
    with pytest.raises(InputError, match=r"image a: 9x8 pixels, but the mean file is for 8x8"):
        crop(numpy.zeros((8, 9, 3), numpy.uint8), "a", None)


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (numpy.zeros((1, 8, 8)), r"shape \(1, 8, 8\) is not allowed"),
        (numpy.zeros((8, 8, 3)), r"shape \(8, 8, 3\) is not allowed"),
        (numpy.zeros((3, 7, 8)), r"8x7 pixels are less than --insize 8"),
        (numpy.array(["a"]), r"not a .npy file of numbers"),
    ],
)
def test_wrong_mean_files(tmp_path, mean, message):
    numpy.save(tmp_path / "mean.npy", mean)
    with pytest.raises(InputError, match=message):
        load_mean(tmp_path / "mean.npy", 8)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g"])
@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 8, 9)])
def test_mean_files_of_what_is_no_finite_number(tmp_path, dtype, value, shape):
    mean = numpy.full(shape, 100, dtype)
    numpy.save(tmp_path / "mean.npy", mean)
    assert (load_mean(tmp_path / "mean.npy", 8) == 100).all()
    mean.flat[-1] = value
    numpy.save(tmp_path / "mean.npy", mean)
    with pytest.raises(
        InputError,
        match=rf"mean.npy: 1 of its {mean.size} values are no finite numbers, such as {value}",
    ):
        load_mean(tmp_path / "mean.npy", 8)


def test_a_mean_that_is_finite_only_in_double_precision(tmp_path):
    numpy.save(tmp_path / "mean.npy", numpy.array([1.0, 2.0, 1e39]))
    with pytest.raises(InputError, match=r"1 of its 3 values are no finite numbers, such as inf"):
        load_mean(tmp_path / "mean.npy", 8)


def test_mean_files_whose_headers_are_crafted(tmp_path):
    path = tmp_path / "mean.npy"
    # more memory than there is; code; what Python's parser gives up at
    for shape in (
        "(3, 99999999, 999999)",
        f"(open({str(tmp_path / 'ran')!r}, 'w'), 8)",
        "-" * 9000,
    ):
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        length = len(header).to_bytes(2, "little")
        path.write_bytes(b"\x93NUMPY\x01\x00" + length + header + bytes(3 * 8 * 8 * 8))
        with pytest.raises(InputError, match=r"mean.npy: not a .npy file of numbers"):
            load_mean(path, 8)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "mean.npy").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"mean.npy: not a .npy file of numbers"):
        load_mean(path, 8)


def test_missing_and_damaged_mean_files(tmp_path):
    with pytest.raises(InputError, match=r"no such file; make it with compute_mean.py"):
        load_mean(tmp_path / "mean.npy", 8)
    (tmp_path / "mean.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"mean.npy: not a .npy file"):
        load_mean(tmp_path / "mean.npy", 8)


def test_order_is_a_new_permutation_each_epoch_and_can_be_continued():
    sampler = EpochOrder(10, (3, 1))
    first = sampler(numpy.arange(10), 0)
    second = sampler(first, 10)
    assert sorted(first) == list(range(10, 20))
    assert sorted(second) == list(range(20, 30))
    assert list(first - 10) != list(second - 20)
    # Another process continues from the saved order alone.
    numpy.testing.assert_array_equal(EpochOrder(10, (3, 1))(first.copy(), 10), second)
    assert list(EpochOrder(10, (3, 2))(numpy.arange(10), 0)) != list(first)


def test_augmentation_depends_on_epoch_and_not_on_reading_order(lists):
    images = LabeledImages(read_list(lists.train), lists.root)
    dataset = PreprocessedImages(images, CropAndNormalize(ZERO_MEAN, 16), (0, 0))
    n = len(dataset)
    epochs = [dataset[n * visit + 2][0] for visit in range(1, 6)]
    again = [dataset[n * visit + 2][0] for visit in range(5, 0, -1)][::-1]
    for a, b in zip(epochs, again, strict=True):
        numpy.testing.assert_array_equal(a, b)
    assert len({x.tobytes() for x in epochs}) > 1


def test_bad_image_becomes_a_bad_example(lists):
    (lists.root / "train 3.jpg").unlink()
    images = LabeledImages(read_list(lists.train), lists.root)
    dataset = PreprocessedImages(images, CropAndNormalize(ZERO_MEAN, 16), None)
    bad = dataset[3]
    assert isinstance(bad, BadExample)
    assert "train 3.jpg: no such file" in bad.message


def test_compute_mean_is_exact_in_float64(tmp_path, capsys):
    rng = numpy.random.default_rng(0)
    stack = rng.integers(0, 256, (5, 6, 7, 3), dtype=numpy.uint8)
    for i, pixels in enumerate(stack):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{i}.png {i}\n" for i in range(5)))
    output = tmp_path / "mean.npy"
    argv = [str(tmp_path / "list.txt"), "-R", str(tmp_path), "-o", str(output)]
    assert compute_mean.main(argv) == 0
    mean = numpy.load(output)
    assert mean.dtype == numpy.float32
    expected = stack.astype(numpy.float64).mean(axis=0).transpose(2, 0, 1).astype(numpy.float32)
    numpy.testing.assert_array_equal(mean, expected)


def test_compute_mean_refuses_images_of_two_sizes(lists, tmp_path, capsys):
    Image.new("RGB", (44, 45)).save(lists.root / "train 1.jpg")
    output = tmp_path / "new.npy"
    argv = [str(lists.train), "-R", str(lists.root), "-o", str(output)]
    assert compute_mean.main(argv) == 2
    assert "train 1.jpg: 44x45 pixels, but the first image has 45x45" in capsys.readouterr().err
    assert not output.exists()


def test_digits_are_real_and_complete(tmp_path):
    folder = tmp_path / "digits"
    digits.write_digits(folder, 45)
    train = read_list(folder / "train.txt", 10)
    val = read_list(folder / "val.txt", 10)
    assert (len(train), len(val)) == (1437, 360)
    assert not {name for name, _ in train} & {name for name, _ in val}
    assert {label for _, label in train} == set(range(10))
    assert load_mean(folder / "mean.npy", 39).shape == (3, 45, 45)
    # A file shows the digit that scikit-learn has under its number and label.
    name, label = train[0]
    images, labels = digits.load_digits()
    index = int(name.split("/")[1][:4])
    assert labels[index] == label
    small = Image.fromarray(read_image(folder / name)).resize((8, 8), Image.Resampling.BOX)
    both = [numpy.asarray(small.convert("L")).ravel(), images[index].ravel()]
    assert numpy.corrcoef(both)[0, 1] > 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]  # nothing half-written is left


@pytest.mark.parametrize("seeds", [(0,), (0, 0, 1, 5, 77), (2**32 - 1, 3), (2**32, 3), (2**40, 0)])
def test_generators_are_numpys(seeds):
    expected = numpy.random.default_rng(seeds).bit_generator.state
    assert generator(seeds).bit_generator.state == expected
