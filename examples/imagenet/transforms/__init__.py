"""From a decoded image to a network's input."""

from transforms.crop_and_normalize import CropAndNormalize, load_mean

__all__ = ["CropAndNormalize", "load_mean"]
