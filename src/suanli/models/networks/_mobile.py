"""What the networks for phones share: inverted residuals, and convolutions that pad as TensorFlow does.

Parameter names are those of timm. Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
arXiv:1801.04381; squeeze and excitation after Hu et al., arXiv:1709.01507.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class SameConv2d(nn.Conv2d):
    """(B, in, H, W) to (B, out, ceil(H/stride), ceil(W/stride)). Where the padding is odd, the right and the bottom get
    the greater part, as in TensorFlow's "same"."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bottom, right = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0)
            for side, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        even = bottom % 2 == right % 2 == 0
        if not even:
            x = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        padding = (bottom // 2, right // 2) if even else (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


@dataclass(frozen=True, kw_only=True)
class Style:
    """In what the versions of one network differ that have the same tensors."""

    act: Callable[[], nn.Module]
    eps: float  # of the batch norms
    same: bool  # padding as in TensorFlow

    def norm(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, eps=self.eps)

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        if self.same and stride > 1:
            return SameConv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


class DepthwiseSeparable(nn.Module):
    """A convolution of each channel, then one of 1x1: (B, in, H, W) to (B, out, H/stride, W/stride)."""

    def __init__(
        self, style: Style, in_channels: int, out_channels: int, kernel: int, stride: int, squeeze: int = 0
    ) -> None:
        super().__init__()
        self.conv_dw = style.conv(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.bn1 = style.norm(in_channels)
        self.se = SqueezeExcite(in_channels, squeeze) if squeeze else nn.Identity()
        self.conv_pw = style.conv(in_channels, out_channels, 1)
        self.bn2 = style.norm(out_channels)
        self.act = style.act()
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bn2(self.conv_pw(self.se(self.act(self.bn1(self.conv_dw(x))))))
        return x + y if self.residual else y


class InvertedResidual(nn.Module):
    """1x1 to `width` channels, a convolution of each, 1x1 back: (B, in, H, W) to (B, out, H/stride, W/stride)."""

    def __init__(
        self, style: Style, in_channels: int, width: int, out_channels: int, kernel: int, stride: int, squeeze: int = 0
    ) -> None:
        super().__init__()
        self.conv_pw = style.conv(in_channels, width, 1)
        self.bn1 = style.norm(width)
        self.conv_dw = style.conv(width, width, kernel, stride, groups=width)
        self.bn2 = style.norm(width)
        self.se = SqueezeExcite(width, squeeze) if squeeze else nn.Identity()
        self.conv_pwl = style.conv(width, out_channels, 1)
        self.bn3 = style.norm(out_channels)
        self.act = style.act()
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.se(self.act(self.bn2(self.conv_dw(y))))
        out: torch.Tensor = self.bn3(self.conv_pwl(y))
        return x + out if self.residual else out


class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels are on average."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.conv_expand(F.relu(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(scale)


def divisible(channels: float) -> int:
    """The multiple of 8 nearest `channels`, but at least 90 % of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def initialize(module: nn.Module) -> None:
    """Convolutions keep the variance of the gradient, and the output layer starts small."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * math.prod(layer.kernel_size) // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
