"""ResNet-18: residual network of 18 layers, 11.7 million parameters at 1,000 classes.

Shared parts, names and sources are in `_resnet.py`.
"""

from __future__ import annotations

from suanli.core.types import Model
from suanli.models.networks._resnet import SOURCE, Basic, ResNet, Stem, small_stem


def build(*, classes: int, in_channels: int, image_size: tuple[int, int], stem: Stem = "auto") -> ResNet:
    """Images (B, in_channels, *image_size) to logits (B, classes). `stem` "small" is for images of at
    most 64 px, "large" for others; "auto" decides by `image_size`."""
    small = small_stem(stem, image_size)
    return ResNet(Basic, (2, 2, 2, 2), classes=classes, in_channels=in_channels, small=small)


MODEL = Model(name="resnet18", kinds=("image",), build=build, head="fc", source=SOURCE)
