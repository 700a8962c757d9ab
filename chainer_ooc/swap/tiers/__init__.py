"""The places where copies lie: the swap file, and pinned host memory before it."""
