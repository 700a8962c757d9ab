"""Estimates of training steps from shapes: no data, no memory, no GPU."""
