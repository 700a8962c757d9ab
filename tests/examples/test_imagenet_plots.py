"""The plots that compare runs, from folders as the trainer leaves them."""

import json
from pathlib import Path

import pytest
import yaml
from tools import plots
from tools.result_folders import read


def write_result(folder, arch, optimizer, errors, epoch=None, restarts=None, iterations=10):
    folder.mkdir()
    settings = {"arch": arch, "optimizer": optimizer, "epoch": epoch or len(errors), "out": "x"}
    if restarts:
        settings["restarts"] = restarts
    (folder / "config.resolved.yaml").write_text("# resolved\n" + yaml.safe_dump(settings))
    log = [
        {
            "epoch": i + 1,
            "iteration": iterations * (i + 1),
            "main/loss": error / 40,
            "validation/main/accuracy": 1 - error / 100,
        }
        for i, error in enumerate(errors)
    ]
    (folder / "log").write_text(json.dumps(log))
    return str(folder)


@pytest.fixture
def results(tmp_path):
    made = []
    for seed in range(3):
        for depth, offset in ((110, 2.0), (290, 1.2), (1001, 0.8)):
            for optimizer, gain in (("momentum_sgd", 0.0), ("srsgd", 0.4)):
                last = 4 + offset - gain + 0.1 * seed
                made.append(
                    write_result(
                        tmp_path / f"{optimizer}{depth}-{seed}",
                        f"preresnet{depth}",
                        optimizer,
                        [60 - seed, 20.0 + seed, last],
                        restarts=[30, 60] if optimizer == "srsgd" else None,
                    )
                )
    return made


def rows(text):
    return [line.split() for line in text.splitlines()]


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_depth(results, tmp_path, capsys):
    out = tmp_path / "depth.png"
    assert plots.main(["depth", *results, "--published", "cifar10", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert ["SRSGD", "1001", "3", "4.5", "0.1"] in rows(text)
    assert ["SGD", "+", "momentum", "110", "3", "6.1", "0.1"] in rows(text)
    assert is_png(out)


def test_loss(results, tmp_path, capsys):
    out = tmp_path / "loss.png"
    assert plots.main(["loss", *results, "-o", str(out)]) == 0
    assert is_png(out)
    assert "training loss" in capsys.readouterr().out


def test_epochs(tmp_path, capsys):
    made = [
        write_result(tmp_path / str(n), "preresnet110", "srsgd", [50.0] * (n - 1) + [5 + 1 / n])
        for n in (10, 5, 2)
    ]
    assert plots.main(["epochs", *made, "-o", str(tmp_path / "e.png")]) == 0
    found = rows(capsys.readouterr().out)
    assert ["SRSGD", "0", "1", "5.1", "-"] in found
    assert ["SRSGD", "8", "1", "5.5", "-"] in found
    assert is_png(tmp_path / "e.png")


def test_restarts(tmp_path, capsys):
    made = [
        write_result(tmp_path / str(f), "preresnet290", "srsgd", [4 + 10 / f], restarts=[f, 2 * f])
        for f in (10, 20, 40)
    ]
    assert plots.main(["restarts", *made, "-o", str(tmp_path / "r.png")]) == 0
    found = rows(capsys.readouterr().out)
    assert ["SRSGD", "40", "1", "4.25", "-"] in found
    assert is_png(tmp_path / "r.png")


def test_runs_that_differ_in_more_than_the_seed_are_lines_of_their_own(tmp_path):
    def result(name, *args, **options):
        return read(Path(write_result(tmp_path / name, *args, **options)))

    def names(*args):
        return {name: [r.folder.name for r in runs] for name, runs in plots.lines(*args).items()}

    linear = result("linear", "preresnet110", "srsgd", [5.0] * 4, restarts=[30, 60])
    again = result("again", "preresnet110", "srsgd", [6.0] * 4, restarts=[30, 60])
    exponential = result("exponential", "preresnet110", "srsgd", [4.0] * 4, restarts=[40, 50])
    deep = result("deep", "preresnet290", "srsgd", [4.0] * 4, restarts=[30, 60])
    short = result("short", "preresnet110", "srsgd", [7.0] * 2, restarts=[30, 60])
    sgd = result("sgd", "preresnet110", "momentum_sgd", [5.5] * 4)
    assert names([linear, again, sgd], "arch") == {
        "SRSGD": ["linear", "again"], "SGD + momentum": ["sgd"]
    }  # fmt: skip
    assert names([linear, exponential, deep], "arch") == {
        "SRSGD, restarts 30 60": ["linear", "deep"], "SRSGD, restarts 40 50": ["exponential"]
    }  # fmt: skip
    assert names([linear, short, deep], "epoch", "lr_drops") == {
        "SRSGD, preresnet110": ["linear", "short"], "SRSGD, preresnet290": ["deep"]
    }  # fmt: skip
    assert names([linear, short], "arch") == {
        "SRSGD, 4 epochs": ["linear"], "SRSGD, 2 epochs": ["short"]
    }  # fmt: skip
    assert names([linear, exponential], "restarts") == {"SRSGD": ["linear", "exponential"]}


def test_published_alone(tmp_path):
    out = tmp_path / "depth.png"
    assert plots.main(["depth", "--published", "imagenet", "-o", str(out)]) == 0
    assert is_png(out)


def test_series_are_by_epoch(tmp_path):
    result = read(tmp_path / write_result(tmp_path / "a", "wrn28_10", "srsgd", [50.0, 10.0]))
    epochs, accuracy = result.series("validation/main/accuracy")
    assert epochs.tolist() == [1, 2]
    assert accuracy.tolist() == [0.5, 0.9]
    assert result.error == pytest.approx(10)
    assert result.depth == 28


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["depth"], "no FOLDER: give folders of results of train.py"),
        (["loss", "--published", "cifar10"], "--published cifar10: only with depth"),
        (["loss", "{tmp}/nothing"], "config.resolved.yaml cannot be read"),
        (["depth", "{tmp}/nin"], "network 'nin' has no depth in its name"),
        (["restarts", "{tmp}/nin"], "has no setting `restarts`"),
        (["loss", "{tmp}/damaged"], "is damaged"),
        (["loss", "{tmp}/early"], "nothing was validated yet"),
    ],
)
def test_bad_folders(command, message, tmp_path, capsys):
    write_result(tmp_path / "nin", "nin", "momentum_sgd", [50.0])
    write_result(tmp_path / "early", "nin", "momentum_sgd", [])
    write_result(tmp_path / "damaged", "nin", "momentum_sgd", [50.0])
    (tmp_path / "damaged" / "log").write_text("[{")
    command = [part.format(tmp=tmp_path) for part in command]
    assert plots.main([*command, "-o", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
