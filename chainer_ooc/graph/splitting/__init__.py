"""Run a function in pieces that fit into memory, with the bits of the whole."""
