"""Data sets that are parts of larger ones, and scores that are contaminated because weights learned from the larger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import suanli
from pictures import make_pictures
from suanli.core.overlaps import find_contamination
from suanli.core.types import Example, Source
from suanli.data.overlaps import find_part_of
from suanli.reporting.overview import read_overview
from suanli.verbs.evaluate import table
from suanli.verbs.runs import _score

TEN = (
    "tench",
    "springer",
    "cassette_player",
    "chain_saw",
    "church",
    "french_horn",
    "garbage_truck",
    "gas_pump",
    "golf_ball",
    "parachute",
)
WORDNET = ("n01440764", "n02102040")


def source(
    name: str = "mine",
    classes: tuple[str, ...] = ("cat", "dog"),
    files: tuple[str, ...] = ("1.jpg",),
    split: str | None = None,
) -> Source:
    examples = [Example(name=f"x/{file}", target=classes[0], split=split, read=bytes) for file in files]
    return Source(name=name, kind="image", examples=examples, classes=classes, fingerprint="")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (source(), ()),
        (source("imagenette5k"), ("imagenet-1k",)),
        (source("Imagenette2-160"), ("imagenet-1k",)),
        (source(classes=TEN), ("imagenet-1k",)),
        (source(classes=TEN[:9]), ()),
        (source(classes=tuple(name.upper().replace("_", " ") for name in TEN)), ("imagenet-1k",)),
        (source(classes=WORDNET), ("imagenet-1k",)),
        (source(classes=(*WORDNET, "other")), ()),
        (source("imagenet-sketch", classes=WORDNET), ()),
        (source("ImageNet_A", classes=WORDNET), ()),
        (source(files=("n03028079_1234.JPEG", "ILSVRC2012_val_00009346.JPEG")), ("imagenet-1k",)),
        (source(files=("n03028079_1234.JPEG", "a.jpg", "b.jpg")), ()),
        (
            source(classes=WORDNET, files=("ILSVRC2012_val_00009346.JPEG",), split="test"),
            (),
        ),  # nobody learns from these
        (source("cifar10"), ("80-million-tiny-images",)),
        (source("cifar-100-small"), ("80-million-tiny-images",)),
        (source("mnist_png"), ("nist-sd19", "qmnist")),
        (source("digits"), ()),
        (source(name="数据", classes=(), files=()), ()),
    ],
)
def test_what_a_users_own_data_is_a_part_of(data: Source, expected: tuple[str, ...]) -> None:
    assert find_part_of(data) == expected


@pytest.mark.parametrize(
    ("learned_from", "found"),
    [
        (["imagenet-1k"], ("imagenet-1k",)),
        (["ILSVRC/ImageNet_1k", "coco"], ("ILSVRC/ImageNet_1k",)),
        (["imagenet"], ("imagenet",)),
        (["timm/imagenet-12k-wds"], ("timm/imagenet-12k-wds",)),
        (["ImageNet21k"], ("ImageNet21k",)),
        (["imagenette"], None),  # the same splits: its test examples are new to the weights
        (["laion-2b", "lvd-142m"], None),
        ([], None),
    ],
)
def test_names_that_mean_the_same_set(learned_from: list[str], found: tuple[str, ...] | None) -> None:
    one = find_contamination(
        "imagenette", ["imagenet-1k"], {"title": "EfficientNet-Lite0", "learned_from": learned_from}
    )
    assert (one and one.part_of) == found
    assert find_contamination("imagenette", ["imagenet-1k"], None) is None
    if one is not None:
        assert "imagenette is a part of" in one.describe()
        assert "EfficientNet-Lite0" in one.describe()


@pytest.fixture(scope="module")
def contaminated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder `imagenette` that started from a run on other data, which had itself started from weights that
    learned ImageNet."""
    folder = tmp_path_factory.mktemp("overlap")
    options: dict[str, Any] = {"speedups": "none", "device": "cpu", "cache_dir": folder / "cache", "epochs": 0.5}
    suanli.train(make_pictures(folder / "pictures"), out=folder / "first", **options)
    card = json.loads((folder / "first" / "model" / "model.json").read_text())
    card["pretrained"] = {"name": "efficientnet_lite0", "title": "EfficientNet-Lite0", "learned_from": ["imagenet-1k"]}
    (folder / "first" / "model" / "model.json").write_text(json.dumps(card))
    suanli.run(make_pictures(folder / "imagenette"), weights=folder / "first", out=folder / "made", **options)
    return folder / "made"


def test_model_evaluation_report_and_card_say_so(contaminated: Path) -> None:
    card = json.loads((contaminated / "model" / "model.json").read_text())
    assert card["data"]["part_of"] == ["imagenet-1k"]
    assert card["pretrained"]["learned_from"][0] == "imagenet-1k"
    written = json.loads((contaminated / "evaluation" / "test.json").read_text())["contamination"]
    assert written["data"] == "imagenette"
    assert written["part_of"] == ["imagenet-1k"]
    lines = (contaminated / "ledger.jsonl").read_text().splitlines()
    assert all(json.loads(line)["contaminated"] for line in lines if "test_" in json.loads(line)["metric"])
    sentence = "Contaminated score: imagenette is a part of imagenet-1k"
    assert sentence in table(suanli.evaluate(contaminated))
    page = (contaminated / "report.html").read_text()
    assert sentence in page
    assert "Contaminated:" in page
    assert sentence in (contaminated / "README.md").read_text()


def test_lists_and_comparisons_say_so(contaminated: Path) -> None:
    (overview,) = suanli.runs(contaminated)
    assert overview.contaminated
    assert _score(read_overview(contaminated), True).endswith(", contaminated")
    remarks = suanli.compare(contaminated, contaminated).remarks
    assert any("Contaminated score" in remark for remark in remarks)


def test_other_data_is_judged_by_its_own_name(contaminated: Path) -> None:
    assert suanli.evaluate(contaminated, data=contaminated.parent / "pictures").contamination is None
