"""What single models promise beyond the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from suanli.core import registry
from suanli.models.networks import _convolution
from suanli.models.networks._convolution import Conv3x3
from suanli.models.networks._vit import patch_size
from suanli.models.networks.speednet import Whitening


def build(name: str, side: int = 32, **args: object) -> nn.Module:
    torch.manual_seed(0)
    return registry.load("models", name).build(**{"classes": 10, "in_channels": 3, "image_size": (side, side)} | args)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("alexnet", 61_100_840),
        ("vit_tiny", 5_717_416),
        ("vit", 22_050_664),
        ("resnet", 44_549_160),
        ("efficientnet_lite0", 4_652_008),
        ("efficientnet_lite1", 5_416_680),
        ("efficientnet_lite2", 6_092_072),
        ("mobilenet_v3_small", 2_542_856),
        ("mobilenet_v3_large", 5_483_032),
        ("convnext", 3_695_520),
    ],
)
def test_has_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert (
            count(registry.load("models", name).build(classes=1000, in_channels=3, image_size=(224, 224))) == parameters
        )


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        (
            "resnet18",
            ["conv1.weight", "bn1.running_var", "layer2.0.downsample.1.weight", "layer4.1.conv2.weight", "fc.bias"],
        ),
        ("resnet50", ["layer1.0.conv3.weight", "layer1.0.downsample.0.weight", "layer3.5.bn3.bias"]),
        ("alexnet", ["features.0.bias", "features.10.weight", "classifier.1.weight", "classifier.6.bias"]),
        ("vit_tiny", ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.11.attn.qkv.bias", "norm.weight"]),
    ],
)
def test_has_the_published_tensor_names(name: str, tensors: list[str]) -> None:
    with torch.device("meta"):
        assert set(tensors) <= set(build(name, side=224).state_dict())


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_the_stem_follows_the_size_unless_given(name: str) -> None:
    def first(side: int, **args: object) -> torch.Size:
        with torch.device("meta"):
            return next(iter(build(name, side, **args).state_dict().values())).shape

    small, large = first(64), first(65)
    assert small[-1] < large[-1]
    assert first(32, stem="small") == small
    assert first(128, stem="large") == large
    with pytest.raises(ValueError, match="stem"):
        build(name, stem="tiny")


def test_the_original_alexnet_says_that_small_images_do_not_fit() -> None:
    with pytest.raises(ValueError, match="63 px"):
        build("alexnet", 32, stem="large")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit", {"width": 100, "heads": 3}, "heads"),
        ("vit", {"depth": 0}, "at least 1"),
        ("vit", {"heads": 0}, "at least 1"),
        ("vit_tiny", {"patch": 0}, "at least 1"),
        ("convnext", {"depths": [1, 1]}, "as many depths"),
        ("resnet", {"depths": [1]}, "four depths"),
        ("resnet", {"block": "wide"}, "bottleneck"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **args)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenet_v3_small", {"same_padding": True}),
        ("convnext", {"depths": [1, 1], "widths": [8, 16]}),
        ("vit", {"width": 64, "depth": 1, "registers": 2, "norm_first": True, "quick_gelu": True}),
    ],
)
def test_a_batch_of_any_size_can_be_exported(name: str, args: dict[str, object]) -> None:
    module = build(name, 33, **args).eval()
    program = torch.export.export(module, (torch.zeros(2, 3, 33, 33),), dynamic_shapes=({0: torch.export.Dim("B")},))
    images = torch.randn(5, 3, 33, 33)
    torch.testing.assert_close(program.module()(images), module(images), rtol=1e-4, atol=1e-5)


def test_positions_follow_images_of_another_size() -> None:
    """As with mixed sizes: the same positions, on another grid."""
    module = build("vit", 64, width=64, depth=1, patch=8).eval()
    other = build("vit", 48, width=64, depth=1, patch=8).eval()
    tensors = dict(module.state_dict())
    tensors["pos_embed"], _ = other.fit_tensor("pos_embed", tensors["pos_embed"])  # type: ignore[operator]
    other.load_state_dict(tensors)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(module(images), other(images))
    module(images).sum().backward()
    assert module.get_parameter("pos_embed").grad.isfinite().all()  # type: ignore[union-attr]


@given(st.integers(1, 600), st.integers(1, 600))
def test_a_vit_patch_gives_few_tokens(height: int, width: int) -> None:
    patch = patch_size((height, width))
    assert 1 <= patch <= 16
    assert patch == 16 or 5 <= -(-min(height, width) // patch) <= 12 or min(height, width) < 8


@given(st.integers(2, 80), st.integers(2, 80), st.sampled_from([1, 2, 3, 4, 6]))
def test_speednet_takes_any_size(height: int, width: int, channels: int) -> None:
    module = build("speednet", in_channels=channels, image_size=(height, width), widths=(8, 8, 16)).eval()
    with torch.inference_mode():
        assert module(torch.zeros(1, channels, height, width)).isfinite().all()


@pytest.mark.parametrize("side", [256, 512])
def test_speednet_takes_large_images(side: int) -> None:
    with torch.inference_mode():
        assert build("speednet", side).eval()(torch.zeros(1, 3, side, side)).shape == (1, 10)


def test_speednet_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="2x2"):
        build("speednet", 1)
    with pytest.raises(ValueError, match="widths"):
        build("speednet", widths=())


def correlated(count: int) -> torch.Tensor:
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * torch.tensor([1.0, 3.0, 0.5]).view(1, 3, 1, 1)


def test_whitening_makes_patch_features_uncorrelated_and_equally_spread() -> None:
    inputs = correlated(2000)
    whitening = Whitening(3)
    whitening.fit(inputs, eps=0.0)
    with torch.inference_mode():
        features = whitening(inputs)[:, :12].transpose(0, 1).flatten(1)
        negatives = whitening(inputs)[:, 12:].transpose(0, 1).flatten(1)
    torch.testing.assert_close(features @ features.T / features.shape[1], torch.eye(12), rtol=0, atol=2e-2)
    assert torch.equal(negatives, -features)


@pytest.mark.parametrize("inputs", [torch.zeros(4, 3, 12, 12), correlated(1)], ids=["constant", "one"])
def test_whitening_of_poor_data_stays_finite(inputs: torch.Tensor) -> None:
    whitening = Whitening(3)
    whitening.fit(inputs)
    assert whitening.weight.isfinite().all()
    assert not whitening.weight.requires_grad


def test_initialize_is_deterministic_and_leaves_the_rest() -> None:
    one, two = build("speednet"), build("speednet")
    before = {name: value.clone() for name, value in one.state_dict().items()}
    images = torch.randn(64, 3, 32, 32)
    one.initialize(images)  # type: ignore[operator]
    two.initialize(images)  # type: ignore[operator]
    changed = [name for name, value in one.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["whitening.weight"]
    assert torch.equal(one.state_dict()["whitening.weight"], two.state_dict()["whitening.weight"])


def learns(module: nn.Module, step: Callable[[], torch.Tensor]) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    "name", ["speednet", *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet18", "alexnet", "vit_tiny"))]
)
def test_learns_a_batch_by_heart(name: str) -> None:
    module = build(name, 16, **({"dropout": 0.0} if name == "alexnet" else {}))
    inputs, targets = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    first, last = learns(module, lambda: nn.functional.cross_entropy(module(inputs), targets))
    assert last < 0.8 * first


@given(st.integers(1, 4), st.integers(1, 4))
def test_convolution_of_small_maps_equals_torchs(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, height, width, generator=generator).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = Conv3x3(8, 16).to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(_convolution, "has_matrix_units", lambda: True)
        convolved, expected = layer(x), F.conv2d(x, layer.weight, padding=1)
    assert "SmallMaps" in type(convolved.grad_fn).__name__
    assert torch.equal(convolved, expected)
    weights = torch.randn(convolved.shape, generator=generator).to(convolved.dtype)
    found, right = (
        torch.autograd.grad(y, (x, layer.weight), weights, retain_graph=True) for y in (convolved, expected)
    )
    torch.testing.assert_close(found, right, rtol=0.02, atol=0.02)
