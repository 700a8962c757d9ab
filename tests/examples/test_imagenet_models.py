"""The networks take every allowed input size and have the published numbers of parameters."""

import itertools
import math

import chainer
import models
import numpy
import pytest
from arch_names import ARCH_NAMES, CIFAR
from errors import InputError
from models import alexnets, cifar, overfeat
from models.googlenetbn import auxiliary_pool

# Numbers of parameters of Chainer's own examples with 1000 classes.
PARAMETERS = {
    "alex": 62_378_344,
    "googlenet": 13_378_280,
    "googlenetbn": 17_681_464,
    "nin": 7_595_176,
    "resnet50": 25_557_096,
    "resnext50": 25_028_968,
}

# With 1000 classes: the "num_params" of torchvision's pretrained weights, which are of the same
# networks (and, for the last two, those of the library timm).
TORCHVISION = {
    "alexnetowt": 61_100_840,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50v15": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext101_32x8d": 88_791_336,
    "squeezenet": 1_248_424,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "resnext101": 44_177_704,
    "resnet200": 64_673_832,
}

# Millions, with 10 classes. From the papers: ResNet table 6, DenseNet table 2 (BC), Wide ResNet
# tables 4 and 5 (there also the pre-activated networks). From the results of the CIFAR programs
# that the SRSGD authors built on (pytorch-classification): the others.
CIFAR_MILLIONS = {
    "cifar_resnet20": (0.27, 2),
    "cifar_resnet32": (0.46, 2),
    "cifar_resnet44": (0.66, 2),
    "cifar_resnet56": (0.85, 2),
    "cifar_resnet110": (1.7, 1),
    "preresnet164": (1.7, 1),
    "preresnet1001": (10.2, 1),
    "densenet_bc100_12": (0.77, 2),
    "densenet_bc190_40": (25.62, 2),
    "cifar_resnext29_8x64d": (34.43, 2),
    "cifar_resnext29_16x64d": (68.16, 2),
    "cifar_alexnet": (2.47, 2),
    "cifar_vgg19_bn": (20.04, 2),
    "wrn28_10": (36.5, 1),
    "wrn40_4": (8.9, 1),
    "wrn16_8": (11.0, 1),
}
# Exact where the published number is rounded otherwise: our shortcuts project (as SRSGD's do),
# those of the ResNet paper's CIFAR networks pad with zeros, which saves 2,752 parameters.
CIFAR_EXACT = {
    "cifar_resnet20": 269_722 + 2_752,
    "cifar_resnet32": 464_154 + 2_752,
    "cifar_resnet110": 1_727_962 + 2_752,
    "wrn28_10": 36_479_194,
    "densenet_bc100_12": 769_162,
    "densenet_bc190_40": 25_624_430,
}

MINIMUM = {
    "alex": 39,
    "alexnet": 63,
    "alexnetbn": 63,
    "alexnetowtbn": 63,
    "cifar_alexnet": 21,
    "cifar_resnet20": 4,
    "cifar_vgg11_bn": 32,
    "densenet121": 32,
    "densenet_bc100_12": 4,
    "googlenet": 224,
    "googlenet_torch7": 63,
    "googlenetbn": 43,
    "nin": 39,
    "overfeat": 71,
    "preresnet20": 4,
    "resnet18": 32,
    "resnet50": 32,
    "resnet50v15": 32,
    "resnext50": 32,
    "squeezenet": 21,
    "vgg13_bn": 32,
    "vggbn": 32,
    "vggbnv2": 32,
}


@pytest.fixture
def shapes_only(monkeypatch):
    """Parameters without memory or values: building any network takes no time."""

    def array(initializer, shape, xp, dtype=None, device=None):
        return numpy.broadcast_to(numpy.float32(0), shape)

    monkeypatch.setattr(chainer.initializers, "generate_array", array)


def count(arch, insize=None, n_classes=None):
    small = arch in CIFAR
    return models.create(
        arch, insize or (32 if small else 224), n_classes or (10 if small else 1000)
    ).count_params()


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_chainers_number_of_parameters(arch, shapes_only):
    assert models.create(arch, 224).count_params() == PARAMETERS[arch]


@pytest.mark.parametrize("arch", TORCHVISION)
def test_published_number_of_parameters(arch, shapes_only):
    assert count(arch) == TORCHVISION[arch]


@pytest.mark.parametrize("arch", CIFAR_MILLIONS)
def test_published_number_of_parameters_for_cifar(arch, shapes_only):
    millions, digits = CIFAR_MILLIONS[arch]
    # One unit of the last printed digit: some tables cut where others round.
    assert count(arch) / 1e6 == pytest.approx(millions, abs=1.3 * 10**-digits)
    if arch in CIFAR_EXACT:
        assert count(arch) == CIFAR_EXACT[arch]


def conv(in_size, out_size, ksize, bias=True):
    return in_size * out_size * ksize**2 + bias * out_size


def test_torch7_networks_count_as_their_definitions(shapes_only):
    def fc(*sizes):
        return sum(conv(a, b, 1) for a, b in itertools.pairwise(sizes))

    one_column = (
        conv(3, 64, 11) + conv(64, 192, 5) + conv(192, 384, 3) + conv(384, 256, 3)
        + conv(256, 256, 3)
    )  # fmt: skip
    column = (
        conv(3, 48, 11) + conv(48, 128, 5) + conv(128, 192, 3) + conv(192, 192, 3)
        + conv(192, 128, 3)
    )  # fmt: skip
    normalized = 2 * (64 + 192 + 384 + 256 + 256)
    assert count("alexnet") == 2 * column + fc(9216, 4096, 4096, 1000)
    assert count("alexnetowtbn") == (
        one_column + normalized + fc(9216, 4096, 4096, 1000) + 4 * 4096
    )
    assert count("alexnetbn") == one_column + normalized + 2 * 256 + fc(256, 1000)
    assert count("overfeat") == (
        conv(3, 96, 11) + conv(96, 256, 5) + conv(256, 512, 3) + conv(512, 1024, 3)
        + conv(1024, 1024, 3) + fc(1024 * 25, 3072, 4096, 1000)
    )  # fmt: skip
    nin = 0
    for in_size, size, ksize in ((3, 96, 11), (96, 256, 5), (256, 384, 3), (384, 1024, 3)):
        nin += conv(in_size, size, ksize) + 2 * conv(size, size, 1) + 6 * size
    assert count("ninbn") == nin + fc(1024, 1000)
    vgg_a = TORCHVISION["vgg11"] - fc(25088, 4096, 4096, 1000)
    assert count("vggbn") == TORCHVISION["vgg11"] + 4 * 4096
    assert count("vggbnv2") == vgg_a + 2 * 512 + fc(512, 1000)


def test_torch7_googlenet_counts_as_its_definition(shapes_only):
    # 1x1; 1x1 and 3x3; 1x1 and twice 3x3; 1x1 after the pooling
    modules = [
        (192, 64, 64, 64, 64, 96, 32), (256, 64, 64, 96, 64, 96, 64), (320, 0, 128, 160, 64, 96, 0),
        (576, 224, 64, 96, 96, 128, 128), (576, 192, 96, 128, 96, 128, 128),
        (576, 160, 128, 160, 128, 160, 96), (576, 96, 128, 192, 160, 192, 96),
        (576, 0, 128, 192, 192, 256, 0),
        (1024, 352, 192, 320, 160, 224, 128), (1024, 352, 192, 320, 192, 224, 128),
    ]  # fmt: skip
    n = conv(3, 64, 7) + conv(64, 64, 1) + conv(64, 192, 3)
    for size, single, a, b, c, d, projected in modules:
        n += conv(size, a, 1) + conv(a, b, 3) + conv(size, c, 1) + conv(c, d, 3) + conv(d, d, 3)
        n += conv(size, single, 1) + conv(size, projected, 1)
    n += conv(576, 576, 2) + conv(1024, 1024, 2) + conv(1024, 1000, 1)
    n += conv(576, 128, 1) + conv(2048, 768, 1) + conv(768, 1000, 1)
    assert count("googlenet_torch7") == count("googlenet_torch7", 63) == n


@pytest.mark.parametrize("depth", [110, 290, 470, 650, 1001])
def test_preresnet_has_the_layers_of_its_name(depth, shapes_only):
    model = models.create(f"preresnet{depth}", 32, 10)
    convolutions = [
        link for name, link in model.namedlinks()
        if isinstance(link, chainer.links.Convolution2D) and not name.endswith("shortcut")
    ]  # fmt: skip
    assert len(convolutions) + 1 == depth  # and the linear layer


def test_every_name_is_a_network():
    assert tuple(models.ARCHS) == ARCH_NAMES
    assert len(set(ARCH_NAMES)) == len(ARCH_NAMES)
    assert len({id(cls) for cls in models.ARCHS.values()}) == len(ARCH_NAMES)


def test_unknown_network():
    with pytest.raises(InputError, match="--arch vgg12: no such network; choose one of alex, "):
        models.create("vgg12", 224)


@pytest.mark.parametrize("arch", ["alex", "googlenet", "googlenetbn", "resnet50"])
def test_parameters_stay_when_the_input_doubles(arch, shapes_only):
    assert models.create(arch, 448).count_params() == PARAMETERS[arch]


@pytest.mark.parametrize("arch", ["alexnet", "overfeat", "vgg16", "vggbnv2", "resnet152"])
def test_built_parameters_stay_when_the_input_grows(arch, shapes_only):
    assert count(arch, 224) == count(arch, 300) == count(arch, 2240)


@pytest.mark.parametrize("arch", ["googlenetbn", "nin", "resnet50", "resnext50"])
def test_parameters_stay_at_the_smallest_input(arch, shapes_only):
    assert models.create(arch, MINIMUM[arch]).count_params() == PARAMETERS[arch]


def train_once(model, insize):
    x = numpy.random.default_rng(0).standard_normal((2, 3, insize, insize), dtype=numpy.float32)
    loss = model(x, numpy.array([0, 4], dtype=numpy.int32))
    model.cleargrads()
    loss.backward()
    assert loss.shape == ()
    assert numpy.isfinite(loss.array)
    assert all(p.grad is not None for p in model.params())


@pytest.mark.parametrize("arch", sorted(set(MINIMUM) - {"googlenet"}))
def test_smallest_input_trains_and_one_less_is_an_error(arch):
    insize = MINIMUM[arch]
    train_once(models.create(arch, insize, n_classes=5), insize)
    with pytest.raises(InputError, match=rf"--insize {insize - 1}: {arch} takes {insize} or more"):
        models.create(arch, insize - 1)


@pytest.mark.parametrize(
    "cls",
    [
        cifar._named(cifar.CifarResNeXt, "small", groups=2, n=1, widths=(64, 256, 512, 64)),
        cifar._wide(10, 2),
    ],
)
def test_wide_networks_train(cls):
    train_once(cls(8, 5), 8)


@pytest.mark.parametrize(
    ("arch", "insize", "weight"), [("squeezenet", 32, 1), ("googlenet_torch7", 63, 1.3)]
)
def test_loss_begins_with_that_of_guessing(arch, insize, weight):
    """Without normalization, activations that grow would make it tens or hundreds, and then NaN."""
    numpy.random.seed(0)
    model = models.create(arch, insize, 1000)
    x = numpy.random.default_rng(0).standard_normal((2, 3, insize, insize), dtype=numpy.float32)
    with chainer.no_backprop_mode():
        loss = float(model(x, numpy.array([1, 2], numpy.int32)).array)
    assert loss == pytest.approx(weight * math.log(1000), rel=0.05)


def test_ninbn_trains_at_any_size():
    train_once(models.create("ninbn", 33, 5), 33)


@pytest.mark.slow
def test_a_thousand_layers_train():
    train_once(models.create("preresnet1001", 4, 5), 4)


@pytest.mark.parametrize("insize", [63, 64, 95, 130])
def test_sides_are_those_of_the_maps(insize):
    x = numpy.zeros((1, 3, insize, insize), numpy.float32)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        features = alexnets.Features((4, 4, 4, 4, 4))
        assert features(x).shape[2] == alexnets.Features.side(insize)


@pytest.mark.parametrize("insize", [72, 103])
def test_overfeat_runs_at_odd_sizes(insize, shapes_only):
    x = numpy.zeros((1, 3, insize, insize), numpy.float32)
    model = models.create("overfeat", insize, 3)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        assert model.scores(x).shape == (1, 3)


def test_published_sides():
    assert alexnets.Features.side(224) == alexnets.CELLS == 6
    assert overfeat.side(224) == overfeat.CELLS == 5


def test_names_of_chainers_parameters(shapes_only):
    """Model files of Chainer's example and of earlier versions keep fitting."""
    names = {name: p.shape for name, p in models.create("resnet50", 32).namedparams()}
    assert len(names) == 162
    assert names["/conv1/b"] == (64,)
    assert names["/res2/0/conv4/W"] == (256, 64, 1, 1)
    assert names["/res4/5/bn3/gamma"] == (1024,)
    assert names["/fc/W"] == (1000, 2048)


def test_stride_is_in_the_3x3_but_for_chainers_resnet50(shapes_only):
    strides = {
        arch: [
            getattr(models.create(arch, 224).res3[0], conv).stride for conv in ("conv1", "conv2")
        ]
        for arch in ("resnet50", "resnet50v15", "resnext50", "resnet101")
    }
    assert strides.pop("resnet50") == [(2, 2), (1, 1)]
    assert all(s == [(1, 1), (2, 2)] for s in strides.values())


@pytest.mark.parametrize("insize", [112, 225, 336])
def test_googlenet_takes_multiples_of_224_only(insize):
    with pytest.raises(InputError, match=rf"--insize {insize}: .*multiples of 224 \(224, 448, 672"):
        models.create("googlenet", insize)


def test_auxiliary_pool_gives_four_by_four():
    for n in range(4, 300):
        kernel, stride = auxiliary_pool(n)
        assert kernel >= 1
        assert chainer.utils.conv.get_conv_outsize(n, kernel, stride, 0) == 4


def test_auxiliary_pool_is_the_published_one_at_224():
    assert auxiliary_pool(14) == auxiliary_pool(15) == (5, 3)


def test_reports_loss_and_accuracy():
    model = models.create("nin", 39, n_classes=3)
    observation = {}
    reporter = chainer.Reporter()
    reporter.add_observer("main", model)
    with reporter.scope(observation):
        model(numpy.zeros((2, 3, 39, 39), numpy.float32), numpy.zeros(2, numpy.int32))
    assert {"main/loss", "main/accuracy"} <= observation.keys()


@pytest.mark.parametrize(("arch", "insize"), [("googlenetbn", 43), ("nin", 39), ("preresnet11", 8)])
def test_predicts_what_it_classifies(arch, insize):
    model = models.create(arch, insize, 4)
    rng = numpy.random.default_rng(0)
    x = rng.standard_normal((3, 3, insize, insize), dtype=numpy.float32)
    t = numpy.array([0, 1, 2], numpy.int32)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        scores = model.predict(x)
        observation = {}
        reporter = chainer.Reporter()
        reporter.add_observer("main", model)
        with reporter.scope(observation):
            model(x, t)
    assert scores.shape == (3, 4)
    key = "loss3" if arch == "googlenetbn" else "loss"
    loss = next(v for k, v in observation.items() if k.endswith(key))
    expected = chainer.functions.softmax_cross_entropy(scores, t)
    numpy.testing.assert_array_equal(chainer.as_array(loss), expected.array)
