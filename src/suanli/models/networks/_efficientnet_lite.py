"""EfficientNet-Lite: EfficientNet without squeeze and excitation, with ReLU6, so that it can be quantised well.

Parameter names are those of timm; files with the names of the port that packages ship are renamed. Padding and the
epsilon of the norms are TensorFlow's, where the weights come from; timm's own `efficientnet_lite0` has PyTorch's.

Source: Tan and Le, "EfficientNet", arXiv:1905.11946; the Lite versions are those of the authors' repository (2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from suanli.core.types import Json, Model, Shapes
from suanli.models.networks._mobile import (
    DepthwiseSeparable,
    InvertedResidual,
    Style,
    divisible,
    initialize,
)
from suanli.models.networks._published import confirm, outline, rename

STAGES = (  # of inverted residuals: depth, kernel, stride, channels
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
)
FEATURES = 1280


class EfficientNetLite(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes)."""

    def __init__(
        self, *, classes: int, in_channels: int, width: float, depths: tuple[int, ...], style: Style, dropout: float
    ) -> None:
        super().__init__()
        self.conv_stem = style.conv(in_channels, 32, 3, 2)
        self.bn1 = style.norm(32)
        channels = divisible(16 * width)
        stages = [nn.Sequential(DepthwiseSeparable(style, 32, channels, 3, 1))]
        for (_, kernel, stride, base), depth in zip(STAGES, depths[1:], strict=True):
            blocks = []
            for number in range(depth):
                before, channels = channels, divisible(base * width)
                blocks.append(
                    InvertedResidual(style, before, 6 * before, channels, kernel, stride if number == 0 else 1)
                )
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = style.conv(channels, FEATURES, 1)
        self.bn2 = style.norm(FEATURES)
        self.act = style.act()
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(FEATURES, classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        x = self.act(self.bn2(self.conv_head(x)))
        logits: torch.Tensor = self.classifier(self.drop(x.mean((2, 3))))
        return logits

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, C, H, W) to the last maps at strides 4, 8, 16 and 32."""
        x = self.act(self.bn1(self.conv_stem(x)))
        maps = []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            if number in (1, 2, 4, 6):
                maps.append(x)
        return maps


def model(name: str, *, width: float, depth: float, dropout: float) -> Model:
    """The version whose channels and depths are these multiples of EfficientNet-Lite0's."""
    depths = (1, *(math.ceil(stage[0] * depth) for stage in STAGES[:-1]), 1)
    default_dropout = dropout

    def build(
        *,
        classes: int,
        in_channels: int,
        image_size: tuple[int, int],  # noqa: ARG001
        dropout: float = default_dropout,
        eps: float = 1e-3,
        same_padding: bool = True,
    ) -> EfficientNetLite:
        """Images (B, in_channels, H, W) to logits (B, classes). `eps` is that of the norms; `same_padding` pads as
        TensorFlow does."""
        style = Style(act=partial(nn.ReLU6, inplace=True), eps=eps, same=same_padding)
        return EfficientNetLite(
            classes=classes, in_channels=in_channels, width=width, depths=depths, style=style, dropout=dropout
        )

    convert = partial(_convert, depths=depths)

    def recognize(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:
        if shapes.get("conv_head.weight", shapes.get("_conv_head.weight")) != (FEATURES, divisible(320 * width), 1, 1):
            return None
        timms_own = str(config.get("architecture", "")).startswith("efficientnet_lite")
        args: dict[str, Json] = {"eps": 1e-5, "same_padding": False} if timms_own else {}
        return confirm(args, build, convert(outline(shapes)), "classifier")

    return Model(
        name=name,
        kinds=("image",),
        build=build,
        head="classifier",
        source="arXiv:1905.11946",
        recognize=recognize,
        convert=convert,
    )


def _convert(tensors: dict[str, torch.Tensor], depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """From the names of the port: its blocks are counted through, and its layers begin with an underscore."""
    places = [f"{stage}.{number}" for stage, depth in enumerate(depths) for number in range(depth)]
    rules = [
        (r"^_conv_", "conv_"),
        (r"^_bn0\.", "bn1."),
        (r"^_bn1\.", "bn2."),
        (r"^_fc\.", "classifier."),
        (r"^_blocks\.0\._depthwise_conv\.", "blocks.0.0.conv_dw."),
        (r"^_blocks\.0\._project_conv\.", "blocks.0.0.conv_pw."),
        (r"^_blocks\.0\._bn", "blocks.0.0.bn"),
        (r"^(_blocks\.\d+)\._expand_conv\.", r"\1.conv_pw."),
        (r"^(_blocks\.\d+)\._depthwise_conv\.", r"\1.conv_dw."),
        (r"^(_blocks\.\d+)\._project_conv\.", r"\1.conv_pwl."),
        *((rf"^(_blocks\.\d+)\._bn{number}\.", rf"\1.bn{number + 1}.") for number in range(3)),
        *((rf"^_blocks\.{number}\.", f"blocks.{place}.") for number, place in enumerate(places)),
    ]
    return rename(tensors, rules)
