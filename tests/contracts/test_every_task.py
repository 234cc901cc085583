"""What holds for every file of tasks/."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suanli.core import registry
from suanli.core.compare import difference, intervals
from suanli.core.errors import DataError
from suanli.core.types import Records, Task

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(params=registry.names("tasks"))
def task(request) -> Task:
    task = registry.load("tasks", request.param)()
    assert task.name == request.param
    return task


@pytest.fixture
def answers(task: Task) -> tuple[np.ndarray, np.ndarray]:
    logits = torch.randn(60, len(CLASSES), generator=torch.Generator().manual_seed(0))
    return task.probabilities(logits).numpy(), np.arange(60) % len(CLASSES)


@pytest.fixture
def records(task: Task, answers: tuple[np.ndarray, np.ndarray]) -> Records:
    return task.records(*answers)


def select(records: Records, which: np.ndarray) -> Records:
    return {name: column[which] for name, column in records.items()}


def test_the_gate_has_a_tolerance_and_a_metric_among_the_scores(task, records):
    assert isinstance(task, Task)
    assert 0 <= task.tolerance < 0.1
    scores = task.scores(records)
    assert task.metric in scores
    assert task.distances <= scores.keys()
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())


def test_better_answers_have_a_higher_metric(task):
    targets = np.arange(21) % len(CLASSES)
    right = np.eye(len(CLASSES), dtype=np.float32)[targets]
    wrong = np.roll(right, 1, axis=1)
    better, worse = (task.scores(task.records(answers, targets))[task.metric] for answers in (right, wrong))
    assert better > worse


def test_probabilities_are_float32_and_sum_to_one(task):
    probabilities = task.probabilities(torch.randn(5, 3).bfloat16() * 20)
    assert probabilities.dtype == torch.float32
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 2, 4)])
def test_going_down_the_loss_makes_it_smaller(task, shares, weights):
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(8) % 4
    if shares:
        targets = 0.8 * torch.eye(4)[targets] + 0.05
    before = task.loss(logits, targets, label_smoothing=0.1, class_weights=weights)
    before.backward()
    assert before.shape == ()
    after = task.loss(logits - 0.1 * logits.grad, targets, label_smoothing=0.1, class_weights=weights)
    assert after < before


def test_evaluation_details_are_json(task, records):
    details = task.evaluate(records, CLASSES)
    assert isinstance(details, dict)
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_classes_may_have_no_examples(task, answers):
    probabilities, targets = answers
    only = targets < 2
    records = task.records(probabilities[only], targets[only])
    task.scores(records)
    json.dumps(task.evaluate(records, CLASSES), allow_nan=False)


def test_an_empty_split_is_bad_data(task):
    with pytest.raises(DataError):
        task.records(np.zeros((0, 2), np.float32), np.zeros(0, np.int64))


# --- weights --------------------------------------------------------------------------------


def test_every_record_is_a_row(records):
    assert {len(column) for column in records.values()} == {60}


def test_weights_of_one_equal_no_weights_to_the_last_bit(task, records):
    assert task.scores(records, np.ones(60)) == task.scores(records)


@given(st.lists(st.integers(0, 3), min_size=60, max_size=60).filter(any))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_weight_counts_an_example_so_often(task, records, weights):
    repeated = select(records, np.repeat(np.arange(60), weights))
    assert task.scores(records, np.array(weights)) == pytest.approx(task.scores(repeated))


def test_only_the_proportion_of_weights_matters(task, records):
    weights = np.random.default_rng(0).random(60)
    assert task.scores(records, 7 * weights) == pytest.approx(task.scores(records, weights))


def test_the_order_of_examples_changes_nothing(task, records):
    order, weights = np.random.default_rng(0).permutation(60), np.arange(60)
    assert task.scores(select(records, order), weights[order]) == pytest.approx(task.scores(records, weights))


def test_many_resamples_at_once_score_like_one_after_another(task, records):
    weights = np.random.default_rng(0).integers(0, 4, (9, 60)).astype(float)
    expected = Task.resampled_scores(task, records, weights)
    scores = task.resampled_scores(records, weights)
    assert scores.keys() == expected.keys()
    for name, values in scores.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-12)


# --- intervals and the gate -----------------------------------------------------------------


def test_every_score_has_an_interval(task, records):
    scores, bounds = task.scores(records), intervals(task, records)
    assert bounds.keys() == scores.keys()
    for name, (low, high) in bounds.items():
        assert low <= high
        assert name in task.distances or low <= scores[name] <= high


def test_a_closed_form_agrees_with_the_bootstrap(task, records):
    many = select(records, np.arange(600) % 60)
    by_bootstrap = intervals(task, many, groups=np.arange(600))
    for name, bounds in task.closed_intervals(many).items():
        assert bounds == pytest.approx(by_bootstrap[name], abs=0.01)


def answers_right(share: float, seed: int, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Answers that are right for this share of the examples, and their targets."""
    random, targets = np.random.default_rng(seed), np.arange(count) % len(CLASSES)
    predicted = np.where(random.random(count) < share, targets, (targets + 1) % len(CLASSES))
    return 0.9 * np.eye(len(CLASSES), dtype=np.float32)[predicted] + np.float32(0.1 / len(CLASSES)), targets


@pytest.mark.parametrize("groups", [None, np.arange(3000) // 3])
@pytest.mark.parametrize(("loss", "refused"), [(0.0, False), (1.0, False), (8.0, True)])
def test_the_gate_refuses_a_loss_well_over_the_tolerance_only(task, loss, refused, groups):
    """The reference answers 90 % right; the other model spoils answers: tolerances' worth of them."""
    before, targets = answers_right(0.9, seed=1)
    after = before.copy()
    spoiled = np.random.default_rng(2).random(len(after)) < loss * task.tolerance
    after[spoiled] = np.roll(after[spoiled], 1, axis=1)
    change = difference(task, task.records(before, targets), task.records(after, targets), groups)
    assert change.exceeds(task.tolerance) == refused


def test_the_gate_does_not_refuse_noise(task):
    """Equally good models that err on different examples."""
    (before, targets), (after, _) = answers_right(0.9, seed=1, count=400), answers_right(0.9, seed=3, count=400)
    change = difference(task, task.records(before, targets), task.records(after, targets))
    assert change.low <= change.median <= change.high
    assert not change.exceeds(task.tolerance)
