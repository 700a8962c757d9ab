"""What connects the engine with Chainer's graph: the only code that patches Chainer."""
