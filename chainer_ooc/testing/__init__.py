"""Help for tests: prove that a program computes the same bits when its arrays really move."""

from chainer_ooc.testing.equality import assert_same_bits
from chainer_ooc.testing.force_copies import Moved, force_copies

__all__ = ["Moved", "assert_same_bits", "force_copies"]
