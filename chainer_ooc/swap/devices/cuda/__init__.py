"""A GPU's memory: copies on streams to pinned host memory and disk."""
