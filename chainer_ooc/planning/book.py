"""PlanBook: which plan the iteration that runs follows, found out as it runs."""

from __future__ import annotations

from collections import OrderedDict

from chainer_ooc.planning.pacing import Measured, Pacer
from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.profile import Profile, Step

__all__ = ["PlanBook"]

#: So many plans are kept; the one not followed for longest is forgotten.
_MOST = 32


class _Page:
    def __init__(self, profile: Profile, plan: Plan) -> None:
        self.keys = [step.key for step in profile.steps]
        self.pacer = Pacer(plan)


class PlanBook:
    """Keeps the plans of several graphs side by side and follows the one that fits.

    The executor tells each step's key before the step runs. As long as an iteration is the beginning of one that has
    a plan, :meth:`advance` gives that plan; the step that differs ends it, and what comes until :meth:`begin` is
    served on demand. Where two graphs begin alike, the plan followed last is taken until they differ.
    """

    def __init__(self) -> None:
        self._pages: OrderedDict[str, _Page] = OrderedDict()
        self._fitting: list[str] = []
        self._position = -1

    def __len__(self) -> int:
        """The number of plans."""
        return len(self._pages)

    def add(self, profile: Profile, plan: Plan) -> None:
        """Keep the plan of a graph in place of an earlier one."""
        if plan.signature != profile.signature:
            raise ValueError(
                f"the plan is of graph {plan.signature}, the profile of {profile.signature}; "
                "make a plan from this profile"
            )
        self._pages[profile.signature] = _Page(profile, plan)
        self._pages.move_to_end(profile.signature)
        while len(self._pages) > _MOST:
            self._pages.popitem(last=False)

    def begin(self) -> None:
        """Begin an iteration."""
        self._fitting = list(reversed(self._pages))
        self._position = -1

    def advance(self, step: Step | str) -> tuple[Plan, int] | None:
        """Take note of the step that is about to run.

        Args:
            step: The step, or its key.

        Returns:
            The plan that fits all steps so far and the step's number in it, or ``None`` if there is none.
        """
        key = step if isinstance(step, str) else step.key
        self._position += 1
        self._fitting = [
            signature
            for signature in self._fitting
            if signature in self._pages and self._has(self._pages[signature], key)
        ]
        if not self._fitting:
            return None
        return self._pages[self._fitting[0]].pacer.plan, self._position

    def finish(self, measured: Measured | None = None) -> str | None:
        """End an iteration; what was measured moves the copies of its plan.

        Returns:
            The signature of the plan that was followed to its end, or ``None``: then the iteration is
            to be recorded, and planned.
        """
        done = [s for s in self._fitting if self._position + 1 == len(self._pages[s].keys)]
        self._fitting = []
        if not done:
            return None
        self._pages.move_to_end(done[0])
        if measured is not None:
            self._pages[done[0]].pacer.update(measured)
        return done[0]

    def _has(self, page: _Page, key: str) -> bool:
        return self._position < len(page.keys) and page.keys[self._position] == key
