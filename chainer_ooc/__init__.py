"""Train Chainer models that are larger than the memory they run in."""

__version__ = "0.1.0"
