"""The tiny vision transformer: 12 blocks of width 192 with 3 heads.

The patch size follows the image, so that a small image still gives about 8x8 tokens; sides that aren't a
multiple of it are padded with zeros. Parameter names are those of timm, so that its safetensors weights
load by name where patch and image size agree. From scratch it needs far more data or epochs than a
convolutional network of the same cost.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; the tiny size is that of
Touvron et al., arXiv:2012.12877.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from suanli.core.types import Model

WIDTH, DEPTH, HEADS = 192, 12, 3


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to tokens (B, L, D), one per patch."""

    def __init__(self, in_channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, WIDTH, patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bottom, right = -x.shape[2] % self.patch, -x.shape[3] % self.patch
        tokens: torch.Tensor = self.proj(F.pad(x, (0, right, 0, bottom)))
        return tokens.flatten(2).mT


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Images (B, in_channels, *image_size) to logits (B, classes)."""

    def __init__(self, *, classes: int, in_channels: int, tokens: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + tokens, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1) + self.pos_embed
        logits: torch.Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def patch_size(image_size: tuple[int, int]) -> int:
    """The power of two nearest an eighth of the shorter side, at most 16."""
    return int(min(16, max(1, 2 ** round(math.log2(max(1, min(image_size)) / 8)))))


def build(
    *, classes: int, in_channels: int, image_size: tuple[int, int], patch: int | None = None
) -> VisionTransformer:
    """Images (B, in_channels, *image_size) to logits (B, classes). `patch` in px; None: by image size."""
    patch = patch_size(image_size) if patch is None else patch
    if patch < 1:
        raise ValueError(f"patch must be at least 1 px, not {patch}")
    tokens = math.prod(-(-side // patch) for side in image_size)
    return VisionTransformer(classes=classes, in_channels=in_channels, tokens=tokens, patch=patch)


MODEL = Model(name="vit_tiny", kinds=("image",), build=build, head="head", source="arXiv:2010.11929")
