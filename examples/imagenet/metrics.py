"""What scores say beside accuracy: top-k, mean average precision, confusion."""

from __future__ import annotations

import numpy as np


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the part of the images whose label is among the k highest scores.

    Args:
        scores: (images, classes).
        labels: (images,), integers.
        k: At least 1; with as many as there are classes it is 1.
    """
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float(np.mean(np.any(best == labels[:, None], axis=1)))


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns each class's average precision, (classes,); NaN where it has no image.

    Images are ranked by their score for the class; the precision is averaged over the places of
    those that belong to it.

    Args:
        scores: (images, classes), comparable between images: probabilities.
        labels: (images,), integers.
    """
    result = np.full(scores.shape[1], np.nan)
    places = np.arange(1, len(labels) + 1)
    for c in range(scores.shape[1]):
        order = np.argsort(-scores[:, c], kind="stable")
        hits = labels[order] == c
        if hits.any():
            result[c] = np.mean(np.cumsum(hits)[hits] / places[hits])
    return result


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of the average precisions of the classes that have images."""
    return float(np.nanmean(average_precisions(scores, labels)))


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how often an image of class i (row) is taken for class j (column), int64."""
    n = scores.shape[1]
    return np.bincount(labels * n + scores.argmax(axis=1), minlength=n * n).reshape(n, n)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns the probabilities of scores (images, classes)."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
