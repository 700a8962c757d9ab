"""NumPy's memory: arrays move to the swap file and back, and large allocations ask for room first."""

from chainer_ooc.swap.devices.ram.device import RamDevice

__all__ = ["RamDevice"]
