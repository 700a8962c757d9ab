#!/usr/bin/env python
"""Validates the model of a finished run: top-1, top-5, mAP and the confusion matrix.

    python examples/imagenet/tools/evaluate.py result [--ten-crop]

Writes evaluation.json, confusion.csv and confusion.png to the folder of the results.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import launcher

if "numpy" not in sys.modules:
    launcher.limit_threads()

import chainer_ooc  # noqa: F401  first: it makes stock Chainer importable

# isort: split

import chainer
import data
import devices
import metrics
import models
import numpy as np
from chainer.dataset import concat_examples
from config import read_file
from errors import InputError
from files import write_text
from provenance import CONFIG_FILE, read_classes
from reports.confusion import draw_confusion
from snapshot_files import load_npz
from training import first_error
from world import World

from tools.common import Parser, print_table, progress, run


def latest_model(folder: Path) -> Path:
    """Returns the model of the most iterations in a folder of results.

    Raises:
        InputError: There is none.
    """
    found = [p for p in folder.glob("model_iter_*") if p.name.rpartition("_")[2].isdecimal()]
    if not found:
        raise InputError(f"{folder}: has no model_iter_N; give a folder of results of a run that "
                         f"is done, or a model with --model")  # fmt: skip
    return max(found, key=lambda p: int(p.name.rpartition("_")[2]))


def predict(model: chainer.Chain, images: Any, batchsize: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probabilities (images, classes) and labels (images,) of a validation set.

    Those of an image that is several crops are the means of theirs.
    """
    probabilities, labels = [], []
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        n = len(images)
        for start in progress(range(0, n, batchsize), unit="batch"):
            batch = [images[i] for i in range(start, min(start + batchsize, n))]
            error = first_error(batch)
            if error is not None:
                raise InputError(error)
            x, t = concat_examples(batch, model.device)
            n_crops = 1 if x.ndim == 4 else x.shape[1]
            scores = model.predict(x.reshape(-1, *x.shape[-3:])).array
            each = metrics.softmax(chainer.get_device("@numpy").send(scores).astype(np.float64))
            probabilities.append(each.reshape(len(t), n_crops, -1).mean(axis=1))
            labels.append(chainer.get_device("@numpy").send(t))
    return np.concatenate(probabilities), np.concatenate(labels)


def evaluate(args: Namespace) -> dict[str, Any]:
    """Validates as the arguments say; returns what evaluation.json holds, and the matrix."""
    file = args.result / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{args.result}: has no {CONFIG_FILE}; give a folder of results")
    config, _ = read_file(file)
    path = args.model or latest_model(args.result)
    gpu, _ = devices.use_gpu(args.gpu, 1)
    model = models.create(config.arch, config.insize, config.n_classes)
    load_npz(path, model, "--model")
    model.to_device(devices.device_name(args.gpu, World(), gpu))
    classes = read_classes(args.result)
    images = data.load(config, World(), print, args.ten_crop, classes).val
    batchsize = args.val_batchsize or config.val_batchsize
    if args.ten_crop and args.val_batchsize is None:
        batchsize = max(batchsize // 10, 1)
    probabilities, labels = predict(model, images, batchsize)
    return {
        "model": str(path),
        "images": len(labels),
        "top-1": metrics.top_k(probabilities, labels, 1),
        "top-5": metrics.top_k(probabilities, labels, 5),
        "mAP": metrics.mean_average_precision(probabilities, labels),
        "loss": float(-np.mean(np.log(probabilities[np.arange(len(labels)), labels] + 1e-300))),
        "confusion": metrics.confusion(probabilities, labels),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("result", type=Path, help="folder of the results of train.py")
    add("--model", type=Path, metavar="FILE", help="the model (default: the latest one there)")
    add("--val_batchsize", "-b", type=int, metavar="N", help="images at once (default: the run's)")
    add("--ten-crop", action="store_true", help="mean over ten crops: corners, middle, mirrored")
    add("--gpu", "-g", type=int, nargs=1, metavar="ID", help="-1: none (default: if there is one)")
    # fmt: on
    args = parser.parse_args(argv)

    def tool() -> int:
        result = evaluate(args)
        matrix = result.pop("confusion")
        write_text(args.result / "evaluation.json", json.dumps(result, indent=1) + "\n")
        rows = "\n".join(",".join(map(str, row)) for row in matrix.tolist())
        write_text(args.result / "confusion.csv", rows + "\n")
        draw_confusion(matrix, args.result / "confusion.png")
        print_table(
            ("images", "loss", "top-1", "top-5", "mAP"),
            [(result["images"], *(f"{result[k]:.4f}" for k in ("loss", "top-1", "top-5", "mAP")))],
        )
        return 0

    return run(tool)


if __name__ == "__main__":
    sys.exit(main())
