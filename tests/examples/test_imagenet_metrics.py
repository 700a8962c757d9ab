"""Top-k, average precision and confusion against scikit-learn."""

import metrics
import numpy
import pytest

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture
def predictions():
    rng = numpy.random.default_rng(1)
    labels = rng.integers(0, 6, 200)
    scores = rng.standard_normal((200, 7)) + 1.5 * numpy.eye(7)[labels]
    return metrics.softmax(scores), labels


def test_top_k(predictions):
    scores, labels = predictions
    for k in (1, 3):
        expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert metrics.top_k(scores, labels, k) == pytest.approx(expected)
    assert metrics.top_k(scores, labels, 7) == metrics.top_k(scores, labels, 50) == 1


def test_average_precision(predictions):
    scores, labels = predictions
    found = metrics.average_precisions(scores, labels)
    for c in range(6):
        expected = sklearn_metrics.average_precision_score(labels == c, scores[:, c])
        assert found[c] == pytest.approx(expected)
    assert numpy.isnan(found[6])  # no image has this label
    assert metrics.mean_average_precision(scores, labels) == pytest.approx(found[:6].mean())


def tied(kind):
    rng = numpy.random.default_rng(3)
    labels = numpy.repeat(numpy.arange(6), 20)  # sorted, as make_list.py writes lists
    scores = {
        "constant": numpy.tile(numpy.linspace(0.05, 0.15, 6), (120, 1)),
        "two values": rng.integers(0, 2, (120, 6)) / 2,
        "rounded": rng.random((120, 6)).round(1),
        "half precision": rng.random((120, 6)).astype(numpy.float16),
        "saturated": metrics.softmax(200.0 * numpy.eye(6)[rng.integers(0, 6, 120)]),
        "zeros of either sign": rng.choice([0.0, -0.0, 1.0], (120, 6)),
        "infinite": rng.choice([-numpy.inf, 0.0], (120, 6)),
        "one tie": numpy.concatenate([rng.random((118, 6)), numpy.full((2, 6), 0.5)]),
    }[kind]
    return scores, labels


KINDS = ("constant", "two values", "rounded", "half precision", "saturated", "zeros of either sign",
         "one tie")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_average_precision_of_equal_scores_is_scikit_learns_in_any_order(kind):
    scores, labels = tied(kind)
    found = metrics.average_precisions(scores, labels)
    for c in range(6):
        expected = sklearn_metrics.average_precision_score(labels == c, scores[:, c])
        assert found[c] == pytest.approx(expected, rel=1e-12)
    for seed in range(3):
        order = numpy.random.default_rng(seed).permutation(len(labels))
        again = metrics.average_precisions(scores[order], labels[order])
        numpy.testing.assert_array_equal(again, found)


def test_average_precision_of_infinite_scores_does_not_depend_on_the_order():
    scores, labels = tied("infinite")  # which scikit-learn refuses
    finite = numpy.nan_to_num(scores, neginf=-1.0)
    found = metrics.average_precisions(scores, labels)
    numpy.testing.assert_array_equal(found, metrics.average_precisions(finite, labels))


def test_scores_that_are_no_numbers_have_no_mean_average_precision(predictions):
    scores, labels = predictions
    scores[7, 2] = numpy.nan
    found = metrics.average_precisions(scores, labels)
    assert numpy.isnan(found).tolist() == [False, False, True, False, False, False, True]
    assert numpy.isnan(metrics.mean_average_precision(scores, labels))
    assert numpy.isnan(metrics.average_precisions(scores[:0], labels[:0])).all()


def test_confusion(predictions):
    scores, labels = predictions
    expected = sklearn_metrics.confusion_matrix(labels, scores.argmax(axis=1), labels=range(7))
    numpy.testing.assert_array_equal(metrics.confusion(scores, labels), expected)


def test_softmax_of_large_scores():
    p = metrics.softmax(numpy.array([[1000.0, 1000.0], [-1000.0, 0.0]]))
    numpy.testing.assert_allclose(p, [[0.5, 0.5], [0, 1]])
