"""Saliency maps: they show what they should, for every network, and say where there are none."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import suanli
from shapes import SHAPE, write_shapes
from suanli.cli import main
from suanli.core import registry
from suanli.core.task import Task
from suanli.core.types import Recipe
from suanli.data.preprocess.image import ImagePreprocess
from suanli.data.preprocess.text import TextPreprocess
from suanli.engines.saliency import Saliency, explain
from suanli.models import build
from suanli.models.model_folder import SavedModel
from suanli.tasks.classification import Classification
from suanli.tasks.detection import Detection

IMAGES = ImagePreprocess(height=32, width=32, channels=3)
TEXTS = TextPreprocess(vocabulary=("good", "bad", "film"), length=6)
TASK = Classification(classes=("a", "b", "c"))
BOXES = Detection(classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int]]]:
    """A folder with the images `shapes` and a run on them, `made`, and where the shapes are."""
    folder = tmp_path_factory.mktemp("saliency")
    places = write_shapes(folder / "shapes")
    changes = {"optimizer": "adamw", "lr": 0.003, "augment": ()}
    options = {"speedups": "none", "out": folder / "made", "cache_dir": folder / "cache", "settings": changes}
    suanli.train(folder / "shapes", model="speednet", epochs=8, batch_size=16, **options)
    return folder, places


def test_the_heat_is_where_the_shape_is(trained: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    folder, places = trained
    answers = suanli.predict(folder / "made", [folder / "shapes" / name for name in places], explain=True)
    shares, hits, area = [], [], (SHAPE + 4) ** 2 / 32**2
    for answer, (top, left) in zip(answers, places.values(), strict=True):
        assert answer.saliency is not None
        weights = answer.saliency.weights
        assert weights.min() >= 0
        assert weights.max() == pytest.approx(1)
        inside = weights[max(0, top - 2) : top + SHAPE + 2, max(0, left - 2) : left + SHAPE + 2]
        shares.append(inside.sum() / weights.sum())
        hits.append(inside.max() == weights.max())
    assert answers[0].saliency is not None
    assert answers[0].saliency.method == "Grad-CAM"
    assert np.mean(shares) > 2 * area  # by chance it would be the area
    assert np.mean(hits) > 0.9


def test_files_report_and_json_have_them(
    trained: tuple[Path, dict[str, tuple[int, int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    inputs = [str(folder / "shapes" / "ring" / "000.png"), str(tmp_path / "bad.png")]
    Path(inputs[1]).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["predict", str(folder / "made"), *inputs, "--explain", "heat", "--json"])
    (good, bad) = json.loads(capsys.readouterr().out)["predictions"]
    assert good["saliency"] == {"method": "Grad-CAM"}
    assert "saliency" not in bad
    (file,) = Path("heat").iterdir()
    assert file.name == "0000-000.png"
    with Image.open(file) as image:
        assert image.size == (256, 256)
    with pytest.raises(suanli.UsageError, match="server gives no explanations"):
        suanli.predict(None, inputs, url="http://127.0.0.1:1", explain=True)


def test_mistakes_in_the_report_have_them(trained: tuple[Path, dict[str, tuple[int, int]]], tmp_path: Path) -> None:
    folder, _ = trained
    wrong = tmp_path / "wrong"  # every label is another one
    for name, other in (("cross", "ring"), ("ring", "cross")):
        (wrong / other).mkdir(parents=True)
        for path in sorted((folder / "shapes" / name).iterdir())[:5]:
            (wrong / other / path.name).write_bytes(path.read_bytes())
    evaluation = suanli.evaluate(folder / "made", data=wrong, augmented_views=False)
    assert evaluation.mistakes
    for one in evaluation.mistakes:
        assert one["saliency"]["method"] == "Grad-CAM"
        assert one["saliency"]["picture"] is not None


@pytest.mark.parametrize("name", [n for n, m in registry.load_all("models").items() if "table" not in m.kinds])
def test_every_network_can_be_explained(name: str) -> None:
    torch.manual_seed(0)
    is_image = "image" in registry.load("models", name).kinds
    preprocess = IMAGES if is_image else TEXTS
    recipe = Recipe(model=name)
    task = TASK if registry.load("models", name).returns == "scores" else BOXES
    (found,) = explain_one(build.build(recipe, preprocess, task), preprocess, task)
    assert found.weights.shape == ((32, 32) if is_image else (6,))
    assert np.isfinite(found.weights).all()
    assert np.abs(found.weights).max() == pytest.approx(1)
    assert found.marked.picture is not None or [word for word, _ in found.marked.words] == ["good", "<unk>", "film"]


def explain_one(module: nn.Module, preprocess: ImagePreprocess | TextPreprocess, task: Task = TASK) -> list[Saliency]:
    raw = (
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8) if preprocess is IMAGES else "good story film"
    )
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    saved = SavedModel(module=module.eval(), preprocess=preprocess, task=task, recipe=Recipe(), card={})
    return explain(saved, [preprocess.encode(raw).arrays])


class ChannelsLast(nn.Module):
    """As windowed transformers: maps (B, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(3, 5, 2, 2), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x).permute(0, 2, 3, 1)).amax((1, 2)))


class NoMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mul_(2).flatten(1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(9, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids)


class TwoLevels(nn.Module):
    """As a detector whose score comes from the finer of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, 4, 4)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = [self.head(self.fine(x)), self.head(self.coarse(x)) - 100]
        return x, torch.cat([level.flatten(2) for level in logits], 2).transpose(1, 2)


def test_the_score_of_one_level_rests_on_its_map() -> None:
    torch.manual_seed(0)
    (found,) = explain_one(TwoLevels(), IMAGES, BOXES)
    assert (found.method, found.weights.max()) == ("Grad-CAM", pytest.approx(1))


def test_modules_of_others() -> None:
    torch.manual_seed(0)
    (last,) = explain_one(ChannelsLast(), IMAGES)
    assert last.method == "Grad-CAM"
    assert last.weights.shape == (32, 32)
    (pixels,) = explain_one(NoMap(), IMAGES)
    assert pixels.method == "gradient times input"
    with pytest.raises(suanli.MachineError, match="no nn.Embedding that gives a vector for each token"):
        explain_one(Bag(), TEXTS)
    with pytest.raises(suanli.MachineError, match="can't be explained"):
        explain_one(nn.Linear(3, 3), TEXTS)


def test_words_speak_for_or_against() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(6, 3)
            self.words.weight.data = torch.tensor([[0.0] * 3, [0.0] * 3, [3, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.words(ids).sum(1)

    module = Sum()
    module.requires_grad_(False)
    saved = SavedModel(module=module, preprocess=TEXTS, task=TASK, recipe=Recipe(), card={})
    (found,) = explain(saved, [TEXTS.encode("bad good <b> film").arrays])
    assert dict(found.marked.words)["good"] == pytest.approx(1)
    assert dict(found.marked.words)["bad"] == pytest.approx(-1 / 3)
    suffix, content = found.marked.to_file()
    assert suffix == ".html"
    assert b"<b>" not in content
    assert "rgba(29,95,174" in io.TextIOWrapper(io.BytesIO(content), "utf-8").read()
