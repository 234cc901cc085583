"""Intervals of scores, and the gate."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suanli.core import compare
from suanli.core.compare import difference, intervals, share_difference
from suanli.core.task import Metric, Records
from suanli.core.types import Difference
from suanli.tasks.classification import Classification

TASK = Classification()


def records_of(probabilities: np.ndarray, targets: np.ndarray) -> Records:
    return TASK.records({"probabilities": probabilities}, {"class": targets})


answers = st.integers(1, 200).flatmap(
    lambda n: st.tuples(*(st.lists(st.booleans(), min_size=n, max_size=n).map(np.array) for _ in range(2)))
)


@given(answers)
def test_an_interval_holds_what_was_measured(pair: tuple[np.ndarray, np.ndarray]) -> None:
    before, after = pair
    change = share_difference(before, after)
    assert change.median == pytest.approx(after.mean() - before.mean())
    assert -1 <= change.low <= change.median <= change.high <= 1
    assert change.low < change.high
    back = share_difference(after, before)
    assert (back.low, back.high) == pytest.approx((-change.high, -change.low))


@given(answers, st.integers(2, 5))
def test_more_examples_of_the_same_kind_narrow_it(pair: tuple[np.ndarray, np.ndarray], times: int) -> None:
    few, many = share_difference(*pair), share_difference(*(np.tile(side, times) for side in pair))
    assert many.high - many.low < few.high - few.low
    assert many.median == pytest.approx(few.median)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    cells = np.array([0.80, 0.06, 0.03, 0.11])  # both right, lost, won, both wrong
    truth, inside, repeats = 0.03 - 0.06, 0, 600
    for _ in range(repeats):
        drawn = random.choice(4, 150, p=cells)
        change = share_difference(drawn < 2, (drawn == 0) | (drawn == 2))
        inside += change.low <= truth <= change.high
    assert 0.93 <= inside / repeats <= 0.985


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_refused_only_beyond_the_interval(median: float, half: float, tolerance: float) -> None:
    change = Difference(median=median, low=median - half, high=median + half)
    assert change.exceeds(tolerance) == (median + half < -tolerance)
    assert not (change.exceeds(tolerance) and median >= -tolerance)
    assert change.resolves(tolerance) == ((change.high - change.low) / 2 <= tolerance)


def test_few_examples_refuse_nothing_that_looks_bad_by_chance() -> None:
    """Two lost of ten are no proof; 200 of 1,000 are."""
    before = np.ones(10, bool)
    after = np.arange(10) >= 2
    assert not share_difference(before, after).exceeds(0.005)
    assert share_difference(np.tile(before, 100), np.tile(after, 100)).exceeds(0.005)


class Balanced(Classification):
    metric = Metric(name="balanced_accuracy", tolerance=0.005)


def sure(right: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[np.where(right, targets, (targets + 1) % classes)]


def test_another_metric_is_compared_in_pairs_too() -> None:
    random = np.random.default_rng(0)
    targets = np.arange(300) % 3  # equally many of each: balanced accuracy is accuracy
    before = sure(random.random(300) < 0.9, targets, 3)
    after = sure((before.argmax(1) == targets) & (random.random(300) < 0.9), targets, 3)
    sides = tuple(records_of(answers, targets) for answers in (before, after))
    change, plain = (difference(task, *sides) for task in (Balanced(), TASK))
    assert change.median == pytest.approx(plain.median)
    assert change == difference(Balanced(), *sides)  # the seed is fixed
    assert change.low == pytest.approx(plain.low, abs=0.02)
    assert change.high == pytest.approx(plain.high, abs=0.02)
    assert change.exceeds(0.005)
    same = difference(Balanced(), sides[0], sides[0])
    assert (same.median, same.low, same.high) == (0, 0, 0)


def test_different_examples_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="not the same examples"):
        share_difference(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError, match="not the same examples"):
        share_difference(np.ones(0, bool), np.ones(0, bool))
    few, many = (records_of(np.eye(3), np.arange(3)), records_of(np.eye(4), np.arange(4)))
    with pytest.raises(ValueError, match="not the same examples: 3 and 4"):
        difference(Balanced(), few, many)


def test_equal_models_pass_whatever_the_metric() -> None:
    records = simulate(200, np.random.default_rng(0))
    for task in (TASK, Balanced()):
        for groups in (None, np.arange(200) // 5):
            change = difference(task, records, records, groups)
            assert change.median == 0
            assert not change.exceeds(0)


def test_a_loss_is_refused_only_where_enough_independent_examples_show_it() -> None:
    """50 inputs, ten copies each, count as 50."""
    targets = np.repeat(np.arange(50) % 5, 10)
    before = sure(np.ones(500, bool), targets, 5)
    after = sure(np.arange(500) // 10 >= 2, targets, 5)  # 4 % worse
    sides = [records_of(answers, targets) for answers in (before, after)]
    assert difference(TASK, *sides).exceeds(0.005)
    assert not difference(TASK, *sides, groups=np.arange(500) // 10).exceeds(0.005)


# --- intervals ------------------------------------------------------------------------------


def simulate(count: int, random: np.random.Generator, each: int = 1) -> Records:
    """Answers of a model that is too sure of itself, in groups of `each`, whose examples are about equally hard."""
    shape = (count // each, 8)
    targets = np.repeat(random.choice(8, shape[0], p=[0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]), each)
    common = np.repeat(random.normal(size=shape), each, axis=0)
    own = random.normal(size=(count, 8)) if each > 1 else common
    odds = np.exp(3 * (np.sqrt(0.7) * common + np.sqrt(0.3) * own + np.eye(8)[targets]))
    return records_of(odds / odds.sum(1, keepdims=True), targets)


Find = Callable[[Records], dict[str, tuple[float, float]]]


@cache
def true_scores(each: int) -> dict[str, float]:
    return TASK.scores(simulate(600_000, np.random.default_rng(8), each))


def coverage(find: Find, repeats: int, count: int, each: int = 1) -> dict[str, float]:
    """How often the interval of each score contains the score of very many examples."""
    random = np.random.default_rng(7)
    truth = true_scores(each)
    inside = dict.fromkeys(truth, 0)
    for _ in range(repeats):
        for name, (low, high) in find(simulate(count, random, each)).items():
            inside[name] += low <= truth[name] <= high
    return {name: times / repeats for name, times in inside.items()}


def check_coverage(shares: dict[str, float], repeats: int) -> None:
    """94 to 96 %, and two standard errors of the simulation: 93 to 97 % for the long ones."""
    error = np.sqrt(0.05 * 0.95 / repeats)
    assert shares.keys() == TASK.scores(simulate(10, np.random.default_rng(0))).keys()
    assert all(0.94 - 2 * error <= share <= 0.96 + 2 * error for share in shares.values()), shares


@pytest.mark.parametrize("repeats", [100, pytest.param(3000, marks=pytest.mark.long)])
def test_intervals_cover_the_truth_as_often_as_they_say(repeats: int) -> None:
    check_coverage(coverage(lambda records: intervals(TASK, records), repeats, count=800), repeats)


@pytest.mark.parametrize("repeats", [100, pytest.param(1500, marks=pytest.mark.long)])
def test_examples_of_a_group_do_not_count_as_independent(repeats: int) -> None:
    groups = np.arange(2400) // 12
    check_coverage(coverage(lambda records: intervals(TASK, records, groups), repeats, count=2400, each=12), repeats)
    alone = coverage(lambda records: intervals(TASK, records), repeats // 4, count=2400, each=12)
    assert max(alone.values()) < 0.8, alone


def test_a_calibrated_model_may_have_no_calibration_error() -> None:
    """What is measured is noise: plain percentiles of resamples would never reach 0."""
    random, zeros = np.random.default_rng(0), 0
    for _ in range(20):
        odds = random.dirichlet(np.ones(4), 300)
        targets = (odds.cumsum(1) < random.random((300, 1))).sum(1)
        zeros += intervals(TASK, records_of(odds, targets))["calibration_error"][0] == 0
    assert zeros >= 19


def test_a_resample_without_an_example_of_a_class_is_no_harm() -> None:
    targets = np.array([0] * 30 + [1])
    records = records_of(sure(np.arange(31) % 5 > 0, targets, 2), targets)
    for name, (low, high) in intervals(TASK, records).items():
        assert np.isfinite([low, high]).all(), name
        assert low < high
    assert intervals(TASK, records_of(np.eye(2)[:1], np.array([0])))["macro_f1"] == (1, 1)


def test_the_names_of_groups_and_the_size_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    records = simulate(60, np.random.default_rng(0))
    expected = intervals(TASK, records, np.arange(60) // 4)
    monkeypatch.setattr(compare, "ROWS", 7)
    assert intervals(TASK, records, 100 + 10 * (np.arange(60) // 4)) == expected
