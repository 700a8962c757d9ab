"""tools/compare.py: the same runs but for the rule, their table and picture."""

import json

import numpy
import pytest
from tools import compare
from tools.comparison_plot import plot


def run_tool(tmp_path, *args):
    out = tmp_path / "c.json"
    command = ["--epochs", "1", "--seeds", "2", "--arch", "nin", "-B", "300", "--json", str(out)]
    status = compare.main([*command, *args])
    return status, json.loads(out.read_text()) if out.exists() else None


@pytest.fixture
def tiny(monkeypatch):
    """Only few of the digits, enlarged to what the smallest network of one output takes."""
    load = compare.load

    def few(source):
        x = load(source)
        return x._replace(
            x_train=x.x_train[:40], t_train=x.t_train[:40], x_test=x.x_test[:20],
            t_test=x.t_test[:20],
        )  # fmt: skip

    monkeypatch.setattr(compare, "load", few)


@pytest.mark.slow
def test_compares(tiny, tmp_path, capsys):
    picture = tmp_path / "c.png"
    status, found = run_tool(
        tmp_path, "--arch", "preresnet11", "--epochs", "3", "-B", "20", "--crop", "1", "--flip",
        "--plot", str(picture),
    )  # fmt: skip
    assert status == 0
    text = capsys.readouterr().out
    assert "test error, %" in text
    assert set(found["runs"]) == set(compare.METHODS)
    for runs in found["runs"].values():
        assert [len(r["training_loss"]) for r in runs] == [3, 3]
        assert runs[0] != runs[1]
    assert found["runs"]["SRSGD"][0] != found["runs"]["SGD + momentum"][0]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_summary_is_of_the_pairs():
    def runs(*errors):
        return [{"test_error": [50.0, e], "training_loss": [1.0, e / 10]} for e in errors]

    found = compare.summarize({"SGD + momentum": runs(5, 6, 7), "SRSGD": runs(4, 5, 5)})
    entry = found["test_error"]
    assert entry["SGD + momentum"] == {"mean": 6, "deviation": 1}
    assert entry["difference"] == pytest.approx(-4 / 3)
    # the interval of Student's t for three pairs: 4.303 * s / sqrt(3)
    s = numpy.std([-1, -1, -2], ddof=1)
    assert entry["interval"] == pytest.approx(4.303 * s / 3**0.5)


def test_prepare_standardizes_and_shrinks():
    images = compare.load("digits")
    found = compare.prepare(images, 2)
    assert found.x_train.shape == (1437, 3, 4, 4)
    numpy.testing.assert_allclose(found.x_train.mean(axis=(0, 2, 3)), 0, atol=1e-4)
    numpy.testing.assert_allclose(found.x_train.std(axis=(0, 2, 3)), 1, atol=1e-4)
    corner = images.x_train[0, 0, :2, :2].mean()
    scale = found.x_train[0, 0, 0, 0] * images.x_train.reshape(-1, 4, 2, 4, 2).mean((2, 4)).std()
    assert scale + images.x_train.mean() == pytest.approx(corner, abs=1e-4)


def test_augmentation_moves_and_mirrors():
    x = numpy.arange(2 * 16, dtype=numpy.float32).reshape(2, 1, 4, 4) + 1
    rng = numpy.random.default_rng(0)
    numpy.testing.assert_array_equal(compare.augment(x, 0, False, rng), x)
    seen = {compare.augment(x, 1, True, rng).tobytes() for _ in range(30)}
    assert len(seen) > 10
    mirrored = {compare.augment(x, 0, True, rng)[0].tobytes() for _ in range(30)}
    assert mirrored == {x[0].tobytes(), x[0, :, :, ::-1].tobytes()}


def test_small_images_are_an_error(tmp_path, capsys):
    status, found = run_tool(tmp_path)
    assert (status, found) == (2, None)
    assert "--insize 8: nin takes 39 or more pixels" in capsys.readouterr().err


def test_plot_of_one_seed(tmp_path):
    run = {"training_loss": [2.0, 1.0], "test_error": [50.0, 20.0]}
    settings = {"drops": [1], "seeds": 1, "arch": "a", "data": "b", "side": 8}
    plot({"settings": settings, "runs": {m: [run] for m in compare.METHODS}}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
