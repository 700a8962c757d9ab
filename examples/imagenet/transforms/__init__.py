"""From a decoded image to a network's input.

``CropAndNormalize`` is the transform of Chainer's ImageNet example, with a mean image;
``training`` and ``validation`` make those of other recipes by name; ``Compose`` joins steps:

    geometry   Scale, RandomScale, Resize, CenterCrop, RandomCrop, RandomSizedCrop, TenCrop,
               HorizontalFlip, Rotation, Warp
    colour     ToFloat, Normalize, Brightness, Contrast, Saturation, ColorJitter, Lighting,
               HSVJitter, Noise, Smoothing
"""

from transforms.compose import AUGMENTATIONS, Compose, training, validation
from transforms.crop_and_normalize import CropAndNormalize, load_mean

__all__ = ["AUGMENTATIONS", "Compose", "CropAndNormalize", "load_mean", "training", "validation"]
