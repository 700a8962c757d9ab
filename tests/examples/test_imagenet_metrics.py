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


def test_confusion(predictions):
    scores, labels = predictions
    expected = sklearn_metrics.confusion_matrix(labels, scores.argmax(axis=1), labels=range(7))
    numpy.testing.assert_array_equal(metrics.confusion(scores, labels), expected)


def test_softmax_of_large_scores():
    p = metrics.softmax(numpy.array([[1000.0, 1000.0], [-1000.0, 0.0]]))
    numpy.testing.assert_allclose(p, [[0.5, 0.5], [0, 1]])
