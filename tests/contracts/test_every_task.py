"""What holds for every file of tasks/."""

import json
import math

import numpy as np
import pytest
import torch

from suanli.core import registry
from suanli.core.errors import DataError
from suanli.core.types import Task

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


def test_the_gate_has_a_tolerance_and_a_metric_among_the_scores(task, answers):
    assert isinstance(task, Task)
    assert 0 <= task.tolerance < 0.1
    scores = task.scores(*answers)
    assert task.metric in scores
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())


def test_better_answers_have_a_higher_metric(task):
    targets = np.arange(21) % len(CLASSES)
    right = np.eye(len(CLASSES), dtype=np.float32)[targets]
    wrong = np.roll(right, 1, axis=1)
    assert task.scores(right, targets)[task.metric] > task.scores(wrong, targets)[task.metric]


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


def test_evaluation_details_are_json(task, answers):
    details = task.evaluate(*answers, CLASSES)
    assert isinstance(details, dict)
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_classes_may_have_no_examples(task, answers):
    probabilities, targets = answers
    only = targets < 2
    task.scores(probabilities[only], targets[only])
    json.dumps(task.evaluate(probabilities[only], targets[only], CLASSES), allow_nan=False)


def test_an_empty_split_is_bad_data(task):
    empty = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    with pytest.raises(DataError):
        task.scores(*empty)
    with pytest.raises(DataError):
        task.evaluate(*empty, ("a", "b"))
