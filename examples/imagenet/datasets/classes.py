"""Which number a class has: the training set says so, for the validation set and for later runs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy
from errors import InputError

Names = list[str] | None
"""Names of the classes 0, 1, and so on; None: the data say numbers, which mean the same everywhere."""


def fingerprint(names: list[str]) -> str:
    """Returns a short text that is another one for other names, or for another order of them."""
    return f"{len(names)} ({hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]})"


def numbers_are_no_names(names: list[str]) -> Names:
    """Returns the names, or None if they are the classes' own numbers."""
    return None if names == [str(i) for i in range(len(names))] else names


def match_labels(
    labels: numpy.ndarray, names: Names, training: Names, n_training: int, where: str
) -> numpy.ndarray:
    """Returns labels as the training set numbers the classes.

    Args:
        labels: The labels of a set, int32 (n,).
        names: The names of its classes.
        training: The names of the training set's classes.
        n_training: How many classes a training set without names has.
        where: What errors call the set.

    Raises:
        InputError: It has a class that the training set has not, or one cannot tell.
    """
    if names == training:
        return labels
    highest = int(labels.max())
    if training is None:
        if len(names or ()) == n_training:
            return labels
        raise InputError(
            f"{where}: has {len(names or ())} classes with names, but the training set has "
            f"{n_training} classes with numbers only, so that one cannot tell which is which; give both "
            f"as folders, or both as lists"
        )
    if names is None:
        if highest < len(training):
            return labels
        raise InputError(
            f"{where}: class {highest} is not one of the training set's {len(training)} classes; remove "
            f"its images, or correct the number"
        )
    if highest >= len(names):
        raise InputError(f"{where}: class {highest} has no name among its {len(names)}")
    used = [names[label] for label in numpy.unique(labels)]
    unknown = sorted(set(used) - set(training))
    if unknown:
        raise InputError(
            f"{where}: {unknown[0]!r} is not a class of the training set; remove its images, or "
            f"correct the name"
        )
    twice = [name for one in (names, training) for name, n in Counter(one).items() if n > 1]
    if twice:
        raise InputError(
            f"{where}: two classes have the name {twice[0]!r}, so that one cannot tell which is which in "
            f"the training set; give each its own name"
        )
    numbers = {name: number for number, name in enumerate(training)}
    table = numpy.array([numbers.get(name, -1) for name in names], dtype=numpy.int32)
    return table[labels]
