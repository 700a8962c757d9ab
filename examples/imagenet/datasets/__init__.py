"""Labelled images: list files, decoding, preprocessing, and the bundled digits."""
