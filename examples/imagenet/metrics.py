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

    It is that of scikit-learn's ``average_precision_score``: the sum of (R_n - R_(n-1)) P_n, where
    P_n and R_n are precision and recall of the images with the n highest different scores. Images
    of equal scores count together, so their order does not matter. (scikit-learn itself takes
    about 100 MiB of memory, which would count in every figure of a run.)

    Args:
        scores: (images, classes), comparable between images: probabilities. With a NaN among them
            there is no order, and the result of its class is NaN.
        labels: (images,), integers.
    """
    result = np.full(scores.shape[1], np.nan)
    if not len(labels):
        return result
    for c in np.flatnonzero(~np.isnan(scores).any(axis=0)):
        order = np.argsort(-scores[:, c])
        ranked = scores[order, c]
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        hits = np.cumsum(labels[order] == c)[last]  # among the images of the highest scores
        if hits[-1]:
            recalled = np.diff(hits, prepend=0) / hits[-1]
            result[c] = np.sum(recalled * hits / (last + 1))
    return result


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of the average precisions of the classes that have images; NaN with NaN scores."""
    if np.isnan(scores).any():
        return float("nan")
    return float(np.nanmean(average_precisions(scores, labels)))


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how often an image of class i (row) is taken for class j (column), int64."""
    n = scores.shape[1]
    return np.bincount(labels * n + scores.argmax(axis=1), minlength=n * n).reshape(n, n)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns the probabilities of scores (images, classes)."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
