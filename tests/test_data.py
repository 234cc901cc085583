"""Batches: the same from memory and from the map, every example once an epoch."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core.types import Split
from suanli.data.loader import Feed, FetchedBatch, Order, mix
from suanli.machine import device

CPU = device.detect("cpu")


@pytest.fixture
def split(tmp_path: Path) -> Split:
    random = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", random.integers(0, 256, (100, 4, 5, 3), dtype=np.uint8))
    index = np.sort(random.permutation(100)[:70])
    return Split(
        inputs={"image": np.load(tmp_path / "rows.npy", mmap_mode="r")},
        index=index,
        targets={"class": random.integers(0, 3, 70)},
        names=[str(i) for i in index],
        geometries=np.zeros((70, 3, 2)),
    )


def assert_equal_batches(one: FetchedBatch, other: FetchedBatch) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(one[2], other[2])


def test_mapped_and_resident_batches_are_equal(split: Split) -> None:
    steps = [torch.randperm(70)[:16] for _ in range(10)]
    resident, mapped = (list(Feed(split, CPU, resident=r).batches(iter(steps))) for r in (True, False))
    assert len(resident) == len(mapped) == 10
    for one, other in zip(resident, mapped, strict=True):
        assert_equal_batches(one, other)


def test_rows_belong_to_their_targets(split: Split) -> None:
    for rows, targets, positions in Feed(split, CPU, resident=False).in_order(32):
        expected = split.inputs["image"][split.index[positions.numpy()]]  # type: ignore[index]
        np.testing.assert_array_equal(rows["image"].numpy(), expected)
        np.testing.assert_array_equal(targets["class"].numpy(), split.targets["class"][positions.numpy()])  # type: ignore[index]


def test_an_error_while_reading_ahead_comes_out_and_no_thread_stays(split: Split) -> None:
    feed = Feed(split, CPU, resident=False)
    with pytest.raises(IndexError):
        list(feed.batches(iter([torch.tensor([0]), torch.tensor([999])])))
    unfinished = feed.batches(iter([torch.tensor([i]) for i in range(50)]))
    next(unfinished)
    unfinished.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "suanli-read-ahead"]


@given(st.integers(1, 400), st.integers(1, 150), st.integers(0, 2**40))
def test_an_epoch_has_every_example_at_most_once(examples: int, batch_size: int, seed: int) -> None:
    order = Order(examples, batch_size, seed)
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.positions(first + s) for s in range(order.steps_per_epoch)]
        assert {len(s) for s in steps} == {order.batch_size}
        assert order.batch_size <= batch_size
        counts = Counter(torch.cat(steps).tolist())
        assert max(counts.values()) == 1
        assert examples - len(counts) < order.steps_per_epoch


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 300))
def test_the_order_needs_no_memory(examples: int, batch_size: int, step: int) -> None:
    walked, jumped = (Order(examples, batch_size, 7) for _ in range(2))
    for s in range(step):
        walked.positions(s)
    assert torch.equal(walked.positions(step), jumped.positions(step))


@given(st.integers(0, 2**63), st.integers(0, 1000))
def test_neighbouring_seeds_are_unrelated(seed: int, step: int) -> None:
    assert 0 <= mix(seed, step) < 2**63
    assert mix(seed, step) != mix(seed, step + 1)
    assert bin(mix(seed, step) ^ mix(seed, step + 1)).count("1") > 8
