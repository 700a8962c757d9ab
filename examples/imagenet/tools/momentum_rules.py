"""The five gradient methods that the paper on scheduled restarts compares (arXiv:2002.10583).

All of them do, with their own momentum mu_t::

    v_{t+1} = y_t - step * gradient(y_t)
    y_{t+1} = v_{t+1} + mu_t * (v_{t+1} - v_t)

A rule keeps one count k per run (1 after a restart) and gives mu for several runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

METHODS = ("GD", "GD + momentum", "NAG", "NAG adaptive restart", "NAG scheduled restart")

Restarts = Sequence[tuple[float, int | None]]
"""(until, period): before update ``until`` the count restarts after ``period`` updates; a period of
None: the count stays as it is."""


class Momentum:
    """mu of each run, and the rule that moves it on.

    Args:
        method: One of METHODS.
        runs: Number of runs.
        restarts: The restart schedule of the last method.
        constant: mu of ``GD + momentum``.
    """

    def __init__(
        self, method: str, runs: int, restarts: Restarts = (), constant: float = 0.9
    ) -> None:
        self.method = method
        self._k = np.ones(runs)
        self._restarts = restarts
        self._constant = {"GD": 0.0, "GD + momentum": constant}.get(method)

    def mu(self) -> np.ndarray:
        """Returns mu of the next update, shape (runs,), float64."""
        if self._constant is not None:
            return np.full(self._k.shape, self._constant)
        return (self._k - 1) / (self._k + 2)

    def advance(self, t: int, increased: Callable[[], np.ndarray]) -> None:
        """Moves on after update t (counted from 1).

        Args:
            t: The update.
            increased: Tells for each run whether the objective at v has increased; asked only by
                the adaptive restart.
        """
        if self.method == "NAG":
            self._k += 1
        elif self.method == "NAG adaptive restart":
            self._k = np.where(increased(), 1, self._k + 1)
        elif self.method == "NAG scheduled restart":
            period = next((f for until, f in self._restarts if t < until), None)
            if period is not None:
                self._k = np.where(self._k >= period, 1, self._k + 1)
