"""Minimizing a badly conditioned quadratic with exact and noisy gradients.

f(x) = x.P.x / 2 - b.x with P tridiagonal (-1, 2, -1) and b = e_1. Its minimizer is
x*_i = 1 - i / (n + 1), its largest eigenvalue is below 4, so the step is 1/4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tools.momentum_rules import METHODS, Momentum, Restarts

STEP = 0.25
RECORDS = 400
"""How many points of each curve are kept for the plot."""


class Noise(NamedTuple):
    """Gradient noise: its standard deviation at update t, and the restarts used with it."""

    title: str
    sigma: Callable[[int], float]
    restarts: Restarts


INFINITY = float("inf")
NOISES = {
    "exact": Noise(
        "exact gradient", lambda t: 0.0, ((2000, 1000), (10000, 2000), (INFINITY, 4000))
    ),
    "constant": Noise("noise sigma = .001", lambda t: 0.001, ((INFINITY, 200),)),
    "decaying": Noise(
        "sigma = .1/(t/100+1)", lambda t: 0.1 / (t / 100 + 1), ((10000, 200), (30000, 400))
    ),
}

PUBLISHED = {
    "exact": (0.00128463030715, 0.00008518481265, 2.98596e-9, 2.1e-13, 0.0),
    "constant": (0.00136954892617, 0.00049446562066, 0.01741372840685, 0.0011655633656, 0.00069580930341),
    "decaying": (0.00126843834061, 0.00009387953987, 0.00044354496494, 0.00103712864786, 0.00003230506917),
}  # fmt: skip
"""The authors' result files, 14 places after the point, one run each."""


class Result(NamedTuple):
    """Final gaps (methods, runs) and the curves: iterations (r,) and gaps (r, methods, runs)."""

    final: np.ndarray
    iterations: np.ndarray
    curves: np.ndarray


def times_p(x: np.ndarray) -> np.ndarray:
    """Returns P.x along the last axis.

    Both neighbours are added before they are subtracted. That is the order in which a dense
    matrix product adds them up on common processors, and the adaptive restart depends on it.
    """
    neighbours = np.zeros_like(x)
    neighbours[..., 1:] = x[..., :-1]
    neighbours[..., :-1] += x[..., 1:]
    return 2 * x - neighbours


def gap(x: np.ndarray) -> np.ndarray:
    """Returns f(x) - f(x*) along the last axis, free of cancellation."""
    n = x.shape[-1]
    d = x - (1 - np.arange(1, n + 1) / (n + 1))
    inner = np.diff(d, axis=-1)
    return (d[..., 0] ** 2 + d[..., -1] ** 2 + np.sum(inner * inner, axis=-1)) / 2


def objective(x: np.ndarray) -> np.ndarray:
    """Returns f(x) of each run (runs, n) as it is written: to about 1e-15, by rounding."""
    return np.array([0.5 * np.dot(row, times_p(row)) - row[0] for row in x])


def simulate(
    n: int,
    iterations: int,
    noise: Noise,
    seeds: int,
    progress: Callable[[int], object] = lambda t: None,
    value: Callable[[np.ndarray], np.ndarray] = objective,
) -> Result:
    """Runs the five methods; the runs of one seed have the same noise.

    Args:
        n: Number of unknowns.
        iterations: Number of points, the start among them, as in the paper's programs.
        noise: The gradient noise.
        seeds: Number of runs of each method; one without noise.
        progress: Called with the number of each update.
        value: What the adaptive restart compares; ``gap`` is exact.
    """
    runs = seeds if noise.sigma(1) else 1
    generators = [np.random.default_rng(seed) for seed in range(runs)]
    rules = [Momentum(method, runs, noise.restarts) for method in METHODS]
    adaptive = METHODS.index("NAG adaptive restart")
    y = np.zeros((len(METHODS), runs, n))
    v = np.zeros_like(y)
    error = np.zeros((runs, n))
    last = value(v[adaptive])
    keep = set(np.unique(np.linspace(0, iterations - 1, RECORDS).astype(int)).tolist())
    curve = [(0, gap(y))]
    for t in range(1, iterations):
        g = times_p(y)
        g[..., 0] -= 1
        sigma = noise.sigma(t)
        if sigma:
            for generator, row in zip(generators, error, strict=True):
                generator.standard_normal(out=row)
            error *= sigma
            g += error
        g *= -STEP
        g += y
        mu = np.stack([rule.mu() for rule in rules])[..., None]
        y = g - v
        y *= mu
        y += g
        v = g
        current = value(v[adaptive])
        increased = current > last
        for rule in rules:
            rule.advance(t, lambda increased=increased: increased)
        last = current
        if t in keep:
            curve.append((t, gap(y)))
        progress(t)
    return Result(gap(y), np.array([t for t, _ in curve]), np.array([g for _, g in curve]))


class Distribution(NamedTuple):
    """The final gap of a method over all noises: mean, standard deviation, and sorted draws."""

    mean: float
    deviation: float
    draws: np.ndarray

    def tail(self, value: float) -> float:
        """Returns how likely a gap as far out as ``value`` is, on that side, doubled."""
        below = np.searchsorted(self.draws, value) / len(self.draws)
        return float(min(1.0, 2 * min(below, 1 - below)))


def distributions(
    n: int, iterations: int, noise: Noise, draws: int = 20000
) -> dict[str, Distribution]:
    """Returns the distribution of the final gap without running the methods on noise.

    P's eigenvectors decouple the errors: in each, (y, v) is a linear recursion with Gaussian noise,
    so its mean and covariance follow exactly, and with them those of the gap. The draws are from
    the final Gaussian. Not for the adaptive restart, which is not linear.
    """
    frequencies = np.arange(1, n + 1) * np.pi / (n + 1)
    eigenvalues = 2 - 2 * np.cos(frequencies)
    vectors = np.sqrt(2 / (n + 1)) * np.sin(np.outer(np.arange(1, n + 1), frequencies))
    start = vectors.T @ -(1 - np.arange(1, n + 1) / (n + 1))
    shrink = 1 - STEP * eigenvalues
    results = {}
    for method in METHODS:
        if method == "NAG adaptive restart":
            continue
        rule = Momentum(method, 1, noise.restarts)
        y, v = start.copy(), start.copy()
        yy, yv, vv = (np.zeros(n) for _ in range(3))
        for t in range(1, iterations):
            mu = float(rule.mu()[0])
            following = shrink * y
            variance = shrink**2 * yy + (STEP * noise.sigma(t)) ** 2
            covariance = shrink * yv
            y = (1 + mu) * following - mu * v
            yy = (1 + mu) ** 2 * variance - 2 * (1 + mu) * mu * covariance + mu**2 * vv
            yv = (1 + mu) * variance - mu * covariance
            vv = variance
            v = following
            rule.advance(t, lambda: np.array([False]))
        yy = np.maximum(yy, 0)  # it is 0 up to rounding where there is no noise
        mean = np.sum(eigenvalues * (y * y + yy)) / 2
        square = np.sum(eigenvalues**2 * (2 * yy**2 + 4 * y * y * yy)) / 4
        normal = np.random.default_rng(0)
        sample = np.empty(draws)
        for i in range(0, draws, 1000):
            z = y + np.sqrt(yy) * normal.standard_normal((min(1000, draws - i), n))
            sample[i : i + 1000] = z * z @ eigenvalues / 2
        results[method] = Distribution(float(mean), float(np.sqrt(square)), np.sort(sample))
    return results
