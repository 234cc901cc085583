"""Files with the names of published originals, for the tests of what reads them."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def clip_file() -> Shapes:
    """As OpenAI's, with a text tower: patches of 8 px, a grid of 4x4, one block of width 64."""
    block = {"attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192,)} | layer("attn.out_proj", 64, 64)
    block |= layer("ln_1", 64) | layer("ln_2", 64) | layer("mlp.c_fc", 256, 64) | layer("mlp.c_proj", 64, 256)
    blocks = {f"transformer.resblocks.0.{name}": shape for name, shape in block.items()}
    tower = {"class_embedding": (64,), "positional_embedding": (17, 64), "conv1.weight": (64, 3, 8, 8)}
    tower |= layer("ln_pre", 64) | layer("ln_post", 64) | {"proj": (64, 32)} | blocks
    text = {"positional_embedding": (77, 64), "text_projection": (64, 32), "logit_scale": ()} | layer("ln_final", 64)
    return {f"visual.{name}": shape for name, shape in tower.items()} | text | blocks


def dinov2_file() -> Shapes:
    """As the authors': patches of 14 px, a grid of 3x3, two blocks of width 64, four registers."""
    block = layer("norm1", 64) | layer("attn.qkv", 192, 64) | layer("attn.proj", 64, 64) | {"ls1.gamma": (64,)}
    block |= layer("norm2", 64) | layer("mlp.fc1", 256, 64) | layer("mlp.fc2", 64, 256) | {"ls2.gamma": (64,)}
    tokens = {"cls_token": (1, 1, 64), "pos_embed": (1, 10, 64), "register_tokens": (1, 4, 64), "mask_token": (1, 64)}
    blocks = {f"blocks.{number}.{name}": shape for number in range(2) for name, shape in block.items()}
    return tokens | layer("patch_embed.proj", 64, 3, 14, 14) | blocks | layer("norm", 64)


def convnext_file() -> Shapes:
    """As the authors': four stages of one block each, widths 8 to 32, seven classes."""
    widths = (8, 16, 24, 32)
    file = layer("downsample_layers.0.0", 8, 3, 4, 4) | layer("downsample_layers.0.1", 8)
    for number, width in enumerate(widths):
        block = layer("dwconv", width, 1, 7, 7) | layer("norm", width) | {"gamma": (width,)}
        block |= layer("pwconv1", 4 * width, width) | layer("pwconv2", width, 4 * width)
        file |= {f"stages.{number}.0.{name}": shape for name, shape in block.items()}
        if number:
            before = widths[number - 1]
            file |= layer(f"downsample_layers.{number}.0", before)
            file |= layer(f"downsample_layers.{number}.1", width, before, 2, 2)
    return file | layer("norm", 32) | layer("head", 7, 32)
