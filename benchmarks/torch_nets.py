"""ResNet-50 and GoogLeNet in torch, as Chainer has them, and the ways in which torch trains with less memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CLASSES = 1000


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch normalization."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out, eps=2e-5),
    )


def _relu(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the first has the stride."""

    def __init__(self, channels: int, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _relu(_conv(channels, width, 1, stride)),
            _relu(_conv(width, width, 3)),
            _conv(width, out, 1),
        )
        self.shortcut = nn.Identity() if channels == out else _conv(channels, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Inception(nn.Module):
    """Four paths, side by side."""

    def __init__(
        self, channels: int, one: int, in3: int, out3: int, in5: int, out5: int, pool: int
    ) -> None:
        super().__init__()

        def conv(channels: int, out: int, kernel: int) -> nn.Sequential:
            return _relu(nn.Conv2d(channels, out, kernel, padding=kernel // 2))

        self.paths = nn.ModuleList(
            [
                conv(channels, one, 1),
                nn.Sequential(conv(channels, in3, 1), conv(in3, out3, 3)),
                nn.Sequential(conv(channels, in5, 1), conv(in5, out5, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, pool, 1)),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([path(x) for path in self.paths], 1)


class Net(nn.Module):
    """Blocks, then the average over all places and one linear layer."""

    def __init__(self, blocks: list[nn.Module], channels: int, dropout: float = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, CLASSES)
        )

    def forward(self, x: torch.Tensor, checkpointed: bool = False) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return self.head(x)


def resnet50() -> Net:
    """ResNet-50 with the stride in the first convolution of a block, as Chainer's."""
    stem = _relu(
        nn.Conv2d(3, 64, 7, 2, 3),
        nn.BatchNorm2d(64, eps=2e-5),
    )
    blocks: list[nn.Module] = [stem, nn.MaxPool2d(3, 2, ceil_mode=True)]
    channels = 64
    for number, count in enumerate((3, 4, 6, 3)):
        width = 64 << number
        for index in range(count):
            stride = 2 if index == 0 and number else 1
            blocks.append(Bottleneck(channels, width, 4 * width, stride))
            channels = 4 * width
    return Net(blocks, channels)


def googlenet() -> Net:
    """GoogLeNet of 2014, without its auxiliary classifiers, as ``L.GoogLeNet`` computes its last layer."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    blocks: list[nn.Module] = [
        _relu(nn.Conv2d(3, 64, 7, 2, 3)),
        nn.Sequential(pool(), nn.LocalResponseNorm(5)),
        _relu(nn.Conv2d(64, 64, 1)),
        nn.Sequential(_relu(nn.Conv2d(64, 192, 3, padding=1)), nn.LocalResponseNorm(5)),
        pool(),
        Inception(192, 64, 96, 128, 16, 32, 32),
        Inception(256, 128, 128, 192, 32, 96, 64),
        pool(),
        Inception(480, 192, 96, 208, 16, 48, 64),
        Inception(512, 160, 112, 224, 24, 64, 64),
        Inception(512, 128, 128, 256, 24, 64, 64),
        Inception(512, 112, 144, 288, 32, 64, 64),
        Inception(528, 256, 160, 320, 32, 128, 128),
        pool(),
        Inception(832, 256, 160, 320, 32, 128, 128),
        Inception(832, 384, 192, 384, 48, 128, 128),
    ]
    return Net(blocks, 1024, 0.4)


NETS = {"resnet50": resnet50, "googlenet": googlenet}


def steps(net: str, side: int, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return training steps of one network, by how it keeps what backward needs.

    Args:
        net: A key of ``NETS``.
        side: Height and width of the images (pixels).
        batch: How many there are.
        device: ``"cuda"`` or ``"cpu"``.
    """
    torch.manual_seed(0)
    model = NETS[net]().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.rand(batch, 3, side, side, device=device)
    t = torch.randint(0, CLASSES, (batch,), device=device)

    def step(way: str = "eager", autocast: bool = False) -> None:
        on_cpu = torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda")
        saved = on_cpu if way == "save_on_cpu" else contextlib.nullcontext()
        with saved, torch.autocast(device, torch.float16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x, way == "checkpoint"), t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def in_tf32() -> None:
        torch.backends.cudnn.allow_tf32 = True
        step()
        torch.backends.cudnn.allow_tf32 = False

    return {
        "eager": step,
        "checkpoint": lambda: step("checkpoint"),
        "save_on_cpu": lambda: step("save_on_cpu"),
        "eager, tf32": in_tf32,
        "eager, autocast to float16": lambda: step(autocast=True),
    }
