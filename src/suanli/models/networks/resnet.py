"""Residual networks of any depth, by default ResNet-101 with 44.5 million parameters. ResNet-152 has depths [3,8,36,3].

Shared parts, names and sources are in `_resnet.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from suanli.core.types import Json, Model, Shapes
from suanli.models.networks._published import confirm, outline
from suanli.models.networks._resnet import (
    NAMED,
    SOURCE,
    Basic,
    Bottleneck,
    ResNet,
    Stem,
    convert,
    depths_of,
    small_stem,
    stem_of,
)

BLOCKS: dict[str, type[Basic | Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}


def build(
    *,
    classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    block: Literal["basic", "bottleneck"] = "bottleneck",
    depths: Sequence[int] = (3, 4, 23, 3),
    stem: Stem = "auto",
) -> ResNet:
    """Images (B, in_channels, *image_size) to logits (B, classes). `depths` are those of the four stages. `stem`
    "small" is for images of at most 64 px, "large" for others; "auto" decides by `image_size`. Raises ValueError for
    another number of stages or another block."""
    if len(depths) != 4 or min(depths) < 1 or block not in BLOCKS:
        raise ValueError(f"resnet needs four depths and basic or bottleneck, not {depths} and {block!r}")
    small = small_stem(stem, image_size)
    return ResNet(BLOCKS[block], depths, classes=classes, in_channels=in_channels, small=small)


def recognize(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:
    tensors = convert(outline(shapes))
    block, depths = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic", depths_of(tensors)
    plain = str(config.get("architecture", "resnet101")).removeprefix("tv_").removeprefix("resnet").isdecimal()
    if 0 in depths or (block, depths) in NAMED or not plain:
        return None
    args: dict[str, Json] = {"block": block, "depths": list(depths), "stem": stem_of(tensors, config)}
    return confirm(args, build, tensors, "fc")


MODEL = Model(
    name="resnet", kinds=("image",), build=build, head="fc", source=SOURCE, recognize=recognize, convert=convert
)
