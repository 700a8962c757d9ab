"""NumPy's memory: arrays go to the swap file and back, and NumPy's allocations are announced."""

from chainer_ooc.swap.devices.ram.device import RamDevice

__all__ = ["RamDevice"]
