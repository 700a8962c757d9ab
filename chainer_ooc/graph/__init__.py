"""The connection between the engine and Chainer's graph: the only code that patches Chainer."""
