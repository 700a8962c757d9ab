"""The six networks take every allowed input size and keep their published parameters."""

import chainer
import models
import numpy
import pytest
from errors import InputError
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
MINIMUM = {
    "alex": 39,
    "googlenet": 224,
    "googlenetbn": 43,
    "nin": 39,
    "resnet50": 32,
    "resnext50": 32,
}


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_published_number_of_parameters(arch):
    assert models.create(arch, 224).count_params() == PARAMETERS[arch]


@pytest.mark.parametrize("arch", ["alex", "googlenet", "googlenetbn", "resnet50"])
def test_parameters_stay_when_the_input_doubles(arch):
    assert models.create(arch, 448).count_params() == PARAMETERS[arch]


@pytest.mark.parametrize("arch", ["googlenetbn", "nin", "resnet50", "resnext50"])
def test_parameters_stay_at_the_smallest_input(arch):
    assert models.create(arch, MINIMUM[arch]).count_params() == PARAMETERS[arch]


@pytest.mark.parametrize("arch", sorted(set(PARAMETERS) - {"googlenet"}))
def test_smallest_input_trains_and_one_less_is_an_error(arch):
    insize = MINIMUM[arch]
    model = models.create(arch, insize, n_classes=5)
    x = numpy.random.default_rng(0).standard_normal((2, 3, insize, insize), dtype=numpy.float32)
    loss = model(x, numpy.array([0, 4], dtype=numpy.int32))
    model.cleargrads()
    loss.backward()
    assert loss.shape == ()
    assert numpy.isfinite(loss.array)
    assert all(p.grad is not None for p in model.params())
    with pytest.raises(InputError, match=rf"--insize {insize - 1}: {arch} takes {insize} or more"):
        models.create(arch, insize - 1)


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
