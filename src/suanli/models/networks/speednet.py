"""A small convolutional network that learns fast, for images up to 64 px; larger ones work but cost more.

A frozen 2x2 convolution first turns pixels into decorrelated patch features, so that the trained layers see inputs of
equal variance from the first step. Then follow groups of 3x3 convolutions, three by default, each halving the side
after its first convolution. Convolutions have no bias and norms no trained scale: with `normalize_filters` of the
`muon` optimizer a filter has only a direction. The first filters of a convolution start as the identity, and the head
starts small, so that early predictions are close to uniform.

Unlike the original it accepts any number of channels and any side of at least 2 px, keeps the usual epsilon in its
norms (constant border pixels are common in real data), and doesn't flip or average views: that belongs to
augmentations and to `evaluate`. Its first group has one convolution and the whitening no bias: this is cheaper, most
of all in the backward pass at the largest side, and costs no accuracy (docs/LOG.md). `whitening_bias` and `depths`
restore them.

Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), arXiv:2404.00498; the
whitening follows T. Page, "How to Train Your ResNet 8" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from suanli.core.types import Model
from suanli.models.networks._convolution import Conv3x3

MAX_PATCHES = 1_000_000  # enough for a stable covariance of a few dozen values, and quick


class Whitening(nn.Conv2d):
    """2x2 convolution onto the principal directions of image patches and their negatives, each scaled to equal
    variance. `fit` sets the weights; they aren't trained."""

    def __init__(self, in_channels: int, *, bias: bool = False) -> None:
        super().__init__(in_channels, 2 * 4 * in_channels, kernel_size=2, bias=bias)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, inputs: torch.Tensor, eps: float = 5e-4) -> None:
        """Set the weights from the patches of `inputs` (B, C, H, W)."""
        per_image = (inputs.shape[2] - 1) * (inputs.shape[3] - 1)
        stride = -(-len(inputs) * per_image // MAX_PATCHES)  # skips whole images, evenly
        images = inputs[::stride].float()
        windows = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (B, C, H-1, W-1, 2, 2)
        patches = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1).double()
        covariance = patches.T @ patches / len(patches)
        spread, directions = torch.linalg.eigh(covariance.cpu())
        filters = (directions / (spread.clamp(min=0) + eps).sqrt()).T.flip(0)
        filters = filters.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))


class Group(nn.Sequential):
    """(B, in, H, W) to (B, width, H/2, W/2) by `depth` convolutions. `ceil_mode` keeps the last row of an odd
    side."""

    def __init__(
        self, in_channels: int, width: int, depth: int, *, ceil_mode: bool, identity: bool, norm_momentum: float
    ) -> None:
        layers: list[nn.Module] = []
        for number in range(depth):
            layers.append(_conv3(in_channels if number == 0 else width, width, identity))
            if number == 0:
                layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
            layers += [_norm(width, norm_momentum), nn.GELU()]
        super().__init__(*layers)


class SpeedNet(nn.Module):
    def __init__(
        self,
        *,
        classes: int,
        in_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        ceil_mode: bool,
        whitening: bool,
        whitening_bias: bool,
        identity: bool,
        norm_momentum: float,
    ) -> None:
        super().__init__()
        if whitening:
            self.whitening: nn.Conv2d = Whitening(in_channels, bias=whitening_bias)
        else:
            self.whitening = nn.Conv2d(in_channels, 2 * 4 * in_channels, kernel_size=2, bias=whitening_bias)
        self.activation = nn.GELU()
        before = [self.whitening.out_channels, *widths]
        self.groups = nn.Sequential(
            *(
                Group(a, b, depth, ceil_mode=ceil_mode, identity=identity, norm_momentum=norm_momentum)
                for (a, b), depth in zip(pairwise(before), depths, strict=True)
            )
        )
        self.head = nn.Linear(widths[-1], classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(widths[-1])

    def initialize(self, inputs: torch.Tensor) -> None:
        """Fit the whitening to training images (B, C, H, W); a few thousand are enough."""
        if isinstance(self.whitening, Whitening):
            self.whitening.fit(inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(self.activation(self.whitening(x)))
        # Some formats have no adaptive pooling; where nothing is learned, both are the same.
        x = x.amax((2, 3)) if torch.compiler.is_exporting() else F.adaptive_max_pool2d(x, 1).flatten(1)
        logits: torch.Tensor = self.head(x)
        return logits


def _conv3(in_channels: int, out_channels: int, identity: bool) -> nn.Conv2d:
    conv = Conv3x3(in_channels, out_channels)
    if identity:
        with torch.no_grad():
            nn.init.dirac_(conv.weight[: min(in_channels, out_channels)])
    return conv


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm


def build(
    *,
    classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    widths: Sequence[int] = (32, 64, 128),
    depths: Sequence[int] | None = None,
    whitening: bool = True,
    whitening_bias: bool = False,
    identity: bool = True,
    norm_momentum: float = 0.4,
) -> SpeedNet:
    """Images (B, in_channels, *image_size) to logits (B, classes). `widths` are the channels of the groups, `depths`
    their numbers of convolutions, by default one in the first and two in the others. `whitening` False trains the
    first layer like any other; `identity` False initializes every filter at random; `norm_momentum` is the weight of a
    batch in the running statistics, high since trainings are short. Raises ValueError for images under 2 px, and for
    widths and depths that don't fit together."""
    if min(image_size) < 2:
        raise ValueError(f"speednet needs images of at least 2x2 pixels, not {image_size}")
    if depths is None:
        depths = (1, *[2] * (len(widths) - 1))
    if not widths or len(widths) != len(depths) or min(*widths, *depths) < 1:
        raise ValueError(f"speednet needs as many depths as widths, all positive, not {widths} and {depths}")
    small = min(image_size) < 2 ** (len(widths) + 1)  # too small to drop an odd last row
    return SpeedNet(
        classes=classes,
        in_channels=in_channels,
        widths=widths,
        depths=depths,
        ceil_mode=small,
        whitening=whitening,
        whitening_bias=whitening_bias,
        identity=identity,
        norm_momentum=norm_momentum,
    )


MODEL = Model(name="speednet", kinds=("image",), build=build, head="head", source="arXiv:2404.00498")
