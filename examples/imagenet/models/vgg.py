"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), configurations A, B, D and E.

For ImageNet with three fully connected layers: plain, with batch normalization after each
convolution, and the two forms of Torch7's programs (``vggbn``: after two of the fully connected
layers; ``vggbnv2``: the average of the last map is normalized and classified). For CIFAR with one.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import global_average, grid_average
from models.layers import ConvBN, ScoredClassifier, convolution, max_pool

CELLS = 7
"""Side of the map before the first fully connected layer at 224 pixels."""

REPEATS = {
    "A": (1, 1, 2, 2, 2),
    "B": (2, 2, 2, 2, 2),
    "D": (2, 2, 3, 3, 3),
    "E": (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


class Features(chainer.ChainList):
    """Five stages of 3x3 convolutions, each halved by a pooling.

    Args:
        configuration: A, B, D or E.
        normalize: Whether batch normalization follows each convolution.
    """

    def __init__(self, configuration: str, normalize: bool) -> None:
        super().__init__()
        in_size = 3
        for repeats, width in zip(REPEATS[configuration], WIDTHS, strict=True):
            stage = chainer.ChainList()
            for _ in range(repeats):
                stage.append(
                    ConvBN(in_size, width, 3, pad=1, bias=True)
                    if normalize
                    else convolution(in_size, width, 3, pad=1, bias=True)
                )
                in_size = width
            self.append(stage)

    def forward(self, x: Variable) -> Variable:
        for stage in self:
            for conv in stage:
                x = F.relu(conv(x)) if isinstance(conv, L.Convolution2D) else conv(x)
            x = max_pool(x, 2, 2)
        return x


class VGG(ScoredClassifier):
    """The network for ImageNet.

    Larger inputs are averaged to 7x7 before the first fully connected layer, so that the
    parameters stay the same; smaller ones make it smaller.
    """

    insize_min = 32
    configuration = "D"
    normalize = False
    normalize_fc = False

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        self.cells = min(CELLS, insize // 32)
        with self.init_scope():
            self.features = Features(self.configuration, self.normalize)
            self.fc6 = L.Linear(512 * self.cells**2, 4096)
            self.fc7 = L.Linear(4096, 4096)
            self.fc8 = L.Linear(4096, n_classes)
            if self.normalize_fc:
                self.bn6 = L.BatchNormalization(4096, eps=1e-3)
                self.bn7 = L.BatchNormalization(4096, eps=1e-3)

    def scores(self, x: Variable) -> Variable:
        h = grid_average(self.features(x), self.cells)
        h = F.relu(self.fc6(h))
        h = F.dropout(self.bn6(h) if self.normalize_fc else h)
        h = F.relu(self.fc7(h))
        h = F.dropout(self.bn7(h) if self.normalize_fc else h)
        return self.fc8(h)


class AveragedVGG(ScoredClassifier):
    """Configuration A whose last map's average is normalized and classified."""

    insize_min = 32

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.features = Features("A", normalize=False)
            self.bn = L.BatchNormalization(512, eps=1e-3)
            self.fc = L.Linear(512, n_classes)

    def scores(self, x: Variable) -> Variable:
        return self.fc(self.bn(global_average(self.features(x))))


class CifarVGG(ScoredClassifier):
    """The network for 32 pixels: the average of the last map (1x1 there) is classified."""

    insize_min = 32
    configuration = "D"
    normalize = False

    def __init__(self, insize: int = 32, n_classes: int = 10) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.features = Features(self.configuration, self.normalize)
            self.fc = L.Linear(512, n_classes)

    def scores(self, x: Variable) -> Variable:
        return self.fc(global_average(self.features(x)))


def _named(base: type[ScoredClassifier], **attributes: object) -> type[ScoredClassifier]:
    name = base.__name__ + "".join(str(value) for value in attributes.values() if value is not True)
    return type(name, (base,), {"__doc__": base.__doc__, "__module__": __name__, **attributes})


_DEPTHS = {"A": 11, "B": 13, "D": 16, "E": 19}

ARCHS: dict[str, type[ScoredClassifier]] = {
    "vggbn": _named(VGG, configuration="A", normalize_fc=True),
    "vggbnv2": AveragedVGG,
}
for _letter, _depth in _DEPTHS.items():
    ARCHS[f"vgg{_depth}"] = _named(VGG, configuration=_letter)
    ARCHS[f"vgg{_depth}_bn"] = _named(VGG, configuration=_letter, normalize=True)
    ARCHS[f"cifar_vgg{_depth}"] = _named(CifarVGG, configuration=_letter)
    ARCHS[f"cifar_vgg{_depth}_bn"] = _named(CifarVGG, configuration=_letter, normalize=True)
