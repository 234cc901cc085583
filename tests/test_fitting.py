"""Weights files: which network they are of, and how they get into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from originals import clip_file
from suanli.core import registry
from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.models.build import load_weights, recognize, resolve


def built(
    name: str, *, classes: int = 10, channels: int = 3, side: int = 32, seed: int = 0, **args: object
) -> nn.Module:
    torch.manual_seed(seed)
    module: nn.Module = registry.load("models", name).build(
        classes=classes, in_channels=channels, image_size=(side, side), **args
    )
    return module.eval()


def resnet(classes: int = 10, seed: int = 0) -> nn.Module:
    return built("resnet18", classes=classes, seed=seed)


def saved(module: nn.Module, path: Path, prefix: str = "", **changed: torch.Tensor | None) -> Path:
    state = {k: v for k, v in (module.state_dict() | changed).items() if v is not None}
    save_file({prefix + k: v.contiguous() for k, v in state.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.backbone."])
def test_all_weights_are_taken_whatever_wrapped_them(tmp_path: Path, prefix: str) -> None:
    source, module = resnet(seed=1), resnet(seed=2)
    report = load_weights(module, saved(source, tmp_path / "w.safetensors", prefix), "fc")
    assert set(report.taken) == set(module.state_dict())
    assert not report.skipped
    assert not report.missing
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in module.state_dict().items())


def test_other_classes_get_a_new_head(tmp_path: Path) -> None:
    source, module = resnet(1000, seed=1), resnet(10, seed=2)
    head = module.fc.weight.detach().clone()
    report = load_weights(module, saved(source, tmp_path / "w.safetensors"), "fc")
    assert set(report.skipped) == {"fc.weight", "fc.bias"}
    assert set(report.skipped.values()) == {"part of a head for other classes"}
    assert torch.equal(module.fc.weight, head)
    assert torch.equal(module.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_half_a_head_is_not_taken(tmp_path: Path) -> None:
    source, module = resnet(seed=1), resnet(seed=2)
    path = saved(source, tmp_path / "w.safetensors", **{"fc.weight": torch.zeros(10, 9)})
    report = load_weights(module, path, "fc")
    assert set(report.skipped) == {"fc.weight", "fc.bias"}


def test_what_does_not_fit_is_listed_with_its_reason(tmp_path: Path) -> None:
    source, module = resnet(seed=1), resnet(seed=2)
    changed = {"conv1.weight": torch.zeros(64, 3, 7, 7), "extra.weight": torch.zeros(3), "bn1.bias": None}
    report = load_weights(module, saved(source, tmp_path / "w.safetensors", **changed), "fc")
    assert "64x3x7x7" in report.skipped["conv1.weight"]
    assert "no tensor of this name" in report.skipped["extra.weight"]
    assert report.missing == ("bn1.bias",)
    for word in ("conv1.weight", "extra.weight", "bn1.bias", str(len(report.taken))):
        assert word in str(report)


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    source, module = resnet(seed=1), resnet(seed=2)
    load_weights(module, saved(source.bfloat16(), tmp_path / "w.safetensors"), "fc")
    assert module.conv1.weight.dtype == torch.float32
    assert torch.equal(module.conv1.weight, source.conv1.weight.float())


def test_weights_of_another_network_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    module = resnet()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    save_file({"encoder.weight": torch.ones(3), "fc.bias": torch.ones(10)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"encoder\.weight.*conv1\.weight"):
        load_weights(module, tmp_path / "w.safetensors", "fc")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_weights_that_are_not_numbers_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    module = resnet()
    before = module.bn1.weight.detach().clone()
    path = saved(resnet(seed=1), tmp_path / "w.safetensors", **{"conv1.weight": torch.full((64, 3, 3, 3), torch.nan)})
    with pytest.raises(DamagedFile, match=r"conv1\.weight"):
        load_weights(module, path, "fc")
    assert torch.equal(module.bn1.weight, before)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "W.PKL", "w.bin", "w.ckpt"])
def test_a_pickle_is_refused_without_opening_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"suanli convert"):
        load_weights(resnet(), tmp_path / name, "fc")


@given(kept=st.floats(0, 0.999))
def test_a_truncated_file_is_damaged(tmp_path_factory: pytest.TempPathFactory, kept: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "w.safetensors"
    save_file({"weight": torch.ones(40, 3), "bias": torch.ones(40)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DamagedFile):
        load_weights(nn.Linear(3, 40), path, "head")


@given(st.binary(max_size=64))
def test_any_bytes_are_damaged_or_do_not_fit(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_weights(nn.Linear(3, 40), path, "head")


def test_a_missing_file_or_a_folder_is_the_users_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UsageError, match="Can't read weights"):
            load_weights(resnet(), path, "fc")


# --- which network a file is of ---

PUBLISHED = {  # names in files of the originals, and what they are here
    "efficientnet_lite0": {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.3._expand_conv.weight": "blocks.2.0.conv_pw.weight",
        "_blocks.3._bn0.weight": "blocks.2.0.bn1.weight",
        "_blocks.15._bn2.weight": "blocks.6.0.bn3.weight",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
    },
    "mobilenet_v3_small": {
        "features.0.0.weight": "conv_stem.weight",
        "features.1.block.1.fc1.weight": "blocks.0.0.se.conv_reduce.weight",
        "features.1.block.2.1.bias": "blocks.0.0.bn2.bias",
        "features.3.block.2.0.weight": "blocks.1.1.conv_pwl.weight",
        "features.4.block.3.1.weight": "blocks.2.0.bn3.weight",
        "features.12.1.running_mean": "blocks.5.0.bn1.running_mean",
        "classifier.0.bias": "conv_head.bias",
        "classifier.3.weight": "classifier.weight",
    },
    "resnet50": {
        "resnet.embedder.embedder.convolution.weight": "conv1.weight",
        "resnet.encoder.stages.1.layers.0.shortcut.normalization.bias": "layer2.0.downsample.1.bias",
        "resnet.encoder.stages.3.layers.2.layer.2.convolution.weight": "layer4.2.conv3.weight",
        "classifier.1.bias": "fc.bias",
    },
    "convnext": {
        "features.0.1.bias": "stem.1.bias",
        "features.2.1.weight": "stages.1.downsample.1.weight",
        "features.5.3.block.5.bias": "stages.2.blocks.3.mlp.fc2.bias",
        "features.7.0.layer_scale": "stages.3.blocks.0.gamma",
        "convnext.encoder.stages.1.layers.0.pwconv1.bias": "stages.1.blocks.0.mlp.fc1.bias",
        "convnext.layernorm.weight": "head.norm.weight",
        "downsample_layers.0.0.weight": "stem.0.weight",
        "stages.3.1.dwconv.weight": "stages.3.blocks.1.conv_dw.weight",
        "head.bias": "head.fc.bias",
    },
    "vit": {
        "vit.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "vit.encoder.layer.3.attention.output.dense.weight": "blocks.3.attn.proj.weight",
        "vit.encoder.layer.3.output.dense.weight": "blocks.3.mlp.fc2.weight",
        "dinov2.encoder.layer.1.layer_scale2.lambda1": "blocks.1.ls2.gamma",
        "encoder.layers.encoder_layer_7.self_attention.in_proj_bias": "blocks.7.attn.qkv.bias",
        "encoder.layers.encoder_layer_7.mlp.3.weight": "blocks.7.mlp.fc2.weight",
        "register_tokens": "reg_token",
    },
}


@pytest.mark.parametrize(
    ("model", "name", "ours"), [(model, *pair) for model, pairs in PUBLISHED.items() for pair in pairs.items()]
)
def test_published_names_become_ours(model: str, name: str, ours: str) -> None:
    with torch.device("meta"):
        state = built(model, side=224, **({"layer_scale": True, "registers": 1} if model == "vit" else {})).state_dict()
    assert ours in state
    assert list(registry.load("models", model).convert({name: torch.zeros(2, 2)})) == [ours]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


CLIP = {"norm_first": True, "quick_gelu": True, "eps": 1e-5}
TINY: dict[str, Any] = {"width": 64, "depth": 1, "patch": 8}


def test_the_image_tower_of_clip_is_recognised_among_the_texts() -> None:
    found = recognize(clip_file())
    assert found is not None
    assert found[0] == "vit"
    assert found[1].items() >= {**CLIP, "width": 64, "depth": 1, "heads": 1, "patch": 8}.items()


@pytest.mark.parametrize(
    ("config", "quick"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, False),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, True),
        ({"model_cfg": {"quick_gelu": True}}, True),
        ({"model_cfg": {"embed_dim": 512}}, False),
        ({"architecture": "vit_base_patch16_clip_224", "tag": "openai"}, True),
        ({"architecture": "vit_base_patch16_clip_224", "tag": "laion2b"}, False),
    ],
)
def test_the_publishers_configuration_says_what_no_shape_shows(config: dict[str, object], quick: bool) -> None:
    found = recognize(clip_file(), config)
    assert found is not None
    assert found[1]["quick_gelu"] is quick


@pytest.mark.parametrize(
    "vision",
    [
        *({"num_attention_heads": heads} for heads in (0.5, "many", 7, {})),
        *({"hidden_act": act} for act in ("relu", {})),
        {"layer_norm_eps": []},
        "text",
    ],
)
def test_a_configuration_that_cannot_be_makes_no_network(vision: object) -> None:
    found = recognize(clip_file(), {"vision_config": vision})
    assert found is None or found[1] == recognize(clip_file())[1]  # type: ignore[index]


def test_padding_and_norms_follow_who_trained_it() -> None:
    lite = shapes(built("efficientnet_lite0"))
    assert recognize(lite) == ("efficientnet_lite0", {})
    assert recognize(lite, {"architecture": "efficientnet_lite0"}) == (
        "efficientnet_lite0",
        {"eps": 1e-5, "same_padding": False},
    )
    mobile = shapes(built("mobilenet_v3_small"))
    found = recognize(mobile, {"architecture": "tf_mobilenetv3_small_100"})
    assert found == ("mobilenet_v3_small", {"eps": 1e-3, "same_padding": True})


@pytest.mark.parametrize("prefix", ["module.", "model.backbone."])
def test_a_file_is_recognised_whatever_wrapped_it(prefix: str) -> None:
    file = {prefix + name: shape for name, shape in shapes(built("resnet18", side=224)).items()}
    assert recognize(file) == ("resnet18", {"stem": "large"})


def changed(**changes: object) -> dict[str, tuple[int, ...]]:
    file: dict[str, object] = shapes(built("resnet18", side=224)) | changes
    return {name: shape for name, shape in file.items() if shape is not None}  # type: ignore[misc]


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"conv1.weight": (64, 3, 7, 7)},
        changed(**{"layer1.0.se.fc.weight": (4, 64)}),
        changed(**{"layer4.1.bn2.bias": None}),
        changed(**{"layer4.1.conv2.weight": (512, 16, 3, 3)}),
        {"cls_token": (), "pos_embed": (3,), "patch_embed.proj.weight": (1,), "blocks.0.mlp.fc1.weight": ()},
        {"patch_embed.proj.weight": (10**12, 3, 16, 16), "cls_token": (1, 1, 1), "pos_embed": (1, 5, 1)}
        | {"blocks.0.mlp.fc1.weight": (10**12, 10**12)},
        {"stem.0.weight": (0, 0, 0, 0), "stages.0.blocks.0.gamma": (0,)},
        {"stages.99999999999999999999.blocks.0.gamma": (), "stem.0.weight": ()},
    ],
    ids=["nothing", "one", "more", "less", "grouped", "scalars", "huge", "empty", "numbers"],
)
def test_a_network_that_is_a_little_different_is_not_recognised(file: dict[str, tuple[int, ...]]) -> None:
    assert recognize(file) is None


def test_another_configuration_of_the_same_tensors_is_not_recognised() -> None:
    file = shapes(built("resnet18", side=224))
    assert recognize(file, {"architecture": "resnetblur18"}) is None
    assert recognize(file, {"downsample_in_bottleneck": True}) is None
    assert recognize(file, {"architecture": "test_resnet18"}) is None
    assert recognize(file, {"architecture": "resnet18"}) is not None


# --- published files into a network ---


def test_parts_are_joined_and_the_rest_of_the_original_left_out(tmp_path: Path) -> None:
    model = resolve("vit")
    source = built("vit", seed=1, **TINY).state_dict()
    renamed = {
        "vit.embeddings.cls_token": source["cls_token"],
        "vit.embeddings.position_embeddings": source["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": source["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": source["patch_embed.proj.bias"],
        "vit.layernorm.weight": source["norm.weight"],
        "vit.layernorm.bias": source["norm.bias"],
        "vit.pooler.dense.weight": torch.zeros(64, 64),
        "classifier.weight": source["head.weight"],
        "classifier.bias": source["head.bias"],
    }
    block = "vit.encoder.layer.0"
    for kind in ("weight", "bias"):
        for part, piece in zip(("query", "key", "value"), source[f"blocks.0.attn.qkv.{kind}"].chunk(3), strict=True):
            renamed[f"{block}.attention.attention.{part}.{kind}"] = piece
        renamed[f"{block}.attention.output.dense.{kind}"] = source[f"blocks.0.attn.proj.{kind}"]
        renamed[f"{block}.layernorm_before.{kind}"] = source[f"blocks.0.norm1.{kind}"]
        renamed[f"{block}.layernorm_after.{kind}"] = source[f"blocks.0.norm2.{kind}"]
        renamed[f"{block}.intermediate.dense.{kind}"] = source[f"blocks.0.mlp.fc1.{kind}"]
        renamed[f"{block}.output.dense.{kind}"] = source[f"blocks.0.mlp.fc2.{kind}"]
    save_file({name: tensor.clone() for name, tensor in renamed.items()}, tmp_path / "w.safetensors")
    found = recognize({name: tuple(tensor.shape) for name, tensor in renamed.items()})
    assert found is not None
    assert found[1]["eps"] == 1e-12  # as transformers writes it where its configuration isn't there
    module = built("vit", seed=2, **TINY)
    report = load_weights(module, tmp_path / "w.safetensors", "head", model=model)
    assert not report.skipped
    assert not report.missing
    assert all(torch.equal(value, source[name]) for name, value in module.state_dict().items())


NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenet_v3_small": {},
    "vit": TINY,
    "convnext": {"depths": [1, 1], "widths": [8, 16]},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_grey_image_gives_what_it_gave_in_three_channels(name: str, tmp_path: Path) -> None:
    source = built(name, seed=1, **NETWORKS[name])
    grey = built(name, channels=1, seed=2, **NETWORKS[name])
    report = load_weights(grey, saved(source, tmp_path / "w.safetensors"), resolve(name).head, model=resolve(name))
    assert not report.skipped
    (change,) = report.adapted.values()
    assert "summed" in change
    assert change in str(report)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(image), source(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [(3, 4), (3, 6), (1, 3), (4, 2)])
def test_other_channels_get_the_filters_in_turn(before: int, after: int, tmp_path: Path) -> None:
    source, module = (built("mobilenet_v3_small", channels=channels) for channels in (before, after))
    path = saved(source, tmp_path / "w.safetensors")
    report = load_weights(module, path, "classifier", model=resolve("mobilenet_v3_small"))
    assert list(report.adapted) == ["conv_stem.weight"]
    filters, original = module.get_parameter("conv_stem.weight"), source.get_parameter("conv_stem.weight")
    for channel in range(after):
        torch.testing.assert_close(filters[:, channel], original[:, channel % before] * before / after)


@pytest.mark.parametrize("class_position", [True, False])
def test_positions_are_resampled_for_another_size(class_position: bool, tmp_path: Path) -> None:
    args = {**TINY, "class_position": class_position, "registers": 2}
    source, module = built("vit", seed=1, **args), built("vit", side=48, seed=2, **args)
    report = load_weights(module, saved(source, tmp_path / "w.safetensors"), "head", model=resolve("vit"))
    assert report.adapted == {"pos_embed": "positions resampled from 4x4 to 6x6"}
    assert not report.skipped
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(module(images), source(images))  # which resamples in each pass


def test_positions_of_a_grid_that_is_unknown_are_not_taken(tmp_path: Path) -> None:
    module = built("vit", **TINY)
    path = saved(module, tmp_path / "w.safetensors", pos_embed=torch.zeros(1, 8, 64))
    assert "pos_embed" in load_weights(built("vit", **TINY), path, "head", model=resolve("vit")).skipped


def test_patches_of_another_size_are_refused(tmp_path: Path) -> None:
    path = saved(built("vit", **TINY), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"8 px, those of the model 4 px.*model_args\.patch=8"):
        load_weights(built("vit", **TINY | {"patch": 4}), path, "head", model=resolve("vit"))


def test_weights_of_another_network_say_of_which(tmp_path: Path) -> None:
    path = saved(built("resnet34"), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"weights of resnet34, and the model is resnet18.*--model resnet34"):
        load_weights(resnet(), path, "fc", model=resolve("resnet18"))


def test_weights_of_an_unknown_network_list_those_that_are_known(tmp_path: Path) -> None:
    save_file({"stem.conv.weight": torch.ones(3), "bn1.bias": torch.ones(64)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"stem\.conv\.weight.*--model.*convnext.*mobilenet_v3_large.*vit"):
        load_weights(resnet(), tmp_path / "w.safetensors", "fc", model=resolve("resnet18"))


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    without = {name: None for name in resnet().state_dict() if name.endswith("num_batches_tracked")}
    report = load_weights(resnet(), saved(resnet(seed=1), tmp_path / "w.safetensors", **without), "fc")
    assert not report.missing
