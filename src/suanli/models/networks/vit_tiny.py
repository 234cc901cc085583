"""The tiny vision transformer: 12 blocks of width 192 with 3 heads, 5.7 million parameters.

The patch size follows the image, so that a small image still gives about 8x8 tokens. From scratch it needs far more
data or epochs than a convolutional network of the same cost. Shared parts, names and sources are in `_vit.py`; the tiny
size is that of Touvron et al., arXiv:2012.12877.
"""

from __future__ import annotations

from suanli.core.types import Model
from suanli.models.networks._vit import SOURCE, VisionTransformer
from suanli.models.networks._vit import build as build_vit
from suanli.models.networks._vit_files import convert


def build(
    *, classes: int, in_channels: int, image_size: tuple[int, int], patch: int | None = None
) -> VisionTransformer:
    """Images (B, in_channels, *image_size) to logits (B, classes). `patch` in px; None: by image size."""
    return build_vit(classes=classes, in_channels=in_channels, image_size=image_size, width=192, patch=patch)


# `vit` recognises published files of this size, too.
MODEL = Model(name="vit_tiny", kinds=("image",), build=build, head="head", source=SOURCE, convert=convert)
