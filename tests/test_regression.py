import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

import suanli
from suanli.core import compare
from suanli.core.errors import BadInput, DataError, Diverged, UsageError
from suanli.core.schema import Geometry
from suanli.core.storage import read_json
from suanli.core.task import Records
from suanli.core.types import Difference
from suanli.tasks.regression import Regression

LONG = pytest.mark.long
TASK = Regression()
HERE = Geometry.unchanged((1,))
SKLEARN = {
    "mean_absolute_error": metrics.mean_absolute_error,
    "median_absolute_error": metrics.median_absolute_error,
    "root_mean_squared_error": metrics.root_mean_squared_error,
    "r2": metrics.r2_score,
}

numbers = st.floats(-1e6, 1e6, width=32)
answers = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40)


def records_of(target: object, predicted: object) -> Records:
    return TASK.records({"value": np.asarray(predicted)}, {"value": np.asarray(target)})


# --- scores ---------------------------------------------------------------------------------


@given(answers)
def test_scores_agree_with_scikit_learn(pairs: list[tuple[float, float]]) -> None:
    target, predicted = zip(*pairs, strict=True)
    scores = TASK.scores(records_of(target, predicted))
    assert scores.keys() == SKLEARN.keys()
    for name, score in SKLEARN.items():
        assert scores[name] == pytest.approx(score(target, predicted), rel=1e-9, abs=1e-9), name


@given(answers.flatmap(lambda pairs: st.tuples(st.just(pairs), st.lists(st.integers(0, 4), min_size=len(pairs)))))
def test_a_weight_is_that_many_examples(drawn: tuple[list[tuple[float, float]], list[int]]) -> None:
    pairs, weights = drawn
    weights = weights[: len(pairs)]
    if sum(weights) < 2:
        weights = [2] * len(pairs)
    target, predicted = np.array(pairs).repeat(weights, axis=0).T
    scores = TASK.scores(records_of(*np.array(pairs).T), np.array(weights))
    for name, score in SKLEARN.items():
        assert scores[name] == pytest.approx(score(target, predicted), rel=1e-9, abs=1e-9), name


def test_targets_without_weight_cost_no_digits_of_r2() -> None:
    target, predicted, weights = np.array([1.0, 1 + 1e-5, 1e6]), np.array([1 + 1e-5, 1.0, 0.0]), np.array([1, 1, 0])
    assert TASK.scores(records_of(target, predicted), weights)["r2"] == pytest.approx(-3, rel=1e-9)


@pytest.mark.parametrize(("predicted", "r2"), [([0.1, 0.1, 0.1], 1), ([0.1, 0.1, 0.2], 0)])
def test_r2_without_variance(predicted: list[float], r2: float) -> None:
    assert TASK.scores(records_of([0.1] * 3, predicted))["r2"] == r2
    far = records_of([*[0.1] * 3, 1e6], [*predicted, 5])
    assert TASK.scores(far, np.array([1, 1, 1, 0]))["r2"] == r2


def test_broken_answers_and_empty_splits_are_refused() -> None:
    with pytest.raises(Diverged, match="not finite"):
        records_of([1, 2], [1, math.nan])
    with pytest.raises(DataError, match="no examples"):
        records_of([], [])


def test_a_smaller_error_is_a_gain() -> None:
    random = np.random.default_rng(0)
    target, noise = random.normal(size=(2, 500))
    worse, better = (records_of(target, target + size * noise) for size in (1.0, 0.9))
    change, back = compare.difference(TASK, worse, better), compare.difference(TASK, better, worse)
    assert 0 < change.low < change.median == pytest.approx(0.08, abs=0.01)
    assert not change.exceeds(0)
    assert back.exceeds(TASK.metric.allowed_loss(0.8))  # 1 % of it
    assert not back.exceeds(TASK.metric.allowed_loss(0.8, tolerance=0.2))


def test_scores_are_written_without_exponents() -> None:
    metric = TASK.metric
    assert [metric.format(score) for score in (27_043.4, 999.96, 3.14159, 0.0012345)] == [
        *("27,043", "1000", "3.142", "0.001234")
    ]
    change = Difference(median=-12_345.6, low=-13_000, high=-0.5)
    assert metric.describe(change) == "mean_absolute_error +12,346 (+0.5 to +13,000)"


def simulate(count: int, random: np.random.Generator, heavy: bool = False) -> Records:
    """Skewed targets and normal errors, or errors with heavy tails that grow with the target."""
    target = random.gamma(2, size=count)
    error = 0.2 * target * random.standard_t(6, size=count) if heavy else 0.5 * random.normal(size=count)
    return records_of(target, 0.3 + 0.8 * target + error)


@pytest.mark.parametrize(("repeats", "heavy"), [(200, False), (100, True), pytest.param(3000, False, marks=LONG)])
def test_intervals_cover_the_truth_as_often_as_they_say(repeats: int, heavy: bool) -> None:
    """94 to 96 %, and two standard errors of the simulation: 93 to 97 % for the long one. Where a few errors make up
    most of the squared ones, those of the squared errors cover less, as any percentiles of resamples do: 91 %."""
    random = np.random.default_rng(7)
    truth = TASK.scores(simulate(1_000_000, random, heavy))
    inside = dict.fromkeys(truth, 0)
    for _ in range(repeats):
        for name, (low, high) in compare.intervals(TASK, simulate(1500, random, heavy)).items():
            inside[name] += low <= truth[name] <= high
    slack, lowest = 2 * np.sqrt(0.05 * 0.95 / repeats), 0.91 if heavy else 0.94
    assert all(lowest - slack <= times / repeats <= 0.96 + slack for times in inside.values()), inside


# --- targets --------------------------------------------------------------------------------


@given(st.lists(numbers, min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1))
def test_every_target_is_counted_once_in_about_ten_ranges(values: list[float]) -> None:
    counts = TASK.count_targets({"train": values, "val": values[:1], "test": []})
    assert counts["train"].keys() == counts["val"].keys() == counts["test"].keys()
    assert [sum(split.values()) for split in counts.values()] == [len(values), 1, 0]
    assert len(counts["train"]) == len(set(values)) if len(set(values)) <= 10 else 6 <= len(counts["train"]) <= 16
    TASK.refuse_unlearnable(counts)


def test_ranges_have_round_ends() -> None:
    counts = TASK.count_targets({"train": [12789.0, 755000.0, *range(200_000, 200_010)], "test": [100_001]})
    assert list(counts["train"])[:2] == ["0 to 50000", "50000 to 100000"]
    assert list(counts["train"])[-1] == "750000 to 800000"
    assert counts["test"]["100000 to 150000"] == 1
    assert TASK.describe_counts(counts) == ["ranges of targets without training examples: 100000 to 150000"]
    many = TASK.count_targets({"train": [1e9 + 64 * i for i in range(11)]})["train"]
    assert next(iter(many)) == "1000000000 to 1000000050"


def test_a_few_values_are_counted_by_themselves() -> None:
    counts = TASK.count_targets({"train": [1, 2, 2, 4.5], "test": [3, 4.5]})
    assert counts == {"train": {"1": 1, "2": 2, "3": 0, "4.5": 1}, "test": {"1": 0, "2": 0, "3": 1, "4.5": 1}}


@pytest.mark.parametrize("targets", [[], [2.5, 2.5, 2.5], [math.nan], [1, 1 + 1e-12]])
def test_targets_that_are_all_equal_can_not_be_learned(targets: list[float]) -> None:
    counts = TASK.count_targets({"train": targets, "val": [], "test": []})
    with pytest.raises(DataError, match="nothing to learn|No example has"):
        TASK.refuse_unlearnable(counts)


def test_training_targets_may_be_equal_where_others_are_not() -> None:
    task = TASK.fit({"value": np.full(9, 0.1, np.float32)})
    assert task.spread == 1
    assert TASK.fit({"value": np.zeros(0, np.float32)}) == TASK


@pytest.mark.parametrize("target", [math.nan, math.inf, -1e39, 1e400, "12", None])
def test_targets_that_are_no_numbers_are_bad_inputs(target: object) -> None:
    with pytest.raises(BadInput, match="is not a finite number"):
        TASK.encode(target, HERE)


def test_a_target_is_kept_as_it_is() -> None:
    for target in (3, -2.5, np.float64(1e30)):
        encoded = TASK.encode(target, HERE)["value"]
        assert encoded.dtype == np.float32
        assert encoded == np.float32(target)


# --- learning -------------------------------------------------------------------------------


def fit(values: np.ndarray, **settings: object) -> Regression:
    return Regression.of((), settings).fit({"value": values})


def test_fit_learns_mean_and_spread_and_is_saved() -> None:
    values = np.random.default_rng(0).normal(50, 7, 1000).astype(np.float32)
    task = fit(values)
    assert (task.mean, task.spread) == pytest.approx((values.mean(), values.std()), rel=1e-5)
    assert Regression.of((), json.loads(json.dumps(task.settings))) == task


@pytest.mark.parametrize(("name", "reference"), [("mse", 1.0), ("mae", 1.0), ("huber", 0.5)])
def test_the_loss_does_not_depend_on_the_unit(name: str, reference: float) -> None:
    values = np.random.default_rng(0).normal(size=200).astype(np.float32)
    outputs = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double()
    losses = []
    for scale, shift in ((1, 0), (1000, 5000)):
        task = fit(values * scale + shift, loss_function=name)
        losses.append(task.loss(outputs, {"value": torch.from_numpy(values * scale + shift)})[name])
        assert task.guessing_loss() == pytest.approx(reference, rel=1e-5)
        mean = float(task.loss(torch.zeros(200, 1), {"value": torch.from_numpy(values * scale + shift)})[name]) / 200
        assert mean <= reference * (1 + 1e-5)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_losses_of_hand_made_outputs() -> None:
    outputs, targets = torch.tensor([[0.5], [3.0]]), {"value": torch.zeros(2)}
    for settings, expected in (
        ({"loss_function": "mse"}, 9.25),
        ({"loss_function": "mae"}, 3.5),
        ({"loss_function": "huber"}, 0.125 + 2.5),
        ({"loss_function": "huber", "delta": 2}, 0.125 + 4),
    ):
        (loss,) = Regression.of((), settings).loss(outputs, targets).values()
        assert loss.item() == pytest.approx(expected)


def test_half_precision_outputs_are_computed_in_float32() -> None:
    outputs = torch.randn(8, 1).bfloat16()
    (loss,) = TASK.loss(outputs, {"value": torch.zeros(8)}).values()
    assert loss.dtype == torch.float32
    assert TASK.predict(outputs)["value"].dtype == torch.float32


def test_answers_are_in_the_unit_of_the_user() -> None:
    task = fit(np.array([100_000, 300_000], np.float32))
    prediction = task.predict(torch.tensor([[0.0], [-1.0]]))
    assert prediction["value"].tolist() == [200_000, 100_000]
    answer = task.answer({"value": prediction["value"].numpy()[0]}, HERE, top=5)
    assert (answer.kind, answer.text, answer.values) == ("value", "200000", {"value": 200_000.0})
    assert task.drift({"value": np.array([1e5, 1e5])}, {"value": np.array([1e5, 2e5])}).tolist() == [0, 1]


@pytest.mark.parametrize(("spread", "text"), [(80_000, "1235"), (1, "1234.568"), (0.002, "1234.56789")])
def test_the_text_of_an_answer_is_as_exact_as_the_spread_needs(spread: float, text: str) -> None:
    task = Regression(spread=spread)
    assert task.answer({"value": np.float64(1234.56789)}, HERE, top=1).text == text
    assert task.describe_target({"value": np.float64(1234.56789)}, HERE).text == text


@pytest.mark.parametrize("settings", [{"loss_function": "cube"}, {"delta": 0}, {"colour": 1}])
def test_impossible_settings_are_usage_errors(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="regression"):
        Regression.of((), settings)


# --- evaluate -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_figures_count_every_example_and_are_json(count: int) -> None:
    records = simulate(count, np.random.default_rng(0))
    figures = TASK.evaluate(records)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert sum(one["count"] for one in figures["ranges"]) == sum(one["count"] for one in figures["errors"]) == count
    assert len(figures["points"]) == min(count, 400)
    total = sum(one["count"] * one["mean_absolute_error"] for one in figures["ranges"] if one["count"])
    assert total / count == pytest.approx(TASK.scores(records)["mean_absolute_error"])
    net = sum(one["count"] * one["mean_error"] for one in figures["ranges"] if one["count"])
    assert net / count == pytest.approx(np.mean(records["predicted"] - records["target"]))
    assert [one.title for one in TASK.sections(figures)] == [
        "Predicted against true",
        "Errors by true value",
        "Distribution of errors",
    ]


def test_sections_need_no_figures() -> None:
    assert TASK.sections({}) == []


# --- real data ------------------------------------------------------------------------------


def test_the_weather_is_learned_from_the_date(shared_data: Path, tmp_path: Path) -> None:
    """A setting of the task needs no name of the task, where the data decides it."""
    run = suanli.train(
        shared_data / "tables" / "seattle_weather.csv",
        input_column="date",
        label_column="temp_max",
        settings={"delta": 2.0},
        speedups="none",
        threads=1,
        out=tmp_path / "run",
    )
    evaluation = suanli.evaluate(run)
    assert evaluation.scores["r2"] > 0.5
    (prediction,) = suanli.predict(run, write(tmp_path / "day.txt", "2014/07/30"))
    assert prediction.values["value"] > 20
    assert Regression.of((), read_json(run.model_path / "model.json")["task_settings"]).delta == 2


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_importing_the_task_loads_neither_torch_layers_nor_scikit_learn() -> None:
    code = "import sys, suanli.tasks.regression; print('sklearn' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
