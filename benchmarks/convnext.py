"""A small ConvNeXt, a network that suanli doesn't have: `--model convnext:build`, with this folder in PYTHONPATH.

Depthwise convolutions, layer norms and GELU take the place of what fills a residual network, so other things limit its
speed. Stages are 2, 2, 6 and 2 blocks deep; 5 million parameters.

Source: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS, DEPTHS = (48, 96, 192, 384), (2, 2, 6, 2)
EXPANSION = 4  # of the width between the two 1x1 convolutions of a block
LAYER_SCALE = 1e-6  # at the start


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


class Block(nn.Module):
    """(B, C, H, W) to the same shape. The 1x1 convolutions are linear layers over channels that lie last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width))
        self.scale = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.mlp(self.norm(self.depthwise(x).movedim(1, 3)))
        return x + (self.scale * change).movedim(3, 1)


def build(*, classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Sequential:  # noqa: ARG001
    """Images (B, in_channels, H, W), both sides at least 32 px, to logits (B, classes)."""
    layers: list[nn.Module] = []
    before = in_channels
    for width, depth in zip(WIDTHS, DEPTHS, strict=True):
        if not layers:
            layers += [nn.Conv2d(before, width, 4, stride=4), ChannelNorm(width, eps=1e-6)]
        else:
            layers += [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2)]
        layers += [Block(width) for _ in range(depth)]
        before = width
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(before, eps=1e-6), nn.Linear(before, classes))
    net = nn.Sequential(*layers, *pool)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return net
