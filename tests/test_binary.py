"""Two classes: curves, the positive class, and the threshold that a goal chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

import suanli
from suanli.core.compare import intervals
from suanli.core.errors import UsageError
from suanli.core.schema import Geometry
from suanli.core.sections import Plot
from suanli.core.storage import read_json
from suanli.tasks._class_names import find_order, find_positive
from suanli.tasks._curves import choose_threshold, rank_scores
from suanli.tasks.classification import Classification

HERE = Geometry.unchanged((1,))
PAIR = ("abnormal", "normal")
drawn = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 3)), min_size=2
)
mixed = drawn.filter(lambda rows: {yes for _, yes, weight in rows if weight} == {True, False})


def task_of(classes: tuple[str, ...] = PAIR, share: float = 0.25, **settings: object) -> Classification:
    targets = (np.arange(400) >= 400 * share).astype(np.int64)
    return Classification.of(classes, settings).fit({"class": targets})


def probabilities_of(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Of the first class, which is the positive one of PAIR."""
    return {"probabilities": np.stack([scores, 1 - scores], axis=1).astype(np.float32)}


def draw_scores(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    positive = random.random(count) < 0.2
    return 1 / (1 + np.exp(2 - random.normal(2 * positive, 1))), positive


# --- curves ---------------------------------------------------------------------------------


@given(mixed)
def test_areas_agree_with_scikit_learn_with_ties_and_weights(rows: list[tuple[float, bool, int]]) -> None:
    scores, positive, weights = map(np.array, zip(*rows, strict=True))
    area, precision = rank_scores(scores, positive, np.stack([weights, 3 * weights]).astype(float))
    expected = metrics.roc_auc_score(positive, scores, sample_weight=weights)
    assert area == pytest.approx([expected, expected])
    assert precision[0] == pytest.approx(metrics.average_precision_score(positive, scores, sample_weight=weights))


def test_scores_of_two_classes_have_intervals_that_hold_them() -> None:
    scores, positive = draw_scores()
    task, targets = task_of(), {"class": (~positive).astype(np.int64)}
    records = task.records(probabilities_of(scores), targets)
    values, bounds = task.scores(records), intervals(task, records)
    assert values["auroc"] == pytest.approx(metrics.roc_auc_score(positive, scores.astype(np.float32)))
    assert values["sensitivity"] == pytest.approx((scores[positive] >= 0.5).mean())
    assert values["specificity"] == pytest.approx((scores[~positive] < 0.5).mean())
    for name in ("auroc", "average_precision", "sensitivity", "specificity"):
        low, high = bounds[name]
        assert low < values[name] < high
        assert high - low < 0.2


@pytest.mark.parametrize("only", [0, 1])
def test_what_one_class_alone_leaves_undefined_is_nan(only: int) -> None:
    task = task_of()
    records = task.records(probabilities_of(np.linspace(0.1, 0.9, 9)), {"class": np.full(9, only)})
    scores = task.scores(records)
    assert math.isnan(scores["auroc"])
    assert (math.isnan(scores["sensitivity"]), math.isnan(scores["specificity"])) == (only == 1, only == 0)
    assert intervals(task, records).keys() == scores.keys()
    assert task.evaluate(records)["curves"] is None


def test_the_report_draws_both_curves_and_the_point_where_the_model_decides() -> None:
    scores, positive = draw_scores()
    task = task_of(goal="sensitivity>=0.9")
    targets = {"class": (~positive).astype(np.int64)}
    task = task.calibrate(task.records(probabilities_of(scores), targets))
    figures = json.loads(json.dumps(task.evaluate(task.records(probabilities_of(scores), targets)), allow_nan=False))
    roc, recall = (one for one in task.sections(figures) if isinstance(one, Plot) and "curve." in one.note)
    for plot in (roc, recall):
        curve, point = plot.lines[1], plot.lines[2]
        assert len(curve.points) <= 200
        (at,) = point.points
        assert min(np.hypot(x - at[0], y - at[1]) for x, y in curve.points) < 0.01
    assert roc.lines[2].points[0][1] >= 0.9


# --- the threshold --------------------------------------------------------------------------


@given(mixed, st.sampled_from(["sensitivity>=0.9", "specificity>=0.8", "precision>=0.7", "f1", "balanced", "cost=5:1"]))
def test_no_other_threshold_serves_the_goal_better(rows: list[tuple[float, bool, int]], goal: str) -> None:
    scores, positive = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
    chosen = choose_threshold(scores, positive, goal)
    if positive.all() or not positive.any():
        assert chosen is None
        return

    def value(threshold: float) -> float:
        yes = scores >= threshold
        sensitivity, specificity = yes[positive].mean(), 1 - yes[~positive].mean()
        precision = positive[yes].mean() if yes.any() else 1.0
        if ">=" in goal:
            name, bound = goal.split(">=")
            kept = {"sensitivity": sensitivity, "specificity": specificity, "precision": precision}[name]
            return (specificity if name == "sensitivity" else sensitivity) if kept >= float(bound) else -1.0
        costs = -5 * (positive & ~yes).sum() - (~positive & yes).sum()
        f1 = 2 * (positive & yes).sum() / (positive.sum() + yes.sum())
        return {"f1": f1, "balanced": sensitivity + specificity, "cost=5:1": costs}[goal]

    assert value(chosen) == pytest.approx(max(value(threshold) for threshold in [*scores, 2.0]))


def test_every_answer_follows_the_threshold_and_states_its_probability() -> None:
    task = task_of(goal="threshold=0.2").calibrate({"score": np.zeros(1), "positive": np.ones(1, bool)})
    predictions = probabilities_of(np.array([0.3, 0.1]))
    targets = {"class": np.array([0, 0])}
    for i, (label, share) in enumerate([("abnormal", 0.3), ("normal", 0.9)]):
        one = task.answer({"probabilities": predictions["probabilities"][i]}, HERE, top=1)
        assert (one.values["label"], one.values["probability"]) == (label, pytest.approx(share))
        assert one.values["probabilities"] == {label: pytest.approx(share)}
    assert task.texts(predictions, [HERE, HERE])["label"] == ["abnormal", "normal"]
    assert task.records(predictions, targets)["predicted"].tolist() == [0, 1]
    assert task.scores(task.records(predictions, targets))["sensitivity"] == 0.5
    other = probabilities_of(np.array([0.1, 0.15]))
    assert task.agreement(predictions, other).tolist() == [False, True]
    assert "0.2" in " ".join(task.describe())
    assert Classification.of(task.classes, json.loads(json.dumps(task.settings))) == task


def test_without_a_goal_the_likelier_class_is_the_answer() -> None:
    task = task_of()
    assert not task.needs_calibration
    assert task.threshold is None
    assert task.answer({"probabilities": np.array([0.49, 0.51])}, HERE, top=2).values["label"] == "normal"


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (PAIR, {"goal": "sensitivity>=2"}, "goal is"),
        (PAIR, {"goal": "recall"}, "goal is"),
        (PAIR, {"positive_class": "abnrmal"}, "abnormal"),
        (("a", "b", "c"), {"goal": "f1"}, "for two classes, and there are 3"),
    ],
)
def test_goals_that_mean_nothing_are_refused(classes: tuple[str, ...], settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Classification.of(classes, settings)


def test_names_that_json_reads_as_numbers_are_names() -> None:
    assert Classification.of(("0", "1"), {"positive_class": 0}).positive_class == "0"
    assert Classification.of(("false", "true"), {"positive_class": True}).positive_class == "true"


def test_a_threshold_that_no_answer_misses_says_so() -> None:
    positive = np.arange(9) < 5
    always = task_of(goal="sensitivity>=0.95").calibrate({"score": np.zeros(9), "positive": positive})
    assert always.threshold == 0
    assert "always predicted" in always.describe()[1]
    sometimes = task_of(goal="threshold=0.2").calibrate({"score": np.zeros(9), "positive": positive})
    assert "its probability is at least 0.2," in sometimes.describe()[1]


def test_the_threshold_is_saved_with_the_model_and_decides_every_answer(text_table: Path, tmp_path: Path) -> None:
    settings = {"epochs": 0.2, "goal": "threshold=0.01", "positive_class": "good"}
    run = suanli.train(text_table, settings=settings, speedups="none", threads=1, out=tmp_path / "run")
    assert read_json(run.model_path / "model.json")["task_settings"]["threshold"] == 0.01
    evaluation = suanli.evaluate(run)
    assert (evaluation.scores["sensitivity"], evaluation.scores["specificity"]) == (1, 0)
    (tmp_path / "one.txt").write_text("an awful film")
    (one,) = suanli.predict(run, tmp_path / "one.txt")
    assert one.values["label"] == "good"
    assert one.values["probability"] == one.values["probabilities"]["good"] < 1


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (("negative", "positive"), "positive"),
        (("Abnormal", "Normal"), "Abnormal"),
        (("0", "1"), "1"),
        (("no_tumor", "tumor"), "tumor"),
        (("PNEUMONIA", "non-pneumonia"), "PNEUMONIA"),
        (("ham", "spam"), "spam"),
        (("cat", "dog"), "cat"),  # the rarer one
    ],
)
def test_the_positive_class_is_found_by_name_or_is_the_rarer_one(classes: tuple[str, str], positive: str) -> None:
    assert find_positive(classes, (0.3, 0.7)) == positive
    assert task_of(classes, positive_class=classes[0]).positive_class == classes[0]


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (("high", "low", "medium"), (2, 0, 1)),
        (("1", "2", "3", "4", "5"), (0, 1, 2, 3, 4)),
        (("0-9", "10-19", "20+"), (0, 1, 2)),
        (("30 to 59", "60+", "under 30"), (1, 2, 0)),
        (tuple("0123456789"), None),
        (("cat", "dog", "eel"), None),
        (("101", "205", "333"), None),
        (("high", "low"), None),
    ],
)
def test_an_order_is_found_in_the_names(classes: tuple[str, ...], order: tuple[int, ...] | None) -> None:
    assert find_order(classes) == order


def test_ordered_classes_are_learned_as_classes_with_a_remark_and_an_error_in_ranks() -> None:
    task = Classification.of(("high", "low", "medium"), {})
    counts = task.count_targets({"train": ["high", "low", "medium"] * 5, "val": [], "test": ["low", "high", "medium"]})
    assert any("low < medium < high" in line and "task=regression" in line for line in task.describe_counts(counts))
    answers = {"probabilities": np.eye(3, dtype=np.float32)[[1, 1, 2]]}
    scores = task.scores(task.records(answers, {"class": np.array([0, 1, 2])}))
    assert scores["mean_rank_error"] == pytest.approx(2 / 3)
    assert task.unit_of("mean_rank_error") == "ranks"
