"""Networks for `bench_engines.py` that suanli doesn't have: small, plain PyTorch, written from the papers.

`mobilenet` has depthwise convolutions inside inverted residuals, `convnext` has large ones with a norm over channels:
both are harder for engines than a residual network. They are named as `engine_nets:mobilenet` and
`engine_nets:convnext`, as users name networks of their own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

# Expansion, channels, blocks, stride of the first: table 2 of the paper.
MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# Channels and blocks of the four stages of "atto".
CONVNEXT = ((40, 2), (80, 2), (160, 6), (320, 2))


def mobilenet(*, classes: int, in_channels: int) -> nn.Module:
    """MobileNetV2 at width 1: images (B, in_channels, H, W) to logits (B, classes).

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381.
    """
    layers: list[nn.Module] = [conv_block(in_channels, 32, 3, stride=2)]
    width = 32
    for expansion, channels, blocks, stride in MOBILENET:
        for number in range(blocks):
            layers.append(InvertedResidual(width, channels, expansion, stride if number == 0 else 1))
            width = channels
    layers.append(conv_block(width, 1280, 1))
    return nn.Sequential(*layers, GlobalMean(), nn.Dropout(0.2), nn.Linear(1280, classes))


def conv_block(in_channels: int, out_channels: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Wider, depthwise, narrower without an activation; added to its input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            *([conv_block(in_channels, wide, 1)] if expansion > 1 else []),
            conv_block(wide, wide, 3, stride=stride, groups=wide),
            nn.Conv2d(wide, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return x + out if self.adds else out


class GlobalMean(nn.Module):
    """The mean over all places: (B, C, H, W) to (B, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def convnext(*, classes: int, in_channels: int) -> nn.Module:
    """ConvNeXt with the widths of "atto": images (B, in_channels, H, W) to logits (B, classes).

    Without the paper's layer scale and stochastic depth: the scale begins at a millionth, so that after one epoch the
    blocks would still do almost nothing, and any precision would pass.
    Sources: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545; the sizes of "atto" are those of Woo et al.,
    "ConvNeXt V2", arXiv:2301.00808.
    """
    layers: list[nn.Module] = []
    width = in_channels
    for stage, (channels, blocks) in enumerate(CONVNEXT):
        if stage == 0:
            layers += [nn.Conv2d(width, channels, 4, stride=4), ChannelNorm(channels)]
        else:
            layers += [ChannelNorm(width), nn.Conv2d(width, channels, 2, stride=2)]
        layers += [ConvNextBlock(channels) for _ in range(blocks)]
        width = channels
    return nn.Sequential(*layers, GlobalMean(), nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each place of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-6)
        return normed.permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """7x7 depthwise, norm over channels, four times as wide with GELU and back, added to its input. The wide part works
    on (B, H, W, C), as in the authors' code: there a pointwise convolution is a matrix product."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wider, self.narrower = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrower(F.gelu(self.wider(y)))
        return x + y.permute(0, 3, 1, 2)


class FromRows(nn.Module):
    """Rows of pixels (B, H, W, C) uint8 to probabilities (B, K): what a user writes around a network."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):  # where white is 1
            self.register_buffer(name, 255 * torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        pixels = rows.permute(0, 3, 1, 2).float()
        logits: torch.Tensor = self.network((pixels - self.mean) / self.std)
        return logits.float().softmax(1)
