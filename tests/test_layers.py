"""The order of a network's layers, by the names of its parameters."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from suanli.core import registry
from suanli.models.build import head_of, resolve
from suanli.models.layers import head_distances, module_distances


def distances(named: list[str], head: str = "head") -> dict[str, int]:
    """Of matrices, but for biases and norms by their names."""
    vectors = ("bias", "norm", "bn", "gamma", "ln_")
    return head_distances([(n, torch.zeros(1 if any(v in n for v in vectors) else (1, 1))) for n in named], head)


def by_layer(found: dict[str, int]) -> list[list[str]]:
    """The names of each layer, from the input to the head."""
    return [[name for name, distance in found.items() if distance == layer] for layer in sorted(set(found.values()))][
        ::-1
    ]


PUBLISHED = {
    "ResNet of torchvision and timm": (
        "fc",
        [
            ["conv1.weight", "bn1.weight"],
            ["layer1.0.conv1.weight", "layer1.0.bn1.bias", "layer1.0.conv2.weight"],
            ["layer1.1.conv1.weight"],
            ["layer2.0.conv1.weight", "layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias"],
            ["fc.weight", "fc.bias"],
        ],
    ),
    "EfficientNet and MobileNetV3 of timm": (
        "classifier",
        [
            ["conv_stem.weight", "bn1.weight"],
            ["blocks.0.0.conv_dw.weight"],
            ["blocks.1.0.conv_pw.weight", "blocks.1.0.se.conv_reduce.weight"],
            ["blocks.1.1.conv_pw.weight"],
            ["conv_head.weight", "bn2.weight"],
            ["classifier.weight"],
        ],
    ),
    "EfficientNet of torchvision": (
        "classifier.1",
        [
            ["features.0.0.weight", "features.0.1.bias"],
            ["features.1.0.block.0.0.weight", "features.1.0.block.1.fc1.weight"],
            ["features.1.1.block.0.0.weight"],
            ["features.8.0.weight", "features.8.1.bias"],
            ["classifier.1.weight"],
        ],
    ),
    "ConvNeXt of timm": (
        "head.fc",
        [
            ["stem.0.weight", "stem.1.bias"],
            ["stages.0.blocks.0.gamma", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight"],
            ["stages.0.blocks.1.conv_dw.weight"],
            ["stages.1.downsample.0.bias", "stages.1.downsample.1.weight"],
            ["stages.1.blocks.0.conv_dw.weight", "head.norm.weight"],
            ["head.fc.weight"],
        ],
    ),
    "ViT and DINOv2": (
        "head",
        [
            ["cls_token", "pos_embed", "patch_embed.proj.weight"],
            ["blocks.0.norm1.weight", "blocks.0.attn.qkv.parametrizations.weight.0.lora_a", "blocks.0.mlp.fc1.weight"],
            ["blocks.1.attn.qkv.weight", "norm.weight"],
            ["head.weight"],
        ],
    ),
    "ViT of transformers": (
        "classifier",
        [
            ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"],
            ["vit.encoder.layer.0.attention.attention.query.weight", "vit.encoder.layer.0.output.dense.weight"],
            ["vit.encoder.layer.1.attention.attention.query.weight", "vit.layernorm.weight"],
            ["classifier.weight"],
        ],
    ),
    "ViT of torchvision": (
        "heads.head",
        [
            ["class_token", "encoder.pos_embedding"],
            ["conv_proj.weight"],
            ["encoder.layers.encoder_layer_0.ln_1.weight", "encoder.layers.encoder_layer_0.mlp.0.weight"],
            ["encoder.layers.encoder_layer_1.self_attention.in_proj_weight", "encoder.ln_.weight"],
            ["heads.head.weight"],
        ],
    ),
    "Swin of timm": (
        "head.fc",
        [
            ["patch_embed.proj.weight", "patch_embed.norm.weight"],
            ["layers.0.blocks.0.attn.qkv.weight"],
            ["layers.0.blocks.1.attn.qkv.weight"],
            ["layers.1.downsample.norm.weight", "layers.1.downsample.reduction.weight"],
            ["layers.1.blocks.0.attn.qkv.weight"],
            ["head.fc.weight"],
        ],
    ),
    "DenseNet": (
        "classifier",
        [
            ["features.conv0.weight", "features.norm0.weight"],
            ["features.denseblock1.denselayer1.norm1.weight", "features.denseblock1.denselayer1.conv1.weight"],
            ["features.denseblock1.denselayer2.conv1.weight"],
            ["features.transition1.conv.weight"],
            ["classifier.weight"],
        ],
    ),
    "a user's, whose names say nothing": (
        "out",
        [["first.weight", "first.bias"], ["0.weight"], ["3.weight", "4.bias"], ["mix.inner.weight"], ["out.weight"]],
    ),
    "a head that is listed first": ("head", [["0.weight"], ["1.weight"], ["head.weight", "head.bias"]]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_understood(name: str) -> None:
    head, layers = PUBLISHED[name]
    ordered = layers if "first" not in name else [layers[-1], *layers[:-1]]
    assert by_layer(distances([one for layer in ordered for one in layer], head)) == layers


LAYERS = {"resnet18": 9, "resnet50": 17, "vit_tiny": 13, "alexnet": 7, "speednet": 6}
LAYERS |= {"efficientnet_lite0": 18, "mobilenet_v3_small": 14, "convnext": 16}


@pytest.mark.parametrize("name", LAYERS)
def test_own_networks(name: str) -> None:
    model = registry.load("models", name)
    with torch.device("meta"):
        network = model.build(classes=3, in_channels=3, image_size=(64, 64))
    found = head_distances(network.named_parameters(), model.head)
    assert max(found.values()) == LAYERS[name]
    assert {name for name, distance in found.items() if distance == 0} == {
        f"{model.head}.{part}" for part, _ in network.get_submodule(model.head).named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "layers"),
    [("tf_efficientnet_lite0", 18), ("resnet18", 9), ("convnext_atto", 16), ("vit_tiny_patch16_224", 13)],
)
def test_networks_of_timm(name: str, layers: int) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    model = resolve(f"timm:{name}")
    with torch.device("meta"):
        network = model.build(classes=3, in_channels=3, image_size=(64, 64))
    assert max(head_distances(network.named_parameters(), head_of(network, model)).values()) == layers


def test_batch_norms_belong_to_the_layer_before_them() -> None:
    bare = nn.BatchNorm2d(4, affine=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), bare, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    found = {type(m).__name__ + str(i): d for i, (m, d) in enumerate(module_distances(network, "4"))}
    assert found == {
        "Sequential0": 2,
        "Conv2d1": 2,
        "BatchNorm2d2": 2,
        "Conv2d3": 1,
        "BatchNorm2d4": 1,
        "Linear5": 0,
    }


parts = st.sampled_from(["blocks", "0", "1", "layer1", "conv", "embed", "norm", "head", "attn", "weight", "a-b"])
names = st.lists(st.lists(parts, min_size=1, max_size=5).map(".".join), unique=True, min_size=1, max_size=20)


@given(names, st.lists(st.integers(1, 4), min_size=20, max_size=20))
def test_any_names_get_consecutive_layers(named: list[str], dimensions: list[int]) -> None:
    found = head_distances([(n, torch.zeros([1] * count)) for n, count in zip(named, dimensions, strict=False)], "head")
    assert found.keys() == set(named)
    assert all((distance == 0) == name.startswith("head.") for name, distance in found.items())
    assert {d for d in found.values() if d} == set(range(1, max(found.values()) + 1))
