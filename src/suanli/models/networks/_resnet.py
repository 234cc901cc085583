"""What the residual networks share: blocks, stages and the two stems.

Parameter names are those of torchvision and timm; files of transformers are renamed. Images of at most 64 px get a 3x3
stem without pooling: the original stem would leave them 2 px after the last stage. Published weights have the original.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385; stride in the 3x3
convolution of a bottleneck and zero-initialised last norms after Goyal et al., arXiv:1706.02677.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import nn

from suanli.core.types import Json, Model, Shapes
from suanli.models.networks._convolution import Conv3x3
from suanli.models.networks._published import confirm, outline, rename

SOURCE = "arXiv:1512.03385"
SMALL_PX = 64

Stem: TypeAlias = Literal["auto", "small", "large"]


def small_stem(stem: Stem, image_size: tuple[int, int]) -> bool:
    """Whether `stem` stands for the stem for small images. Raises ValueError for an unknown stem."""
    if stem not in ("auto", "small", "large"):
        raise ValueError(f'stem is "auto", "small" or "large", not {stem!r}')
    return min(image_size) <= SMALL_PX if stem == "auto" else stem == "small"


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) to (B, width, H/stride, W/stride)."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: torch.Tensor = self.relu(y + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: (B, in, H, W) to (B, 4 width, H/stride, W/stride)."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: torch.Tensor = self.relu(y + self.downsample(x))
        return out


class ResNet(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes). `blocks` is the depth of the four stages."""

    def __init__(
        self,
        block: type[Basic | Bottleneck],
        blocks: Sequence[int],
        *,
        classes: int,
        in_channels: int,
        small: bool,
    ) -> None:
        super().__init__()
        if small:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        widths = [64, 128, 256, 512]
        before = [64, *(w * block.expansion for w in widths)]
        stages = [_stage(block, before[i], widths[i], blocks[i], stride=1 if i == 0 else 2) for i in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.avgpool(self.feature_maps(x)[-1]).flatten(1))
        return logits

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, C, H, W) to the maps of the four stages: with the large stem at strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stage(block: type[Basic | Bottleneck], in_channels: int, width: int, depth: int, *, stride: int) -> nn.Sequential:
    first = block(in_channels, width, stride)
    rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


NAMED = (("basic", (2, 2, 2, 2)), ("basic", (3, 4, 6, 3)), ("bottleneck", (3, 4, 6, 3)))  # in files of their own


def model(name: str, block: type[Basic | Bottleneck], blocks: Sequence[int]) -> Model:
    """The network with `blocks` in each stage."""

    def build(*, classes: int, in_channels: int, image_size: tuple[int, int], stem: Stem = "auto") -> ResNet:
        """Images (B, in_channels, *image_size) to logits (B, classes). `stem` "small" is for images of at
        most 64 px, "large" for others; "auto" decides by `image_size`."""
        small = small_stem(stem, image_size)
        return ResNet(block, blocks, classes=classes, in_channels=in_channels, small=small)

    def recognize(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:
        tensors = convert(outline(shapes))
        if config.get("architecture", name) not in (name, f"tv_{name}") or depths_of(tensors) != tuple(blocks):
            return None  # such as resnetblur50, whose tensors are the same
        return confirm({"stem": stem_of(tensors, config)}, build, tensors, "fc")

    return Model(
        name=name, kinds=("image",), build=build, head="fc", source=SOURCE, recognize=recognize, convert=convert
    )


def depths_of(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """The number of blocks in each stage; (0, 0, 0, 0) for another network."""
    found = [m for name in tensors if (m := re.match(r"layer([1-4])\.(\d+)\.bn1\.weight$", name))]
    return tuple(sum(m[1] == stage for m in found) for stage in "1234")


def stem_of(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Json]) -> Stem:
    """Raises ValueError for transformers' version of a stride that ours doesn't have."""
    if config.get("downsample_in_bottleneck") or config.get("downsample_in_first_stage"):
        raise ValueError("the stride is in the 1x1 convolution")
    return "large" if tensors["conv1.weight"].shape[-1] == 7 else "small"


def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From transformers' names."""
    rules = [
        (r"^resnet\.", ""),
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (r"^encoder\.stages\.0\.layers\.", "layer1."),
        (r"^encoder\.stages\.1\.layers\.", "layer2."),
        (r"^encoder\.stages\.2\.layers\.", "layer3."),
        (r"^encoder\.stages\.3\.layers\.", "layer4."),
        (r"^(layer\d\.\d+)\.shortcut\.convolution\.", r"\1.downsample.0."),
        (r"^(layer\d\.\d+)\.shortcut\.normalization\.", r"\1.downsample.1."),
        *((rf"^(layer\d\.\d+)\.layer\.{i}\.convolution\.", rf"\1.conv{i + 1}.") for i in range(3)),
        *((rf"^(layer\d\.\d+)\.layer\.{i}\.normalization\.", rf"\1.bn{i + 1}.") for i in range(3)),
        (r"^classifier\.1\.", "fc."),
    ]
    return rename(tensors, rules)
