"""What the sizes of DetNet share: a convolutional detector without anchors.

A backbone gives maps at strides 8, 16 and 32; the neck mixes them down and up again; a head that all levels share, with
batch norms of each level's own, gives scores and distances to the four sides for each cell. Convolutions are plain 3x3
ones with ReLU, which CPUs, matrix units and int8 compute best. Scores and boxes leave the network apart: with one
output for both, int8 would round every score to 0.

Sources: the neck after Liu et al., "Path Aggregation Network", arXiv:1803.01534; blocks after Wang et al., "CSPNet",
arXiv:1911.11929; pooling after He et al., arXiv:1406.4729; the shared head after Lyu et al., "RTMDet",
arXiv:2212.07784.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from suanli.core.types import Json, Model
from suanli.models.feature_maps import make_backbone

SOURCE = "arXiv:2212.07784"
STRIDES = (8, 16, 32)  # px, of the levels
PRIOR = 0.01  # the score of every class before anything is learned
SIDE = 3.0  # the distance to each side before anything is learned, in strides
MOST_LOG = 7.0  # of a distance in strides: more is no box, and would overflow


class ConvNorm(nn.Sequential):
    """Maps (B, in, H, W) to (B, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    def __init__(self, width: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(width, width), ConvNorm(width, width)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CrossStage(nn.Module):
    """Half of the channels go through residual blocks, the other half around them: (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, *, shortcut: bool = True) -> None:
        super().__init__()
        half = out_channels // 2
        self.main = ConvNorm(in_channels, half, 1)
        self.bypass = ConvNorm(in_channels, half, 1)
        self.blocks = nn.Sequential(*(Residual(half, shortcut=shortcut) for _ in range(depth)))
        self.join = ConvNorm(2 * half, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.join(torch.cat([self.blocks(self.main(x)), self.bypass(x)], 1))
        return out


class Pooling(nn.Module):
    """Maxima of 5, 9 and 13 cells beside the map itself, so that each cell sees most of the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.join = ConvNorm(width, width // 2, 1), ConvNorm(2 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.squeeze(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, stride=1, padding=2))
        out: torch.Tensor = self.join(torch.cat(maps, 1))
        return out


class Backbone(nn.Module):
    """Images (B, C, H, W) to maps at strides 4, 8, 16 and 32, of `channels`."""

    def __init__(self, in_channels: int, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(width << level for level in range(4))
        self.stem = ConvNorm(in_channels, width // 2, stride=2)
        before, stages = width // 2, []
        for channels, depth in zip(self.channels, depths, strict=True):
            stages.append(nn.Sequential(ConvNorm(before, channels, stride=2), CrossStage(channels, channels, depth)))
            before = channels
        self.stages = nn.ModuleList(stages)
        self.pooling = Pooling(before)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps[:-1], self.pooling(x)]


class Neck(nn.Module):
    """Maps at strides 8, 16 and 32 to as many of `width` channels, each of which knows of the others."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(ConvNorm(c, width, 1) for c in channels)
        steps = range(len(channels) - 1)
        self.down = nn.ModuleList(CrossStage(2 * width, width, 1, shortcut=False) for _ in steps)
        self.shrink = nn.ModuleList(ConvNorm(width, width, stride=2) for _ in steps)
        self.up = nn.ModuleList(CrossStage(2 * width, width, 1, shortcut=False) for _ in steps)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        mixed = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level, block in zip(reversed(range(len(mixed) - 1)), self.down, strict=True):
            larger = F.interpolate(mixed[level + 1], size=mixed[level].shape[2:], mode="nearest")
            mixed[level] = block(torch.cat([mixed[level], larger], 1))
        for level, (shrink, block) in enumerate(zip(self.shrink, self.up, strict=True), start=1):
            mixed[level] = block(torch.cat([shrink(mixed[level - 1]), mixed[level]], 1))
        return mixed


class Branch(nn.Module):
    """Two convolutions that the levels share, each followed by the level's own batch norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(width, eps=1e-3, momentum=0.03) for _ in range(depth)) for _ in STRIDES
        )

    def forward(self, x: torch.Tensor, level: int) -> torch.Tensor:
        norms = self.norms[level]
        assert isinstance(norms, nn.ModuleList)
        for conv, norm in zip(self.convs, norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
        return x


class Head(nn.Module):
    """Maps of the three levels to boxes (B, A, 4), logits (B, A, classes) and points (B, A, 3)."""

    def __init__(self, width: int, classes: int, depth: int = 2) -> None:
        super().__init__()
        self.class_branch, self.box_branch = Branch(width, depth), Branch(width, depth)
        self.classes, self.sides = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, distances, points = [], [], []
        for level, (x, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            logits.append(_rows(self.classes(self.class_branch(x, level))))
            # In float32: half precision would move the sides of large boxes by pixels.
            logs = _rows(self.sides(self.box_branch(x, level))).float().clamp(-MOST_LOG, MOST_LOG)
            distances.append(logs.exp() * stride)
            points.append(_cells(x, stride))
        centres = torch.cat(points)
        reach = torch.cat(distances, 1)
        boxes = torch.cat([centres[:, :2] - reach[..., :2], centres[:, :2] + reach[..., 2:]], 2)
        return boxes, torch.cat(logits, 1).float(), centres.expand(boxes.shape[0], -1, -1)

    def reset(self) -> None:
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.constant_(self.classes.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        nn.init.normal_(self.sides.weight, std=0.01)
        nn.init.constant_(self.sides.bias, math.log(SIDE))  # type: ignore[arg-type]


def _rows(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H W, C)."""
    return maps.flatten(2).transpose(1, 2)


def _cells(maps: torch.Tensor, stride: int) -> torch.Tensor:
    """(H W, 3): x and y of the centre of each cell, and the stride."""
    height, width = maps.shape[2:]
    y, x = ((torch.arange(side, device=maps.device, dtype=torch.float32) + 0.5) * stride for side in (height, width))
    x, y = x.repeat(height), y.repeat_interleave(width)
    return torch.stack([x, y, torch.full_like(x, stride)], 1)


class DetNet(nn.Module):
    """Images (B, C, H, W) to boxes (B, A, 4), float32: left, top, right, bottom in px; logits (B, A, classes); and
    points (B, A, 3): x and y of the centre of each of the A cells, and its stride."""

    def __init__(self, backbone: nn.Module, channels: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = Neck(channels[-len(STRIDES) :], width)
        self.head = Head(width, classes)
        for part in (self.neck, self.head):
            initialize(part)
        self.head.reset()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = self.backbone.feature_maps(x)  # type: ignore[operator]
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.head(self.neck(maps[-len(STRIDES) :]))
        return found


def initialize(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def model(name: str, *, width: int, depths: Sequence[int], neck: int) -> Model:
    """`width` is that of the maps at stride 4, and doubles from level to level; `neck` that of neck and head."""
    own_width, own_depths, own_neck = width, depths, neck

    def build(
        *,
        classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        width: int = own_width,
        depths: Sequence[int] = own_depths,
        neck: int = own_neck,
        backbone: str | None = None,
        backbone_args: Mapping[str, Json] | None = None,
    ) -> DetNet:
        """See `DetNet`. `backbone` is the name of a network with feature maps, of suanli or timm:NAME, that is used in
        place of one of `width` and `depths`; `backbone_args` are its own."""
        if backbone is not None:
            other = make_backbone(backbone, in_channels=in_channels, image_size=image_size, args=backbone_args)
            return DetNet(other, other.channels, neck, classes)
        own = Backbone(in_channels, width, depths)
        initialize(own)
        return DetNet(own, own.channels, neck, classes)

    return Model(
        name=name,
        kinds=("image",),
        build=build,
        head="head",
        class_layer="head.classes",
        backbone="backbone",
        source=SOURCE,
        returns="boxes",
    )
