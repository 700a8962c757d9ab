"""Data sets by name: what the settings mean, and what does not go together."""

import pytest
from config import Config, parse_args


@pytest.mark.parametrize(
    ("dataset", "classes", "augmentation"),
    [
        ("imagenet", 1000, "resnet"),
        ("cifar10", 10, "cifar"),
        ("cifar100", 100, "cifar"),
        ("mnist", 10, "none"),
        ("digits", 10, "none"),
        (None, 10, "mean_image"),
    ],
)
def test_usual_settings_of_a_data_set(dataset, classes, augmentation):
    config = Config(dataset=dataset)
    assert (config.n_classes, config.augmentation_name) == (classes, augmentation)
    assert config.digits == (dataset is None)
    assert Config(dataset=dataset, augmentation="torch7").augmentation_name == "torch7"


def test_none_is_an_augmentation():
    config = parse_args(["a.txt", "b.txt", "--augmentation", "none"])
    assert config.augmentation_name == "none"


def test_lists_are_files():
    config = Config(train="a", val="b")
    assert (config.n_classes, config.augmentation_name) == (1000, "mean_image")
    assert Config(train="a", val="b", dataset="files", nclasses=7).n_classes == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "files"}, "--dataset files: give TRAIN and VAL"),
        ({"dataset": "cifar10", "train": "a", "val": "b"}, "leave out TRAIN and VAL"),
        (
            {"dataset": "mnist", "augmentation": "mean_image"},
            "mean_image: not with --dataset mnist",
        ),
        ({"dataset": "svhn"}, "'files', 'imagenet', 'cifar10'"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_missing_files_are_one_clear_line(train, tmp_path):
    done = train("--dataset", "cifar10", "--data-root", tmp_path, "-o", tmp_path / "out", status=2)
    assert f"--data-root {tmp_path}: CIFAR-10 is not there; nothing is downloaded" in done.stderr
    assert "md5 c58f30108f718f92721af3b95e74349a" in done.stderr


@pytest.mark.slow
@pytest.mark.mpi
def test_two_ranks_on_a_data_set_by_name(train, tmp_path):
    done = train(
        "--dataset", "digits", "--normalization", "data", "--ooc", "--ooc-limit", "8GiB",
        "-a", "preresnet11", "-is", "8", "-B", "16", "-b", "180", "-i", "3",
        "--optimizer", "srsgd", "-o", tmp_path / "out", ranks=2,
    )  # fmt: skip
    assert "1437 training and 360 validation images of digits" in done.stdout
    assert (tmp_path / "out" / "model_iter_3").is_file()
