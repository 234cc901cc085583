"""What the residual networks share: blocks, stages and the two stems.

Parameter names are those of torchvision, so that published safetensors weights load by name. Images of
at most 64 px get a 3x3 stem without pooling: the original stem would leave them 2 px after the last stage.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385; stride in the 3x3
convolution of a bottleneck and zero-initialised last norms after Goyal et al., arXiv:1706.02677.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import nn

from suanli.models.networks._convolution import Conv3x3

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
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stage(block: type[Basic | Bottleneck], in_channels: int, width: int, depth: int, *, stride: int) -> nn.Sequential:
    first = block(in_channels, width, stride)
    rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)
