"""ConvNeXt: a convolutional network with the parts of a vision transformer; by default the size "atto".

Sizes by `depths` and `widths`: atto [2,2,6,2] and [40,80,160,320] (3.7 million parameters), femto 48 to 384 (5.2), pico
64 to 512 (9.1), nano [2,2,8,2] and 80 to 640 (15.6), tiny [3,3,9,3] and 96 to 768 (28.6), small [3,3,27,3] (50.2), base
128 to 1,024 (88.6), large 192 to 1,536 (198).

Parameter names are those of timm; files with the names of torchvision, of transformers and of the authors are renamed.

Source: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545; the sizes below tiny are timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from suanli.core.types import Json, Model, Shapes
from suanli.models.networks._published import confirm, outline, rename

EPS = 1e-6


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Maps (B, C, H, W) to maps of the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        out: torch.Tensor = x + (y * self.gamma).permute(0, 3, 1, 2)
        return out


class Stage(nn.Module):
    """(B, before, H, W) to (B, width, H/stride, W/stride)."""

    def __init__(self, before: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        self.downsample = (
            nn.Sequential(MapNorm(before, eps=EPS), nn.Conv2d(before, width, stride, stride))
            if stride > 1
            else nn.Identity()
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks(self.downsample(x))
        return out


class Head(nn.Module):
    """Maps (B, C, H, W) to logits (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.norm(x.mean((2, 3))))
        return logits


class ConvNeXt(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes)."""

    def __init__(
        self, *, classes: int, in_channels: int, depths: Sequence[int], widths: Sequence[int], patch: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.stem = nn.Sequential(nn.Conv2d(in_channels, widths[0], patch, patch), MapNorm(widths[0], eps=EPS))
        first = Stage(widths[0], widths[0], depths[0], 1)
        rest = [Stage(a, b, depth, 2) for (a, b), depth in zip(pairwise(widths), depths[1:], strict=True)]
        self.stages = nn.Sequential(first, *rest)
        self.head = Head(widths[-1], classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.feature_maps(x)[-1])
        return logits

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, C, H, W) to the maps of the stages: with the original stem at strides 4, 8, 16 and 32."""
        x = self.stem(_filled(x, self.patch))
        maps = []
        for number, stage in enumerate(self.stages):
            x = stage(x if number == 0 else _filled(x, 2))
            maps.append(x)
        return maps


def _filled(x: torch.Tensor, side: int) -> torch.Tensor:
    """Zeros at the right and bottom where maps are smaller than one patch of `side`. Larger ones lose what is left
    over, as in the original."""
    bottom, right = max(side - x.shape[2], 0), max(side - x.shape[3], 0)
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def build(
    *,
    classes: int,
    in_channels: int,
    image_size: tuple[int, int],  # noqa: ARG001
    depths: Sequence[int] = (2, 2, 6, 2),
    widths: Sequence[int] = (40, 80, 160, 320),
    patch: int = 4,
) -> ConvNeXt:
    """Images (B, in_channels, H, W) to logits (B, classes). `depths` and `widths` are those of the stages, `patch` is
    the side of a patch in px: 4 in the original, 1 or 2 for small images. Raises ValueError where they don't fit
    together."""
    if not widths or len(widths) != len(depths) or min(*widths, *depths, patch) < 1:
        raise ValueError(f"convnext needs as many depths as widths, all positive, not {depths} and {widths}")
    return ConvNeXt(classes=classes, in_channels=in_channels, depths=depths, widths=widths, patch=patch)


def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the names of torchvision, transformers and the authors. timm's small sizes have 1x1 convolutions for linear
    layers."""
    rules = [
        # torchvision: stages and what comes before each take turns
        (r"^features\.0\.", "stem."),
        *((rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
        *((rf"^features\.{2 * i + 1}\.(\d+)\.(block\.)?", rf"stages.{i}.blocks.\1.") for i in range(4)),
        (r"^(stages\.\d+\.blocks\.\d+)\.0\.", r"\1.conv_dw."),
        (r"^(stages\.\d+\.blocks\.\d+)\.2\.", r"\1.norm."),
        (r"^(stages\.\d+\.blocks\.\d+)\.3\.", r"\1.mlp.fc1."),
        (r"^(stages\.\d+\.blocks\.\d+)\.5\.", r"\1.mlp.fc2."),
        (r"^classifier\.0\.", "head.norm."),
        (r"^classifier\.2\.", "head.fc."),
        # transformers
        (r"^convnext\.", ""),
        (r"^embeddings\.patch_embeddings\.", "stem.0."),
        (r"^embeddings\.layernorm\.", "stem.1."),
        (r"^encoder\.(stages\.\d+)\.downsampling_layer\.", r"\1.downsample."),
        (r"^encoder\.(stages\.\d+)\.layers\.", r"\1.blocks."),
        (r"^(stages\.\d+\.blocks\.\d+)\.layernorm\.", r"\1.norm."),
        (r"^layernorm\.", "head.norm."),
        (r"^classifier\.", "head.fc."),
        # the authors
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^(stages\.\d+)\.(\d+)\.", r"\1.blocks.\2."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        # several of them
        (r"^(stages\.\d+\.blocks\.\d+)\.dwconv\.", r"\1.conv_dw."),
        (r"^(stages\.\d+\.blocks\.\d+)\.pwconv", r"\1.mlp.fc"),
        (r"^(stages\.\d+\.blocks\.\d+)\.(layer_scale|layer_scale_parameter)$", r"\1.gamma"),
    ]
    renamed = rename(tensors, rules)
    for name, tensor in renamed.items():
        if name.endswith(".gamma"):
            renamed[name] = tensor.flatten()  # torchvision: (C, 1, 1)
        elif re.search(r"\.mlp\.fc\d\.weight$", name):
            renamed[name] = tensor.flatten(1)
    return renamed


def recognize(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:
    if config.get("hidden_act", "gelu") != "gelu":
        return None
    tensors = convert(outline(shapes))
    stages = sorted({int(m[1]) for name in tensors if (m := re.match(r"stages\.(\d+)\.blocks\.", name))})
    if "stem.0.weight" not in tensors or stages != [0, 1, 2, 3]:
        return None
    blocks = [{m[1] for n in tensors if (m := re.match(rf"stages\.{i}\.blocks\.(\d+)\.gamma", n))} for i in stages]
    args: dict[str, Json] = {
        "depths": [len(numbers) for numbers in blocks],
        "widths": [tensors[f"stages.{i}.blocks.0.gamma"].shape[0] for i in stages],
        "patch": tensors["stem.0.weight"].shape[-1],
    }
    return confirm(args, build, tensors, "head.fc")


MODEL = Model(
    name="convnext",
    kinds=("image",),
    build=build,
    head="head.fc",
    source="arXiv:2201.03545",
    recognize=recognize,
    convert=convert,
)
