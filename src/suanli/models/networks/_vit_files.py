"""Which files of published originals `_vit.py` reads, and how.

Known are the names of timm, transformers, torchvision, OpenAI's and Open CLIP, and the authors of DINOv2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from suanli.core.types import Json, Shapes
from suanli.models.networks._published import confirm, outline, rename
from suanli.models.networks._vit import build

TOWERS = ("visual.trunk.", "visual.", "vision_model.")  # prefixes of the image tower in files of CLIP
# Heads whose width isn't 64, by the width of the network.
OTHER_HEADS = {1280: 16, 1408: 16, 1664: 16}
RULES = [
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    # transformers
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^(blocks\.\d+)\.(attention|self_attn)\.(attention\.)?(query|q_proj)\.", r"\1.attn.q."),
    (r"^(blocks\.\d+)\.(attention|self_attn)\.(attention\.)?(key|k_proj)\.", r"\1.attn.k."),
    (r"^(blocks\.\d+)\.(attention|self_attn)\.(attention\.)?(value|v_proj)\.", r"\1.attn.v."),
    (r"^(blocks\.\d+)\.(attention|self_attn)\.(output\.dense|o_proj|out_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.(layernorm_before|layer_norm1)\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.(layernorm_after|layer_norm2)\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.layer_scale(\d)\.lambda1$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^pre_layrnorm\.", "norm_pre."),  # their spelling
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^classifier\.", "head."),
    # torchvision
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.self_attention\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.mlp\.(0|linear_1)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.(3|linear_2)\.", r"\1.mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    # CLIP
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"^(blocks\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    # DINOv2
    (r"^register_tokens$", "reg_token"),
]
# Not part of the network: what only pretraining needs, a layer that BERT had after the class token, CLIP's projection.
DROP = r"(embeddings\.)?(mask_token|position_ids)$|pooler\.|decoder\.|proj$"


def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the names of transformers, torchvision, CLIP and DINOv2. Of CLIP's two towers the one for images is kept."""
    tower = next((t for t in TOWERS if any(name.startswith(t) for name in tensors)), None)
    if tower is not None:
        tensors = {name.removeprefix(tower): tensor for name, tensor in tensors.items() if name.startswith(tower)}
    renamed = rename(tensors, RULES, drop=DROP)
    for name in {"cls_token", "pos_embed"} & renamed.keys():
        renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])  # CLIP: without the first axes
    for name in [name for name in renamed if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace(".q.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def recognize(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:
    """The arguments of `vit` for a file. Without `config` heads are 64 wide, and norms and activations those that files
    of these names usually have."""
    tensors = convert(outline(shapes))
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= tensors.keys():
        return None
    if config.get("global_pool", "token") != "token":
        return None
    config = config.get("vision_config") or config
    width, _, _, patch = tensors["patch_embed.proj.weight"].shape
    norm_first = "norm_pre.weight" in tensors
    if config.get("hidden_act", "gelu") not in ("gelu", "quick_gelu"):
        return None
    class_position = _is_square(tensors["pos_embed"].shape[1] - 1)
    if not class_position and not _is_square(tensors["pos_embed"].shape[1]):
        return None  # registers with positions, or images that weren't square
    args: dict[str, Json] = {
        "width": width,
        "depth": len({m[1] for name in tensors if (m := re.match(r"blocks\.(\d+)\.norm1\.weight", name))}),
        "heads": int(config.get("num_attention_heads") or OTHER_HEADS.get(width, width // 64)),
        "patch": patch,
        "hidden": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "eps": float(config.get("layer_norm_eps") or _usual_eps(shapes, norm_first=norm_first)),
        "quick_gelu": _has_quick_gelu(config) if norm_first else config.get("hidden_act") == "quick_gelu",
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "registers": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "norm_first": norm_first,
        "class_position": class_position,
    }
    return confirm(args, build, tensors, "head")


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _usual_eps(shapes: Shapes, *, norm_first: bool) -> float:
    of_transformers = any("layernorm_before" in name for name in shapes)
    return 1e-5 if norm_first else 1e-12 if of_transformers else 1e-6


def _has_quick_gelu(config: Mapping[str, Json]) -> bool:
    """OpenAI's CLIP has it; later trainings often don't, and say so in their configuration."""
    if "architecture" in config:  # timm, whose usual versions of CLIP have GELU whatever the weights learned with
        tag = str(config.get("tag") or config.get("pretrained_cfg", {}).get("tag") or "")
        return "quickgelu" in config["architecture"] or tag == "openai" or tag.startswith(("metaclip", "dfn5b"))
    if "model_cfg" in config:  # OpenCLIP
        return bool(config["model_cfg"].get("quick_gelu", False))
    return bool(config.get("hidden_act", "quick_gelu") == "quick_gelu")
