"""The memory of a GPU: CuPy's allocator, streams, and the way to pinned memory and disk."""
