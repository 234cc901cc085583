"""Vision transformers: ViT, DINOv2 with or without registers, and the image tower of CLIP.

Sides that aren't a multiple of the patch are padded with zeros. Parameter names are those of timm; `_vit_files.py`
reads files with other names.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; layer scale, Touvron et al.,
arXiv:2103.17239; DINOv2, Oquab et al., arXiv:2304.07193; registers, Darcet et al., arXiv:2309.16588; CLIP, Radford et
al., arXiv:2103.00020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

SOURCE = "arXiv:2010.11929"


@dataclass(frozen=True, kw_only=True)
class Design:
    width: int
    depth: int
    heads: int
    patch: int  # px
    hidden: int  # width inside an MLP
    eps: float  # of the norms
    quick_gelu: bool  # CLIP's approximation of GELU
    layer_scale: bool  # a trained factor for each channel that a block adds
    registers: int  # tokens besides the class token that belong to no patch
    norm_first: bool  # CLIP: a norm before the first block, and no bias in the patches
    class_position: bool  # whether the class token has a position, too


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to maps (B, D, H/patch, W/patch)."""

    def __init__(self, in_channels: int, design: Design) -> None:
        super().__init__()
        self.patch = design.patch
        self.proj = nn.Conv2d(in_channels, design.width, self.patch, self.patch, bias=not design.norm_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bottom, right = -x.shape[2] % self.patch, -x.shape[3] % self.patch
        maps: torch.Tensor = self.proj(F.pad(x, (0, right, 0, bottom)) if bottom or right else x)
        return maps


class Attention(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        self.heads = design.heads
        self.qkv = nn.Linear(design.width, 3 * design.width)
        self.proj = nn.Linear(design.width, design.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class QuickGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        self.fc1 = nn.Linear(design.width, design.hidden)
        self.act = QuickGelu() if design.quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(design.hidden, design.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(design.width, eps=design.eps)
        self.attn = Attention(design)
        self.ls1 = LayerScale(design.width) if design.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(design.width, eps=design.eps)
        self.mlp = Mlp(design)
        self.ls2 = LayerScale(design.width) if design.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, classes). For images of another size than `image_size` the positions
    are resampled in each pass."""

    def __init__(self, design: Design, *, classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.design = design
        self.grid = (-(-image_size[0] // design.patch), -(-image_size[1] // design.patch))
        width, first = design.width, int(design.class_position)
        self.patch_embed = PatchEmbed(in_channels, design)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, first + math.prod(self.grid), width))
        if design.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, design.registers, width))
        self.norm_pre = nn.LayerNorm(width, eps=design.eps) if design.norm_first else nn.Identity()
        self.blocks = nn.Sequential(*(Block(design) for _ in range(design.depth)))
        self.norm = nn.LayerNorm(width, eps=design.eps)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if design.registers:
            nn.init.normal_(self.reg_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.patch_embed(x)
        patches = maps.flatten(2).mT
        grid = (maps.shape[2], maps.shape[3])
        positions = self.pos_embed if grid == self.grid else self._resampled(self.pos_embed, self.grid, grid)
        special: list[torch.Tensor] = [self.cls_token]
        if self.design.class_position:
            special, positions = [self.cls_token + positions[:, :1]], positions[:, 1:]
        if self.design.registers:
            special.append(self.reg_token)
        patches = patches + positions
        before = [token.expand(x.shape[0], -1, -1).to(patches.dtype) for token in special]
        tokens = self.norm_pre(torch.cat([*before, patches], 1))
        logits: torch.Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits

    def fit_tensor(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, str] | None:
        """A tensor of a weights file whose shape is another, made to fit, and what was done; None where it can't.
        Raises ValueError for patches of another size, with which nothing that the file knows can be used."""
        if name == "patch_embed.proj.weight" and tensor.ndim == 4 and tensor.shape[3] != self.design.patch:
            side = tensor.shape[3]
            raise ValueError(
                f"its patches have {side} px, those of the model {self.design.patch} px (--set model_args.patch={side})"
            )
        first = int(self.design.class_position)
        side = math.isqrt(max(tensor.shape[1] - first, 0)) if tensor.ndim == 3 else 0
        if name != "pos_embed" or side < 1 or side**2 + first != tensor.shape[1]:
            return None
        resampled = self._resampled(tensor.float(), (side, side), self.grid)
        return resampled, f"positions resampled from {side}x{side} to {self.grid[0]}x{self.grid[1]}"

    def _resampled(self, positions: torch.Tensor, before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
        """Positions (1, L, D) of patches on another grid; that of the class token stays."""
        first = int(self.design.class_position)
        maps = positions[:, first:].float().mT.reshape(1, -1, *before)
        maps = F.interpolate(maps, after, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([positions[:, :first], maps.flatten(2).mT.to(positions.dtype)], 1)


def patch_size(image_size: tuple[int, int]) -> int:
    """The power of two nearest an eighth of the shorter side, at most 16."""
    return int(min(16, max(1, 2 ** round(math.log2(max(1, min(image_size)) / 8)))))


def build(
    *,
    classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    width: int = 384,
    depth: int = 12,
    heads: int | None = None,
    patch: int | None = None,
    hidden: int | None = None,
    eps: float = 1e-6,
    quick_gelu: bool = False,
    layer_scale: bool = False,
    registers: int = 0,
    norm_first: bool = False,
    class_position: bool = True,
) -> VisionTransformer:
    """Images (B, in_channels, *image_size) to logits (B, classes). `heads` None: 64 channels each; `patch` in px, None:
    a power of two by image size; `hidden`, the width inside an MLP, None: 4 times `width`; for the others see `Design`.
    Raises ValueError for what can't be."""
    heads = max(1, width // 64) if heads is None else heads
    patch = patch_size(image_size) if patch is None else patch
    hidden = 4 * width if hidden is None else hidden
    if min(width, depth, heads, patch, hidden) < 1 or registers < 0:
        raise ValueError("width, depth, heads, patch and hidden must be at least 1")
    if width % heads:
        raise ValueError(f"width {width} can't be split into {heads} heads")
    design = Design(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        hidden=hidden,
        eps=eps,
        quick_gelu=quick_gelu,
        layer_scale=layer_scale,
        registers=registers,
        norm_first=norm_first,
        class_position=class_position,
    )
    return VisionTransformer(design, classes=classes, in_channels=in_channels, image_size=image_size)
