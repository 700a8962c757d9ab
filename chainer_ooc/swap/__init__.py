"""The engine: moves storages out of a device's memory and back. It knows nothing of Chainer."""
