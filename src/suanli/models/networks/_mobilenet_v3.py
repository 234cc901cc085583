"""MobileNetV3: inverted residuals with squeeze and excitation and hard swish, found by search for phones.

Parameter names are those of timm; files with torchvision's names are renamed. torchvision's weights have norms with an
epsilon of 1e-3, timm's own 1e-5, and those of the authors, which timm calls tf_mobilenetv3, also TensorFlow's padding.

Source: Howard et al., "Searching for MobileNetV3", arXiv:1905.02244.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from suanli.core.types import Json, Model, Shapes
from suanli.models.networks._mobile import DepthwiseSeparable, InvertedResidual, Style, divisible, initialize
from suanli.models.networks._published import confirm, outline, rename


@dataclass(frozen=True, kw_only=True)
class Row:
    """One block of the paper's table."""

    kernel: int
    width: int
    channels: int
    squeeze: bool
    hard: bool  # hard swish, else ReLU
    stride: int = 1


def rows(text: str) -> list[list[Row]]:
    """Stages are separated by lines, blocks by commas: kernel, width, channels, "s" for squeeze, "h" for hard swish,
    and the stride if it is 2."""
    stages = []
    for line in text.strip().splitlines():
        stage = []
        for block in line.split(","):
            kernel, width, channels, *flags = block.split()
            stage.append(
                Row(
                    kernel=int(kernel),
                    width=int(width),
                    channels=int(channels),
                    squeeze="s" in flags,
                    hard="h" in flags,
                    stride=2 if "2" in flags else 1,
                )
            )
        stages.append(stage)
    return stages


class ConvNorm(nn.Module):
    def __init__(self, style: Style, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = style.conv(in_channels, out_channels, 1)
        self.bn1 = style.norm(out_channels)
        self.act = style.act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.act(self.bn1(self.conv(x)))
        return out


class MobileNetV3(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes)."""

    def __init__(
        self,
        *,
        classes: int,
        in_channels: int,
        stages: Sequence[Sequence[Row]],
        features: int,
        style: Style,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv_stem = style.conv(in_channels, 16, 3, 2)
        self.bn1 = style.norm(16)
        channels, stride = 16, 2
        built: list[nn.Module] = []
        self.last_of_stride: dict[int, int] = {}  # the stage whose maps are the last at a stride
        for number, stage in enumerate(stages):
            blocks: list[nn.Module] = []
            for row in stage:
                its = style if row.hard else replace(style, act=partial(nn.ReLU, inplace=True))
                squeeze = divisible(row.width / 4) if row.squeeze else 0
                if number == 0:
                    blocks.append(DepthwiseSeparable(its, channels, row.channels, row.kernel, row.stride, squeeze))
                else:
                    blocks.append(
                        InvertedResidual(its, channels, row.width, row.channels, row.kernel, row.stride, squeeze)
                    )
                channels, stride = row.channels, stride * row.stride
            self.last_of_stride[stride] = number
            built.append(nn.Sequential(*blocks))
        self.last_of_stride[stride] = len(stages)
        built.append(nn.Sequential(ConvNorm(style, channels, 6 * channels)))
        self.blocks = nn.Sequential(*built)
        self.conv_head = nn.Conv2d(6 * channels, features, 1)
        self.act = style.act()
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        x = self.act(self.conv_head(x.mean((2, 3), keepdim=True))).flatten(1)
        logits: torch.Tensor = self.classifier(self.drop(x))
        return logits

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, C, H, W) to the last maps at strides 4, 8, 16 and 32."""
        x = self.act(self.bn1(self.conv_stem(x)))
        maps = []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return [maps[self.last_of_stride[stride]] for stride in (4, 8, 16, 32)]


def model(name: str, *, stages: Sequence[Sequence[Row]], features: int) -> Model:
    """The version with these blocks and `features` before the head."""

    def build(
        *,
        classes: int,
        in_channels: int,
        image_size: tuple[int, int],  # noqa: ARG001
        dropout: float = 0.2,
        eps: float = 1e-3,
        same_padding: bool = False,
    ) -> MobileNetV3:
        """Images (B, in_channels, H, W) to logits (B, classes). `eps` is that of the norms; `same_padding` pads as
        TensorFlow does."""
        return MobileNetV3(
            classes=classes,
            in_channels=in_channels,
            stages=stages,
            features=features,
            style=Style(act=partial(nn.Hardswish, inplace=True), eps=eps, same=same_padding),
            dropout=dropout,
        )

    convert = partial(_convert, stages=stages)

    def recognize(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:
        if shapes.get("conv_head.weight", shapes.get("classifier.0.weight", ()))[:1] != (features,):
            return None
        of_tensorflow = str(config.get("architecture", "")).startswith("tf_")
        eps = 1e-3 if of_tensorflow or "features.0.0.weight" in shapes else 1e-5
        args: dict[str, Json] = {"eps": eps, "same_padding": of_tensorflow}
        return confirm(args, build, convert(outline(shapes)), "classifier")

    return Model(
        name=name,
        kinds=("image",),
        build=build,
        head="classifier",
        source="arXiv:1905.02244",
        recognize=recognize,
        convert=convert,
    )


def _convert(tensors: dict[str, torch.Tensor], stages: Sequence[Sequence[Row]]) -> dict[str, torch.Tensor]:
    """From torchvision's names: it counts the blocks through, and numbers the layers of a block."""
    places = [f"{stage}.{number}" for stage, blocks in enumerate(stages) for number in range(len(blocks))]
    rules = [
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (rf"^features\.{len(places) + 1}\.0\.", f"blocks.{len(stages)}.0.conv."),
        (rf"^features\.{len(places) + 1}\.1\.", f"blocks.{len(stages)}.0.bn1."),
        (r"^(features\.\d+)\.block\.\d\.fc1\.", r"\1.se.conv_reduce."),
        (r"^(features\.\d+)\.block\.\d\.fc2\.", r"\1.se.conv_expand."),
        (r"^(features\.1)\.block\.0\.0\.", r"\1.conv_dw."),
        (r"^(features\.1)\.block\.0\.1\.", r"\1.bn1."),
        (r"^(features\.1)\.block\.[12]\.0\.", r"\1.conv_pw."),
        (r"^(features\.1)\.block\.[12]\.1\.", r"\1.bn2."),
        (r"^(features\.\d+)\.block\.0\.0\.", r"\1.conv_pw."),
        (r"^(features\.\d+)\.block\.0\.1\.", r"\1.bn1."),
        (r"^(features\.\d+)\.block\.1\.0\.", r"\1.conv_dw."),
        (r"^(features\.\d+)\.block\.1\.1\.", r"\1.bn2."),
        (r"^(features\.\d+)\.block\.[23]\.0\.", r"\1.conv_pwl."),
        (r"^(features\.\d+)\.block\.[23]\.1\.", r"\1.bn3."),
        *((rf"^features\.{number}\.", f"blocks.{place}.") for number, place in enumerate(places, 1)),
        (r"^classifier\.0\.", "conv_head."),
        (r"^classifier\.3\.", "classifier."),
    ]
    renamed = rename(tensors, rules)
    filters = renamed.get("conv_head.weight")
    if filters is not None and filters.ndim == 2:
        renamed["conv_head.weight"] = filters[:, :, None, None]
    return renamed
