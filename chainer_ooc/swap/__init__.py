"""The engine: it moves allocations out of a device's memory and back. It knows nothing of Chainer."""
