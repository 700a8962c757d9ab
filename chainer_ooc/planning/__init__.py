"""Plan an iteration from its record: what to keep, swap or recompute, and when each copy begins. Pure functions."""
