"""A manager on a simulated GPU, for tests of what is the same on all devices."""

from tests.swap.cuda.conftest import make_rig

__all__ = ["make_rig"]
