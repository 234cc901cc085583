"""TabM: numbers and categories as vectors, and members that learn each for itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suanli.core.errors import UsageError
from suanli.core.registry import load
from suanli.models.networks import tabm
from suanli.models.networks._columns import ColumnVectors

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32, allow_subnormal=False)


def quantiles_of(values: np.ndarray) -> list[float]:
    quantiles: list[float] = np.quantile(values, np.linspace(0, 1, 129)).tolist()
    return quantiles


def make(columns: list[list[float]], cardinalities: tuple[int, ...] = (), **args: int) -> tabm.TabM:
    torch.manual_seed(0)
    sizes = {"members": 4, "width": 16, "embedding": 4, "bins": 8} | args
    return tabm.build(
        classes=2, numbers=len(columns), cardinalities=cardinalities, quantiles=columns, dropout=0.0, **sizes
    )


@given(
    training=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=20),
    asked=st.lists(NUMBERS, min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=60)
def test_no_number_makes_an_answer_explode(training: list[float], asked: list[float]) -> None:
    """Columns that are constant, nearly constant or of any range, and numbers far outside of them."""
    network = make([quantiles_of(np.array(training, np.float64))]).eval()
    with torch.no_grad():
        network.columns.numbers.steps.normal_()  # as training may leave them
        answers = network(torch.tensor(asked, dtype=torch.float32)[:, None])
        inside = network(torch.tensor([[min(training)], [max(training)]], dtype=torch.float32))
    assert answers.isfinite().all()
    assert answers.abs().max() <= 1e3
    assert inside.isfinite().all()


def test_vectors_grow_with_the_share_of_rows_that_are_smaller() -> None:
    values = np.random.default_rng(0).lognormal(0, 3, 5000)
    columns = ColumnVectors(1, [], [quantiles_of(values)], bins=48, width=3)
    numbers = torch.tensor(np.sort(values)[::100], dtype=torch.float32)[:, None]
    with torch.no_grad():
        rows = (columns(numbers) - columns.numbers.bias[0]) / columns.numbers.weight[0]
    assert (rows.diff(dim=0) >= -1e-4).all()
    assert rows[25].abs().max() < 0.1, "the median is 0"
    assert 2 < rows[-1].max() < 4, "as of a normal distribution"


def test_missing_numbers_and_unseen_values_have_vectors_of_their_own() -> None:
    columns = ColumnVectors(2, [4, 3], [[0.0, 1.0, 2.0]] * 2, bins=2, width=3)
    with torch.no_grad():
        columns.numbers.missing.fill_(7)
        numbers = torch.tensor([[0.5, torch.nan], [0.5, 1.0]])
        codes = torch.tensor([[0, 2], [3, 2]])
        rows = columns(numbers, codes)
    assert rows.shape == (2, 12)
    assert torch.equal(rows[0, :3], rows[1, :3])
    assert (rows[0, 3:6] == 7).all()
    assert (rows[0, 6:9] == 0).all(), "a value that training hasn't seen says nothing"
    assert torch.equal(rows[0, 9:], rows[1, 9:])
    assert not torch.equal(rows[1, 6:9], rows[1, 9:]), "columns don't share their values"


@pytest.mark.parametrize("name", ["classification", "regression", "multilabel"])
def test_each_member_learns_for_itself_and_answers_have_a_mean(name: str) -> None:
    """The loss of members is the mean of their losses, and not the loss of their mean."""
    classes = ("a", "b") if name != "regression" else ()
    task = load("tasks", name).of(classes, {})
    outputs = torch.randn(5, 4, max(1, len(classes)), generator=torch.Generator().manual_seed(0))
    targets = {
        "classification": {"class": torch.tensor([0, 1, 1, 0, 1])},
        "regression": {"value": torch.arange(5.0, dtype=torch.float64)},
        "multilabel": {"labels": torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0], [1, 1]], dtype=torch.uint8)},
    }[name]
    (together,) = task.loss(outputs, targets).values()
    alone = [next(iter(task.loss(outputs[:, i], targets).values())) for i in range(4)]
    assert together == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)
    (answers,) = task.predict(outputs).values()
    members = torch.stack([next(iter(task.predict(outputs[:, i]).values())) for i in range(4)])
    torch.testing.assert_close(answers, members.mean(0))


def test_members_differ() -> None:
    network = make([[0.0, 1.0, 2.0], [0.0, 5.0, 9.0]])
    answers = network(torch.tensor([[0.5, 3.0]]))
    assert answers.shape == (1, 4, 2)
    assert len({tuple(member) for member in answers[0].tolist()}) == 4


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="below 1"):
        make([[0.0, 1.0]], members=0)
