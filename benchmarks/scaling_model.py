"""From one machine to thousands of ranks on paper: the formulas of docs/scaling.md.

    python benchmarks/scaling_model.py [--ranks 1 4 16 64 256 1024 4096] [--gradients 102MB] [--compute 0.1]
        [--batchsize 32] [--swap 0] ...

prints, for each number of ranks with the same batch each, the parts of an iteration's time, the efficiency of
weak scaling, and the hours of the training. The defaults are one rank per GPU, ResNet-50 of single precision
on nodes of four GPUs with one network card of 100 Gbit/s; every figure is an option.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of the cluster, and what its ranks share.

    Attributes:
        ranks: Ranks on it.
        link: Bandwidth between two of its GPUs (bytes/s).
        network: Bandwidth of its network cards together, each way (bytes/s).
        latency: Of a message between nodes (s).
        disk: Bandwidth of its own disk (bytes/s).
        host: Bandwidth between its host memory and its GPUs together (bytes/s).
    """

    ranks: int = 4
    link: float = 50e9
    network: float = 12.5e9
    latency: float = 5e-6
    disk: float = 2e9
    host: float = 40e9


@dataclasses.dataclass(frozen=True)
class Step:
    """What an iteration needs of each rank.

    Attributes:
        compute: Time of forward, backward and update (s).
        jitter: Standard deviation of it (s).
        gradients: Size of all gradients (bytes).
        images: Images of its batch.
        image_bytes: Size of an image in its file (bytes).
        swap_host, swap_disk: Bytes moved out and in, between GPU and host memory, and to and from the disk.
    """

    compute: float
    gradients: float
    images: int = 32
    jitter: float = 0.0
    image_bytes: float = 110e3
    swap_host: float = 0.0
    swap_disk: float = 0.0


def ring_seconds(n: int, nbytes: float, latency: float, bandwidth: float) -> float:
    """Return the time (s) of a ring all-reduce of ``nbytes`` over ``n`` ranks.

    It takes n-1 steps of reduce-scatter and n-1 of all-gather, each of 1/n of the bytes (Patarasuk and Yuan 2009).
    """
    return 2 * (n - 1) * latency + 2 * (n - 1) / n * nbytes / bandwidth


def tree_seconds(n: int, nbytes: float, latency: float, bandwidth: float) -> float:
    """Return the time (s) with the ring's bandwidth and a logarithmic number of steps.

    Recursive halving and doubling (Thakur et al. 2005) and NCCL's double binary trees come near it.
    """
    return 2 * math.ceil(math.log2(n)) * latency + 2 * (n - 1) / n * nbytes / bandwidth


def allreduce_seconds(n: int, nbytes: float, node: Node, tree: bool = False) -> float:
    """Return the time (s) in two levels: within the nodes, and between them over the shared network card.

    Each of a node's g ranks exchanges 1/g of the bytes with the other nodes, so the card carries them once.
    """
    inside = min(n, node.ranks)
    nodes = math.ceil(n / node.ranks)
    between = tree_seconds if tree else ring_seconds
    seconds = 2 * (inside - 1) / inside * nbytes / node.link
    return seconds + (between(nodes, nbytes, node.latency, node.network) if nodes > 1 else 0.0)


def iteration(
    n: int, step: Step, node: Node, storage: float, overlap: bool = False, tree: bool = False
) -> dict[str, float]:
    """Return the parts of an iteration's time on ``n`` ranks, and their sum (all in s).

    Args:
        n: Number of ranks.
        step: What each of them needs.
        node: What they share.
        storage: Bandwidth of the file system that all nodes read images from (bytes/s).
        overlap: Whether the all-reduce runs beside the next iteration (double buffering).
        tree: Whether the nodes form a tree instead of a ring.
    """
    local = min(n, node.ranks)
    swap = max(local * step.swap_host / node.host, local * step.swap_disk / node.disk)
    data = n * step.images * step.image_bytes / storage
    # The largest of n normal numbers is about this far above their mean.
    wait = step.jitter * math.sqrt(2 * math.log(n)) if n > 1 else 0.0
    reduce = allreduce_seconds(n, step.gradients, node, tree)
    busy = max(step.compute + wait, swap, data)
    return {
        "compute": step.compute,
        "wait": wait,
        "swap": swap,
        "data": data,
        "allreduce": reduce,
        "total": max(busy, reduce) if overlap else busy + reduce,
    }


def main() -> None:
    """Parse arguments, compute, print."""
    from training import ROOT, print_table

    sys.path.insert(0, str(ROOT))
    from chainer_ooc.settings import parse_bytes

    def size(text: str) -> float:
        return float(parse_bytes("size", text))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024, 4096])
    add(
        "--gradients",
        type=size,
        default=102.2e6,
        metavar="SIZE",
        help="default 102.2e6: 25.6 M float32",
    )
    add(
        "--compute",
        type=float,
        default=0.1,
        metavar="SECONDS",
        help="of an iteration (default 0.1)",
    )
    add(
        "--jitter",
        type=float,
        default=0.002,
        metavar="SECONDS",
        help="its deviation (default 0.002)",
    )
    add("--batchsize", type=int, default=32, help="images per rank (default 32)")
    add(
        "--image",
        type=size,
        default=110e3,
        metavar="SIZE",
        help="of a file (default 110 kB, ImageNet's)",
    )
    add(
        "--swap-host",
        type=size,
        default=0.0,
        metavar="SIZE",
        help="moved per rank and iteration, to and from host memory",
    )
    add(
        "--swap-disk",
        type=size,
        default=0.0,
        metavar="SIZE",
        help="the same, to and from the node's disk",
    )
    add("--ranks-per-node", type=int, default=4)
    add(
        "--link",
        type=size,
        default=50e9,
        metavar="SIZE",
        help="per second, inside a node (default 50 GB)",
    )
    add(
        "--network",
        type=size,
        default=12.5e9,
        metavar="SIZE",
        help="per second and node (default 12.5 GB)",
    )
    add(
        "--latency", type=float, default=5e-6, metavar="SECONDS", help="of a message (default 5e-6)"
    )
    add("--disk", type=size, default=2e9, metavar="SIZE", help="per second and node (default 2 GB)")
    add(
        "--host",
        type=size,
        default=40e9,
        metavar="SIZE",
        help="per second and node (default 40 GB)",
    )
    add(
        "--storage",
        type=size,
        default=100e9,
        metavar="SIZE",
        help="per second, of all (default 100 GB)",
    )
    add("--overlap", action="store_true", help="double buffering")
    add("--tree", action="store_true", help="between nodes a tree, not a ring")
    add("--epochs", type=int, default=90)
    add("--dataset", type=int, default=1_281_167, help="images of an epoch (default ImageNet's)")
    options = parser.parse_args()
    step = Step(options.compute, options.gradients, options.batchsize, options.jitter, options.image,
                options.swap_host, options.swap_disk)  # fmt: skip
    node = Node(options.ranks_per_node, options.link, options.network, options.latency, options.disk,
                options.host)  # fmt: skip
    alone = iteration(1, step, node, options.storage, options.overlap, options.tree)["total"]
    rows = []
    for n in options.ranks:
        parts = iteration(n, step, node, options.storage, options.overlap, options.tree)
        batch = n * options.batchsize
        iterations = math.ceil(options.dataset / batch) * options.epochs
        milliseconds = [
            f"{parts[key] * 1e3:.1f}" for key in ("allreduce", "wait", "swap", "data", "total")
        ]
        rows.append(
            [n, batch, *milliseconds, f"{alone / parts['total']:.0%}", math.ceil(options.dataset / batch),
             f"{iterations * parts['total'] / 3600:.2f}"]
        )  # fmt: skip
    header = ["ranks", "batch", "all-reduce ms", "wait ms", "swap ms", "data ms", "iteration ms", "efficiency",
              "iterations/epoch", "hours"]  # fmt: skip
    print_table(header, rows)


if __name__ == "__main__":
    main()
