"""Pure functions over recorded iterations: what to keep, swap or recompute, and when each copy starts."""
