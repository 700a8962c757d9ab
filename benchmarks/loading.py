"""How fast batches are loaded: by threads, by processes, and by PyTorch's DataLoader if it is there.

    python benchmarks/loading.py --json benchmarks/results/loading.json

The table is that of torchnet's ImageNet training in Lua: the mean time of a fetch of 128 images with 4
workers, from disk and from memory, with the transforms of training and of testing. Here a fetch is
one ``next()`` and the joining of the examples to one array, one after the other without any computation between;
the first ones, in which workers start, are not counted. Images are cut out of photographs: 32x32 pixels in an
HDF5 file (cifar10), JPEG files of 500x375 (imagenet).

PyTorch's loader runs the same datasets, so the same decoding and transforms (``torch``), and those with
Pillow as decoder, as its users usually have it (``torch, Pillow``).

CPU s is the processor time of a fetch, of all processes together: unlike the mean it does not depend on what
else the machine does, nor on the number of its cores. The printed means are of 4 threads.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import training as harness

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "imagenet"))

import chainer_ooc  # noqa: F401  makes stock Chainer importable

# isort: split

from chainer.dataset import concat_examples
from datasets import decoding
from datasets.arrays import ArrayImages
from datasets.hdf5 import Hdf5Images, write_hdf5
from datasets.in_memory import InMemory
from datasets.iterators import make_iterator, start_worker_server
from datasets.labeled import LabeledImages, Source
from datasets.preprocessed import EpochOrder, PreprocessedImages
from PIL import Image
from transforms import training, validation
from transforms.colour import PUBLISHED

PRINTED = {
    ("cifar10", "disk", "train"): 0.01509,
    ("cifar10", "disk", "test"): 0.00953,
    ("cifar10", "memory", "train"): 0.00772,
    ("cifar10", "memory", "test"): 0.00557,
    ("imagenet", "disk", "train"): 0.34635,
    ("imagenet", "disk", "test"): 0.35729,
    ("imagenet", "memory", "train"): 0.34553,
    ("imagenet", "memory", "test"): 0.36107,
}
"""Seconds of a fetch that the Lua program's authors print, with 4 threads on a Core i7-4790K of 2014."""

SIZES = {"cifar10": (32, 32), "imagenet": (500, 375)}
INSIZES = {"cifar10": 32, "imagenet": 224}
LOADERS = ("serial", "thread", "process", "torch", "torch, Pillow")
WARM_UP = 3
SEED = (0, 0, 0)


def photographs() -> list[Image.Image]:
    """Return scikit-learn's photographs."""
    import sklearn

    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


def write(folder: Path, name: str, n: int) -> dict[str, Source]:
    """Write ``n`` images of a set; return them as they are on disk and in memory."""
    rng = np.random.default_rng(0)
    photos = photographs()
    width, height = SIZES[name]
    pairs, pixels = [], []
    for i in range(n):
        photo = photos[i % len(photos)]
        part = 0.15 if name == "cifar10" else rng.uniform(0.7, 1)
        w, h = int(photo.width * part), int(photo.height * part)
        x, y = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
        image = photo.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
        if name == "cifar10":
            pixels.append(np.asarray(image))
        else:
            image.save(folder / f"{i}.jpg", quality=92)
            pairs.append((f"{i}.jpg", i % 10))
    if name == "imagenet":
        files = LabeledImages(pairs, folder)
        return {"disk": files, "memory": InMemory(files, 2)}
    classes = [str(c) for c in range(10)]
    memory = ArrayImages(np.stack(pixels), np.arange(n) % 10, name, classes)
    write_hdf5(folder / "cifar10.h5", {"train": memory}, classes)
    return {"disk": Hdf5Images(folder / "cifar10.h5", "train"), "memory": memory}


class PillowOnly:
    """A dataset whose images Pillow decodes, in whatever process it is."""

    def __init__(self, dataset: PreprocessedImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        decoding.simplejpeg = None
        return self.dataset[i]


@contextlib.contextmanager
def batches(dataset: PreprocessedImages, loader: str, batch: int, workers: int) -> Iterator[Any]:
    """Give an endless iterator of batches as (array, array)."""
    if loader.startswith("torch"):
        import torch
        from torch.utils.data import DataLoader

        torch.set_num_threads(1)
        order = EpochOrder(len(dataset), SEED)
        samples = np.concatenate([order(np.arange(len(dataset)) * 0 + e * len(dataset), 0)
                                  for e in range(200)])  # fmt: skip
        chosen: Any = PillowOnly(dataset) if loader.endswith("Pillow") else dataset
        data_loader = DataLoader(
            chosen, batch, sampler=samples.tolist(), num_workers=workers, collate_fn=collate,
            multiprocessing_context="forkserver",
        )  # fmt: skip
        yield iter(data_loader)
        return
    iterator = make_iterator(dataset, batch, iterator=loader, workers=workers, seed=SEED)
    try:
        yield (concat_examples(examples) for examples in iterator)
    finally:
        iterator.finalize() if loader != "serial" else None


def collate(examples: list[Any]) -> Any:
    """Join examples in a worker, as the default does with arrays."""
    import torch

    x, t = zip(*examples, strict=True)
    return torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(t))


def measure(
    dataset: PreprocessedImages, loader: str, batch: int, workers: int, fetches: int, seconds: float
) -> dict[str, Any]:
    """Time fetches, at most so many and so long; also start-up and the first example's digest."""
    start = time.perf_counter()
    with batches(dataset, loader, batch, workers) as iterator:
        first = next(iterator)
        start_up = time.perf_counter() - start
        for _ in itertools.repeat(None, WARM_UP - 1):
            next(iterator)
        times: list[float] = []
        cpu = cpu_seconds()
        begin = last = time.perf_counter()
        while len(times) < fetches and last - begin < seconds:
            next(iterator)
            now = time.perf_counter()
            times.append(now - last)
            last = now
        cpu = cpu_seconds() - cpu
    return {
        "fetches": len(times),
        "mean": last / len(times) - begin / len(times),
        "min": min(times),
        "max": max(times),
        "total": last - begin,
        "images_per_second": batch * len(times) / (last - begin),
        "cpu_seconds": cpu / len(times),
        "start_up": start_up,
        "sum_of_first_batch": float(np.asarray(first[0], dtype=np.float64).sum()),
    }


def cpu_seconds() -> float:
    """Return the processor time of this process and of those it started that still run."""
    import psutil

    total = 0.0
    process = psutil.Process()
    for p in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = p.cpu_times()
            total += times.user + times.system
    return total


def has_torch() -> bool:
    """Tell whether PyTorch can be imported."""
    import importlib.util

    return importlib.util.find_spec("torch") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, help="default: all there are")
    parser.add_argument("--batchsize", "-B", type=int, default=128)
    parser.add_argument("--workers", "-j", type=int, default=4)
    parser.add_argument("--fetches", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60, help="at most, for each row")
    parser.add_argument("--images", type=int, nargs=2, default=[50_000, 2_000],
                        help="in the set of small images and in that of large ones")  # fmt: skip
    parser.add_argument("--json")
    args = parser.parse_args()
    start_worker_server()
    loaders = args.loaders or [x for x in LOADERS if has_torch() or not x.startswith("torch")]
    cores = min(args.workers, len(os.sched_getaffinity(0)))
    numbers = dict(zip(SIZES, args.images, strict=True))
    settings = {"batchsize": args.batchsize, "workers": args.workers, "cores": cores,
                "load_before": os.getloadavg()[0]}  # fmt: skip
    results, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sets:
            sources = write(Path(folder), name, numbers[name])
            for storage, kind in itertools.product(("disk", "memory"), ("train", "test")):
                values = PUBLISHED[name]
                if kind == "train":
                    transform, seed = training("torch7", INSIZES[name], *values), (0, 0, 1)
                else:
                    transform, seed = validation("torch7", INSIZES[name], *values), None
                dataset = PreprocessedImages(sources[storage], transform, seed)
                for loader in loaders:
                    row = measure(
                        dataset, loader, args.batchsize, args.workers, args.fetches, args.seconds
                    )
                    printed = PRINTED[name, storage, kind]
                    row = {"set": name, "storage": storage, "transforms": kind, "loader": loader,
                           "printed_mean": printed,
                           "printed_core_seconds": printed * 4, **row}  # fmt: skip
                    results.append(row)
                    rows.append([row[k] for k in COLUMNS])
                    print(f"{name} {storage} {kind} {loader}: mean {row['mean']:.4f} s, processor time "
                          f"{row['cpu_seconds']:.4f} s", file=sys.stderr)  # fmt: skip
                    harness.write(args.json, {"settings": settings, "rows": results})
    harness.print_table(list(COLUMNS.values()), rows)


COLUMNS = {
    "set": "set",
    "storage": "storage",
    "transforms": "transforms",
    "loader": "loader",
    "fetches": "fetches",
    "mean": "mean s",
    "min": "min s",
    "max": "max s",
    "total": "total s",
    "images_per_second": "images/s",
    "cpu_seconds": "CPU s",
    "printed_mean": "printed: mean s",
    "printed_core_seconds": "printed: mean s x 4",
}

if __name__ == "__main__":
    main()
