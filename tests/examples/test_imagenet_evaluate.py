"""tools/evaluate.py on the folder that a run leaves."""

import csv
import json

import chainer
import models
import numpy
import pytest
from config import Config
from imagenet_cli import write_lists
from provenance import CONFIG_FILE, settings
from tools import evaluate


@pytest.fixture
def result(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    lists = write_lists(root, n_train=3, n_val=12)
    folder = tmp_path / "result"
    folder.mkdir()
    config = Config(
        train=lists.train, val=lists.val, root=lists.root, mean=lists.mean,
        nclasses=7, arch="preresnet11", insize=39, val_batchsize=5,
    )  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(settings(config)))  # JSON is YAML
    numpy.random.seed(0)
    for iteration in (5, 10):  # the later one is evaluated
        model = models.create("preresnet11", 39, 7)
        chainer.serializers.save_npz(str(folder / f"model_iter_{iteration}"), model)
    return folder, model


def test_writes_what_the_scores_say(result, capsys):
    folder, _ = result
    assert evaluate.main([str(folder), "--gpu", "-1"]) == 0
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["model"].endswith("model_iter_10")
    assert found["images"] == 12
    assert 0 <= found["top-1"] <= found["top-5"] <= 1
    matrix = [
        [int(x) for x in row]
        for row in csv.reader((folder / "confusion.csv").read_text().splitlines())
    ]
    assert numpy.array(matrix).sum(axis=1).tolist() == [4, 4, 4, 0, 0, 0, 0]
    assert numpy.trace(matrix) == pytest.approx(12 * found["top-1"])
    assert (folder / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{found['mAP']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{result}/nothing"], f"has no {CONFIG_FILE}; give a folder of results"),
        (["{result}", "--model", "{result}/confusion.png"], "confusion.png"),
    ],
)
def test_clear_errors(arguments, message, result, capsys):
    folder, _ = result
    arguments = [a.format(result=folder) for a in arguments]
    assert evaluate.main([*arguments, "--gpu", "-1"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_ten_crops_are_averaged(result, monkeypatch):
    """The probabilities of an image are the means of its ten crops'."""
    folder, model = result
    file = folder / CONFIG_FILE
    assert evaluate.main([str(folder), "--gpu", "-1", "--ten-crop"]) == 2  # mean_image has one
    config = json.loads(file.read_text()) | {"augmentation": "none", "mean": None}
    file.write_text(json.dumps(config))
    seen = []
    batches = []
    real = evaluate.predict

    def predict(model_, images, batchsize):
        batches.append(batchsize)
        seen.append((images, real(model_, images, batchsize)))
        return seen[-1][1]

    monkeypatch.setattr(evaluate, "predict", predict)
    assert evaluate.main([str(folder), "--gpu", "-1", "--ten-crop"]) == 0
    assert evaluate.main([str(folder), "--gpu", "-1", "--ten-crop", "-b", "4"]) == 0
    assert batches == [1, 4]
    (images, (probabilities, labels)), (_, (same, _)) = seen
    numpy.testing.assert_allclose(probabilities, same, rtol=1e-6)
    for index in (0, 7):
        crops, label = images[index]
        assert crops.shape == (10, 3, 39, 39)
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            each = chainer.functions.softmax(model.predict(crops)).array
        numpy.testing.assert_allclose(probabilities[index], each.mean(axis=0), rtol=1e-5)
        assert labels[index] == label


def test_no_model(result, capsys):
    folder, _ = result
    for path in folder.glob("model_iter_*"):
        path.unlink()
    assert evaluate.main([str(folder), "--gpu", "-1"]) == 2
    assert "has no model_iter_N" in capsys.readouterr().err
