import json
import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch.nn import functional as F

from suanli.core.compare import wilson_interval
from suanli.core.errors import DataError, Diverged
from suanli.core.task import Records
from suanli.tasks.classification import TASK, confusion_matrix

task = TASK()


def loss_of(logits: torch.Tensor, targets: torch.Tensor, **settings) -> torch.Tensor:
    """The mean over the batch."""
    return TASK(**settings).loss(logits, {"class": targets})["cross_entropy"] / len(logits)


def records_of(probabilities: np.ndarray, targets: np.ndarray) -> Records:
    return task.records({"probabilities": probabilities}, {"class": targets})


def scores_of(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    return task.scores(records_of(probabilities, targets))


def details_of(probabilities: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> dict[str, object]:
    return TASK(classes=tuple(classes)).evaluate(records_of(probabilities, targets))


def make_answers(count: int, classes: int, seed: int = 0, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right more often than by chance, and targets."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[targets]
    probabilities = np.exp(logits)
    return (probabilities / probabilities.sum(1, keepdims=True)).astype(dtype), targets


@st.composite
def random_answers(draw):
    classes, count = draw(st.integers(2, 12)), draw(st.integers(1, 40))
    return make_answers(count, classes, draw(st.integers(0, 10_000)))


# --- loss ---


def test_loss_is_cross_entropy_of_hand_made_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert loss_of(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


def test_shares_of_one_class_cost_the_same_as_that_class():
    logits, targets = torch.randn(7, 3), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    shares = F.one_hot(targets, 3).double()
    for smoothing in (0.0, 0.2):
        hard = loss_of(logits, targets, label_smoothing=smoothing)
        torch.testing.assert_close(loss_of(logits, shares, label_smoothing=smoothing), hard)


def test_mixed_shares_cost_the_mixture_of_the_costs():
    logits, a, b = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, 2, 0, 1])
    mixed = 0.3 * F.one_hot(a, 4) + 0.7 * F.one_hot(b, 4)
    expected = 0.3 * loss_of(logits, a) + 0.7 * loss_of(logits, b)
    torch.testing.assert_close(loss_of(logits, mixed), expected)


def test_class_weights_make_a_weighted_sum_over_the_batch():
    logits, targets = torch.randn(6, 2), torch.tensor([0, 0, 0, 0, 0, 1])
    weights = (1.0, 5.0)
    each = F.cross_entropy(logits, targets, reduction="none")
    expected = (each[:5].sum() + 5 * each[5]) / 6
    torch.testing.assert_close(loss_of(logits, targets, weights=weights), expected)


def test_class_weights_apply_to_shares_too():
    logits, shares = torch.randn(2, 3), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    weights = (1.0, 2.0, 4.0)
    expected = -(logits.log_softmax(1) * shares * torch.tensor(weights)).sum() / 2
    torch.testing.assert_close(loss_of(logits, shares, weights=weights), expected)


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(8, 5).bfloat16()
    targets = torch.arange(8) % 5
    assert loss_of(logits, targets).dtype == torch.float32
    torch.testing.assert_close(loss_of(logits, targets), loss_of(logits.float(), targets))
    probabilities = task.predict(logits)["probabilities"]
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))


def test_huge_logits_give_finite_loss_and_gradient():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = loss_of(logits, torch.tensor([1]), label_smoothing=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


# --- scores ---


@given(random_answers())
def test_scores_are_those_of_scikit_learn(answers):
    probabilities, targets = answers
    classes = probabilities.shape[1]
    predicted, scores = probabilities.argmax(1), scores_of(probabilities, targets)
    recall = metrics.recall_score(targets, predicted, labels=np.unique(targets), average="macro", zero_division=0)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(targets, predicted))
    f1 = metrics.f1_score(targets, predicted, average="macro", zero_division=0)
    if len(np.unique(targets)) > 1:
        assert (scores["balanced_accuracy"], scores["macro_f1"]) == pytest.approx((recall, f1))
    normed = probabilities / probabilities.sum(1, keepdims=True)
    expected = metrics.log_loss(targets, normed, labels=np.arange(classes))
    assert scores["log_loss"] == pytest.approx(expected, rel=1e-5)
    if classes > 5:
        expected = metrics.top_k_accuracy_score(targets, probabilities, k=5, labels=np.arange(classes))
        assert scores["top5_accuracy"] == pytest.approx(expected)


@given(random_answers())
def test_scores_stay_in_bounds(answers):
    scores = scores_of(*answers)
    assert ("top5_accuracy" in scores) == (answers[0].shape[1] > 5)
    assert all(0 <= value <= 1 or math.isnan(value) for name, value in scores.items() if name != "log_loss")
    assert scores["log_loss"] >= 0
    assert scores.get("top5_accuracy", 1.0) >= scores["accuracy"]
    assert task.metric.name in scores


@given(random_answers(), st.integers(0, 100))
def test_scores_do_not_depend_on_the_order_of_examples(answers, seed):
    probabilities, targets = answers
    order = np.random.default_rng(seed).permutation(len(targets))
    expected = pytest.approx(scores_of(probabilities, targets), nan_ok=True)
    assert scores_of(probabilities[order], targets[order]) == expected


def test_perfect_and_always_wrong_answers():
    targets = np.array([0, 1, 2])
    perfect = scores_of(np.eye(3, dtype=np.float32), targets)
    assert perfect["accuracy"] == perfect["macro_f1"] == perfect["balanced_accuracy"] == 1
    assert perfect["log_loss"] == pytest.approx(0, abs=1e-6)
    assert perfect["calibration_error"] == 0
    hopeless = scores_of(np.eye(3, dtype=np.float32)[[1, 2, 0]], targets)
    assert hopeless["accuracy"] == 0
    assert hopeless["calibration_error"] == 1
    assert math.isfinite(hopeless["log_loss"])


def test_a_model_that_always_says_the_same_gets_no_top5_for_it():
    constant = np.full((10, 10), 0.1, np.float32)
    assert scores_of(constant, np.arange(10))["top5_accuracy"] == 0.5


def test_classes_that_do_not_occur_do_not_count_in_balanced_accuracy():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]], np.float32)
    assert scores_of(probabilities, np.array([0, 0]))["balanced_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("targets", "undefined", "says"),
    [
        ([0, 0], {"balanced_accuracy", "macro_f1"}, "All examples are of one class"),
        ([0, 1], set(), "over the 2 of 3 classes"),
    ],
)
def test_means_over_classes_say_over_how_many(targets, undefined, says):
    three = TASK(classes=("a", "b", "c"))
    records = three.records({"probabilities": np.eye(3, dtype=np.float32)[:2]}, {"class": np.array(targets)})
    assert set(three.undefined_scores(records)) == undefined
    assert says in three.describe_scores(records)[0]


def test_calibration_error_of_a_known_gap():
    # Ten answers at confidence 0.8, of which six are right: off by 0.2.
    probabilities = np.tile([0.8, 0.2], (10, 1))
    targets = np.array([0] * 6 + [1] * 4)
    assert scores_of(probabilities, targets)["calibration_error"] == pytest.approx(0.2)


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="no examples"):
        scores_of(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="no examples"):
        details_of(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), ["a", "b"])


def test_broken_probabilities_are_refused():
    with pytest.raises(Diverged, match="not finite"):
        scores_of(np.array([[np.nan, 0.5]]), np.array([0]))


# --- evaluate ---


def test_evaluate_agrees_with_scikit_learn():
    probabilities, targets = make_answers(500, 4)
    predicted = probabilities.argmax(1)
    details = details_of(probabilities, targets, ["a", "b", "c", "d"])
    expected = metrics.precision_recall_fscore_support(targets, predicted)
    for key, values in zip(("precision", "recall", "f1", "count"), expected, strict=True):
        assert [one[key] for one in details["per_class"]] == pytest.approx(list(values))
    assert details["confusion"] == metrics.confusion_matrix(targets, predicted).tolist()
    assert [one["name"] for one in details["per_class"]] == ["a", "b", "c", "d"]


def test_confused_pairs_are_the_largest_mistakes_in_order():
    probabilities = np.eye(3)[[1, 1, 1, 2, 0, 0]]
    details = details_of(probabilities, np.array([0, 0, 1, 0, 2, 0]), ["cat", "dog", "cow"])
    assert details["confused"] == [
        {"true": "cat", "predicted": "dog", "count": 2},
        {"true": "cat", "predicted": "cow", "count": 1},
        {"true": "cow", "predicted": "cat", "count": 1},
    ]


def test_undefined_figures_are_none_and_the_result_is_json():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0]], np.float32)
    details = details_of(probabilities, np.array([0, 1]), ["a", "b", "c"])
    b, c = details["per_class"][1:]
    assert b == {"name": "b", "count": 1, "precision": None, "recall": 0.0, "f1": 0.0, "auroc": 1.0}
    assert c == {"name": "c", "count": 0, "precision": None, "recall": None, "f1": None, "auroc": None}
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_reliability_bins_hold_every_example_and_explain_the_calibration_error():
    probabilities, targets = make_answers(300, 3)
    bins = details_of(probabilities, targets, "abc")["reliability"]
    assert sum(one["count"] for one in bins) == 300
    error = sum(abs(b["confidence"] - b["accuracy"]) * b["count"] for b in bins if b["count"]) / 300
    assert error == pytest.approx(scores_of(probabilities, targets)["calibration_error"])
    for place, one in enumerate(bins):
        if one["count"]:
            assert place / 15 - 1e-6 <= one["confidence"] <= (place + 1) / 15 + 1e-6


def test_many_classes_give_the_worst_pairs_instead_of_the_matrix():
    probabilities, targets = make_answers(3000, 150)
    details = details_of(probabilities, targets, [str(i) for i in range(150)])
    assert details["confusion"] is None
    assert len(details["confused"]) == 20
    matrix = confusion_matrix(records_of(probabilities, targets), 150)
    np.fill_diagonal(matrix, 0)
    largest = np.sort(matrix, axis=None)[::-1][:20]
    assert [pair["count"] for pair in details["confused"]] == largest.tolist()


def test_the_interval_is_that_of_the_literature():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_stays_within_zero_and_one(counts):
    right, count = counts
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count <= high <= 1
    assert low < high


def test_importing_the_task_loads_neither_torch_layers_nor_scikit_learn():
    code = "import sys, suanli.tasks.classification; print('sklearn' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
