"""Budgets: the network and the number of epochs for a target score, or for the time there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import suanli
from suanli.cli import main
from suanli.core.registry import load, load_all
from suanli.core.settings import parse_duration
from suanli.training import budget
from suanli.training.recipe import change
from suanli.training.recipes import small_images_grey_few
from suanli.training.recipes._images import SMALL

Folder = Callable[..., Path]


def test_the_cheapest_budget_that_reached_the_score_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, calls = budget.choose_for_score, []
    monkeypatch.setattr(budget, "choose_for_score", lambda *arguments: calls.append(arguments) or choose(*arguments))
    cheap = suanli.train("digits", target_accuracy=0.9, speedups="none")
    assert cheap.recipe.epochs == 3
    assert "budget: 3 epochs; it reached 98.2% on digits before" in capsys.readouterr().err
    assert cheap.summary["wanted_score"] == 0.9
    assert suanli.evaluate(cheap, augmented_views=False).scores["accuracy"] >= 0.9
    ((recipe, prepared, _),) = calls
    assert choose(recipe, prepared, 0.99).epochs == 8
    with pytest.raises(suanli.UsageError, match="time_budget can't be changed"):
        suanli.train(cheap.path, time_budget="5m", more_epochs=1)


def test_a_missed_score_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    slow = load("recipes", "small_images_grey_few").recipe.model_copy(update={"lr": 1e-4})
    run = suanli.train("digits", recipe=slow, target_accuracy=0.9, seed=1, speedups="none")
    assert "worse than the 90.00% that was asked for" in capsys.readouterr().err
    assert run.summary["status"] == "finished"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (0.9999, "Nothing that was measured on digits reaches 100.0%; the best is 99.2%"),
        (0.0, "can't be 0.0"),
        (1.0, "can't be 1.0"),
        (90, "can't be 90"),
        (float("nan"), "can't be nan"),
    ],
)
def test_scores_that_no_budget_reaches_are_refused(wanted: float, says: str) -> None:
    with pytest.raises(suanli.UsageError, match=says):
        suanli.train("digits", target_accuracy=wanted)
    assert not Path("runs").exists()


def test_nothing_is_promised_about_other_data(picture_folder: Folder) -> None:
    with pytest.raises(suanli.UsageError, match="was not measured; it is known for cifar10, digits") as caught:
        suanli.train(picture_folder("cifar10"), target_accuracy=0.7)  # the name alone isn't the data
    assert "--time-budget" in caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target-accuracy", "0.9", "--time-budget", "5m"], "both choose"),
        (["--target-accuracy", "0.9", "--epochs", "3"], "takes a recipe as it was measured, so epochs can't"),
        (["--target-accuracy", "0.9", "--set", "augment=[]"], "so augment can't be changed"),
        (["--time-budget", "9s", "--epochs", "3"], "chooses epochs itself"),
        (["--time-budget", "soon"], "is not a time"),
        (["--time-budget", "0s"], "is not a time"),
        (["--time-budget", "-3"], "is not a time"),
        (["--target-accuracy", "most"], "valid number"),
    ],
)
def test_contradicting_options_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "digits", *arguments])
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_time_budget_decides_how_long_a_real_training_is() -> None:
    run = suanli.train("digits", time_budget="6s", speedups="none", threads=1)
    assert run.summary["status"] == "finished"
    assert run.summary["epochs"] == pytest.approx(run.recipe.epochs, abs=0.1)
    assert run.recipe.epochs != small_images_grey_few.RECIPE.recipe.epochs


def test_too_little_time_is_refused_and_plenty_not_used_up(picture_folder: Folder) -> None:
    root = picture_folder(each=20)
    with pytest.raises(suanli.UsageError, match="it leaves 0.0 s for training.* Give a longer --time-budget"):
        suanli.train(root, time_budget=0.01, speedups="none", threads=1)
    assert not Path("runs").exists()
    long = suanli.train(root, time_budget="1000h", settings={"preprocess.size": 8}, speedups="none", threads=1)
    assert long.recipe.epochs == budget.LONGEST * 30  # the recipe's own, thrice


class _FakeEstimate:
    """A network and a machine whose speed the test decides: training takes epochs times width, in seconds."""

    def __init__(self, recipe: Any, changes: Any, *_: object) -> None:
        self.changes, self.recipe = changes, change(recipe, changes)
        self.seconds = self.recipe.epochs * self.recipe.model_args["widths"][0]
        self.flops = self.seconds * 1e9
        self.flops_per_s = 1e9
        self.least_s = 0.0
        self.fits_memory = self.recipe.model_args["widths"][0] < 1000


@pytest.mark.parametrize(
    ("left_s", "widths", "epochs"),
    [
        (90.0, [10], 7.5),  # not enough for the wide one: the narrow one for longer
        (500.0, [100], 4.2),  # enough, and a bit longer
        (50.0, [10], 4.0),
        (4.0, [10], 0.09),
        (1e9, [100], 12.0),  # three times the most expensive
    ],
)
def test_the_largest_network_that_has_time_for_its_own_epochs(
    monkeypatch: pytest.MonkeyPatch, left_s: float, widths: list[int], epochs: float
) -> None:
    """The choice alone, by networks whose time is known beforehand."""
    budgets = tuple(
        SimpleNamespace(changes={"epochs": e, "model_args": {"widths": [w]}}) for e, w in ((2.0, 10), (4.0, 100))
    )
    monkeypatch.setattr(budget, "_budgets", lambda _: budgets)
    monkeypatch.setattr(budget, "_Estimate", _FakeEstimate)
    chosen = budget.choose_for_time(SMALL, None, None, None, left_s)  # type: ignore[arg-type]
    assert chosen.model_args["widths"] == widths
    assert chosen.epochs == pytest.approx(epochs, abs=0.1)


def test_a_budget_that_does_not_fit_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = tuple(SimpleNamespace(changes={"epochs": 2.0, "model_args": {"widths": [w]}}) for w in (10, 100, 1000))
    monkeypatch.setattr(budget, "_budgets", lambda _: budgets)
    monkeypatch.setattr(budget, "_Estimate", _FakeEstimate)
    chosen = budget.choose_for_time(SMALL, None, None, None, 1e9)  # type: ignore[arg-type]
    assert chosen.model_args["widths"] == [100]


def test_every_shipped_budget_is_a_recipe_and_more_expensive_ones_reach_more() -> None:
    for choice in load_all("recipes").values():
        scores = []
        for one in choice.budgets:
            changed = change(choice.recipe, one.changes)
            assert changed.epochs == one.changes["epochs"]
            scores += [measured.score for measured in one.scores]
        assert scores == sorted(scores)


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), (" 5m ", 300), ("1.5h", 5400), (12.5, 12.5), (".5m", 30)]
)
def test_times_as_people_write_them(text: str | float, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "1e3", "-5", "nan", "inf", "0", "0.0h", "5m30s", float("nan")])
def test_what_is_no_time(text: str | float) -> None:
    with pytest.raises(suanli.UsageError, match="is not a time"):
        parse_duration(text)
