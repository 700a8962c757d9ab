"""Validation in pieces that fit into memory, and statistics averaged over the ranks."""

import chainer
import chainer.functions as F
import chainer.links as L
import evaluation
import metrics
import models
import numpy
import pytest
from chainer import iterators
from datasets.preprocessed import BadExample
from errors import InputError
from evaluation import AverageStatistics, Evaluator, RecomputeStatistics
from models.common import ImageClassifier
from world import World

import chainer_ooc
from chainer_ooc.swap.system.memory import ResidentMemory

CPU = chainer.get_device("@numpy")


def examples(n, shape, classes, seed=0):
    rng = numpy.random.default_rng(seed)
    x = rng.standard_normal((n, *shape)).astype(numpy.float32)
    t = rng.integers(classes, size=n).astype(numpy.int32)
    return [(x[i], t[i]) for i in range(n)]


def evaluate(model, data, batchsize):
    """Returns the result, and the evaluator."""
    iterator = iterators.SerialIterator(data, batchsize, repeat=False, shuffle=False)
    evaluator = Evaluator(iterator, model, CPU, World(), lambda trainer: None)
    evaluator.name = "validation"
    return evaluator(), evaluator


class Small(chainer.Chain):
    """A classifier that has memory for so many images only."""

    def __init__(self, most):
        super().__init__()
        self.most = most
        self.sizes = []
        with self.init_scope():
            self.fc = L.Linear(3, 4, initialW=numpy.arange(12.0).reshape(4, 3) % 5 - 2)

    def forward(self, x, t):
        if len(x) > self.most:
            raise MemoryError
        self.sizes.append(len(x))
        h = self.fc(x)
        loss = F.softmax_cross_entropy(h, t)
        chainer.report({"loss": loss, "accuracy": F.accuracy(h, t)}, self)
        return loss


def test_a_batch_that_does_not_fit_is_divided_and_the_mean_stays():
    data = examples(50, (3,), 4)
    model = Small(1000)
    whole, evaluator = evaluate(model, data, 20)
    assert (model.sizes, evaluator.piece) == ([20, 20, 10], None)
    model.most, model.sizes = 7, []
    divided, evaluator = evaluate(model, data, 20)
    assert (model.sizes, evaluator.piece) == ([5] * 10, 5)
    assert divided == pytest.approx(whole, rel=1e-6)
    # It is the mean over the images, not that of the batches, whose last is smaller.
    with chainer.using_config("train", False):
        h = model.fc(numpy.stack([x for x, _ in data])).array
    right = h.argmax(axis=1) == numpy.array([t for _, t in data])
    assert whole["validation/main/accuracy"] == pytest.approx(right.mean())
    model.most = 0
    with pytest.raises(MemoryError):
        evaluate(model, data, 20)


def test_pieces_are_part_of_a_snapshot(tmp_path):
    evaluator = evaluate(Small(7), examples(50, (3,), 4), 20)[1]
    chainer.serializers.save_npz(tmp_path / "e.npz", evaluator)
    again = evaluate(Small(1000), examples(50, (3,), 4), 20)[1]
    chainer.serializers.load_npz(tmp_path / "e.npz", again)
    assert again.piece == 5


@pytest.mark.extension  # without it nothing is an error before it was seen not to fit
def test_under_the_limit_a_large_batch_gives_the_result_of_the_whole():
    numpy.random.seed(0)
    model = models.create("nin", 96, 10)
    data = examples(48, (3, 96, 96), 10)
    whole, _ = evaluate(model, data, 48)
    limit = ResidentMemory().bytes() + (48 << 20)
    with chainer_ooc.out_of_core_mode(limit=limit):
        divided, evaluator = evaluate(model, data, 48)
    assert evaluator.piece is not None
    assert evaluator.piece < 48
    assert divided["validation/main/accuracy"] == whole["validation/main/accuracy"]
    assert divided["validation/main/loss"] == pytest.approx(whole["validation/main/loss"], rel=1e-6)


class Two(World):
    """This rank and another one, whose values are this one's plus 2."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def sum(self, values):
        mine = numpy.asarray(values, dtype=numpy.float64)
        return mine + (mine + 2)


def test_statistics_are_averaged_and_counts_are_not():
    model = chainer.Sequential(L.BatchNormalization(3), L.BatchNormalization(2))
    model[0].avg_mean[...] = [1, 2, 3]
    model[1].avg_var[...] = [4, 5]
    model[1].N = 7
    AverageStatistics(model, Two())()
    numpy.testing.assert_array_equal(model[0].avg_mean, [2, 3, 4])
    numpy.testing.assert_array_equal(model[0].avg_var, [2, 2, 2])
    numpy.testing.assert_array_equal(model[1].avg_var, [5, 6])
    assert model[1].N == 7
    assert model[1].avg_var.dtype == numpy.float32
    AverageStatistics(chainer.Sequential(L.Linear(2, 2)), Two())()


class Normalized(ImageClassifier):
    """A network with batch normalization and dropout that has memory for so many images only."""

    def __init__(self, most=1000):
        super().__init__(1, 7)
        self.most = most
        self.dropped = False
        with self.init_scope():
            self.bn = L.BatchNormalization(7)

    def forward(self, x, t):
        h = self.bn(x)
        if len(x) > self.most:
            raise MemoryError
        self.dropped |= not numpy.array_equal(F.dropout(h, 0.5).array, h.array)
        return self.classify(h, t)


def recompute(model, data, n, batchsize, save=lambda trainer: None):
    RecomputeStatistics(model, data, n, batchsize, CPU, World(), save)(None)


@pytest.mark.parametrize("most", [1000, 3])
def test_statistics_are_made_anew_of_training_images(most):
    data = examples(54, (7,), 7)
    x = numpy.stack([image for image, _ in data[:48]])
    model = Normalized(most)
    model.bn.avg_var.fill(numpy.inf)  # as of a training that has gone wrong
    decay = model.bn.decay
    with chainer.using_config("train", True):
        recompute(model, data, 48, 16)
        assert chainer.config.train
    numpy.testing.assert_allclose(model.bn.avg_mean, x.mean(axis=0), rtol=1e-5, atol=1e-6)
    size = 16 if most > 16 else 2  # halved until it fits
    parts = x.reshape(-1, size, 7)
    expected = parts.var(axis=1, ddof=1).mean(axis=0)
    numpy.testing.assert_allclose(model.bn.avg_var, expected, rtol=1e-5)
    assert not model.dropped
    assert model.bn.decay == decay
    recompute(model, data, 1000, 54)  # no more than there are
    x = numpy.stack([image for image, _ in data])
    numpy.testing.assert_allclose(model.bn.avg_mean, x.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_statistics_without_normalization_or_of_a_bad_image():
    recompute(Scored(), [BadExample("never looked at")], 1, 1)
    saved = []
    data = [*examples(3, (7,), 7), BadExample("image x.jpg: cannot be decoded")]
    with pytest.raises(InputError, match=r"x\.jpg: cannot be decoded"):
        recompute(Normalized(), data, 4, 2, saved.append)
    assert saved == [None]


class Scored(ImageClassifier):
    """A network whose scores are its input's."""

    def __init__(self, most=1000):
        super().__init__(1, 7)
        self.most = most

    def forward(self, x, t):
        if len(x) > self.most:
            raise MemoryError
        return self.classify(F.identity(x), t)


class TwoRanks(World):
    """This rank and another one with a part of the images, whose figures are known."""

    def __init__(self, totals, scores):
        super().__init__()
        self.totals, self.scores = list(totals), scores

    def sum(self, values):
        return numpy.asarray(values) + self.totals.pop(0)

    def gather(self, value):
        return [value, self.scores]


def test_top_five_and_mean_average_precision_are_those_of_all_images_however_divided():
    data = examples(53, (7,), 7)
    scores, labels = (numpy.stack(part) for part in zip(*data, strict=True))
    probabilities = metrics.softmax(scores.astype(numpy.float64))
    expected = {
        "top5": metrics.top_k(scores, labels, 5),
        "mAP": metrics.mean_average_precision(probabilities, labels),
    }
    assert 0.1 < expected["mAP"] < expected["top5"] < 1
    for model in (Scored(), Scored(most=3)):
        result, evaluator = evaluate(model, data, 20)
        for key, value in expected.items():
            assert result[f"validation/main/{key}"] == pytest.approx(value)
        numpy.testing.assert_array_equal(evaluator.confusion, metrics.confusion(scores, labels))
    # The other rank has the images from the 30th on.
    model = Scored()
    others = [numpy.array([23]), None]
    rest = iterators.SerialIterator(data[30:], 23, repeat=False, shuffle=False)
    other = Evaluator(rest, model, CPU, World(), lambda trainer: None)
    other.name, other._scores = "validation", []
    other.confusion = numpy.zeros((7, 7), numpy.int64)
    reporter = chainer.Reporter()
    reporter.add_observer("validation/main", model)
    with reporter:
        others[1] = other._sums(data[30:])
    others.append(other.confusion.ravel())
    iterator = iterators.SerialIterator(data[:30], 20, repeat=False, shuffle=False)
    world = TwoRanks(others, other._scores[0])
    evaluator = Evaluator(iterator, model, CPU, world, lambda trainer: None)
    evaluator.name = "validation"
    result = evaluator()
    for key, value in expected.items():
        assert result[f"validation/main/{key}"] == pytest.approx(value)
    numpy.testing.assert_array_equal(evaluator.confusion, metrics.confusion(scores, labels))
    assert evaluate(Small(9), examples(9, (3,), 4), 5)[1].confusion is None  # shows no scores


def test_large_sets_and_few_classes_have_no_figures_that_say_nothing(monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_SCORES", 10 * 7 - 1)
    assert "validation/main/mAP" not in evaluate(Scored(), examples(10, (7,), 7), 5)[0]
    assert "validation/main/mAP" in evaluate(Scored(), examples(9, (7,), 7), 5)[0]
    assert "validation/main/top5" not in evaluate(Small(9), examples(9, (3,), 4), 5)[0]
