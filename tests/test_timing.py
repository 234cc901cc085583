"""Timing in pairs: what spread, gain and turns promise for all inputs."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suanli.machine import timing

SECONDS = st.floats(1e-6, 1e6)
VALUES = st.lists(SECONDS, min_size=1, max_size=30)
ROUNDS = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=12)


@given(values=VALUES, share=st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    assert timing.percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))


@given(values=VALUES)
def test_spread_lies_among_the_values_in_any_order(values: list[float]) -> None:
    spread = timing.spread(values)
    assert spread == timing.spread(values[::-1])
    assert spread.low == min(values) <= spread.median <= max(values) == spread.high
    assert 0 <= spread.half_iqr <= (spread.high - spread.low) / 2 * (1 + 1e-9)
    assert spread.count == len(values)


@given(values=VALUES, scale=st.floats(0.01, 100))
def test_relative_spread_has_no_unit(values: list[float], scale: float) -> None:
    scaled = timing.spread([v * scale for v in values])
    assert scaled.relative == pytest.approx(timing.spread(values).relative, abs=1e-9)


def test_one_outlier_among_many_values_changes_the_spread_little() -> None:
    calm = [1.0 + 0.001 * i for i in range(20)]
    assert timing.spread([*calm, 1e6]).half_iqr < 2 * timing.spread(calm).half_iqr
    assert timing.spread([0.0, 0.0]).relative == math.inf


@given(rounds=ROUNDS)
def test_gain_of_the_exchanged_sides_is_the_inverse_of_a_round(rounds: list[tuple[float, float]]) -> None:
    before, after = [list(side) for side in zip(*rounds, strict=True)]
    gain = timing.gain(before, after)
    ratios = [b / a for b, a in rounds]
    assert min(ratios) <= gain.ratio <= max(ratios)
    assert gain.rounds == len(rounds)
    if len(rounds) % 2:  # a median of an even count lies between two rounds
        assert timing.gain(after, before).ratio == pytest.approx(1 / gain.ratio)


@given(seconds=VALUES, noise=VALUES)
def test_what_slows_both_sides_of_a_round_cancels_out(seconds: list[float], noise: list[float]) -> None:
    slowed = [s * n for s, n in zip(seconds, noise, strict=False)]
    gain = timing.gain(slowed, [s / 2 for s in slowed])
    assert gain.ratio == pytest.approx(2)
    assert gain.spread == pytest.approx(0, abs=1e-9)
    assert gain.proven


@given(seconds=VALUES)
def test_the_same_against_itself_is_no_gain(seconds: list[float]) -> None:
    assert not timing.gain(seconds, seconds).proven


@pytest.mark.parametrize(
    ("before", "after", "proven"),
    [
        ([1.0, 1.0, 1.0], [0.8, 0.8, 0.8], True),
        ([1.0, 1.0, 1.0], [0.995, 0.995, 0.995], False),  # a trifle
        ([1.0, 1.0, 1.0, 1.0], [0.5, 0.9, 1.1, 1.6], False),  # drowned in the spread
        ([1.0, 1.0, 1.0], [1.2, 1.2, 1.2], False),
    ],
)
def test_a_gain_is_proven_above_its_spread(before: list[float], after: list[float], proven: bool) -> None:
    assert timing.gain(before, after).proven == proven


def test_no_values_and_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        timing.spread([])
    with pytest.raises(ValueError, match="no values"):
        timing.percentile([], 0.5)
    with pytest.raises(ValueError, match="no values"):
        timing.gain([], [])
    with pytest.raises(ValueError, match="zip"):
        timing.gain([1.0], [1.0, 2.0])


def test_seconds_waits_before_and_after() -> None:
    seen: list[str] = []
    timing.seconds(lambda: seen.append("work"), lambda: seen.append("settle"))
    assert seen == ["settle", "work", "settle"]
    assert 0.02 <= timing.seconds(lambda: time.sleep(0.02)) < 1


@given(count=st.integers(1, 4), rounds=st.integers(1, 5), warm_up=st.integers(0, 3))
def test_every_other_round_runs_in_reverse(count: int, rounds: int, warm_up: int) -> None:
    seen: list[int] = []
    works = {key: (lambda key=key: seen.append(key)) for key in range(count)}
    times = timing.time_interleaved(works, rounds=rounds, warm_up=warm_up)
    keys = list(range(count))
    assert seen == [k for number in range(warm_up + rounds) for k in (keys if number % 2 == 0 else keys[::-1])]
    assert {key: len(values) for key, values in times.items()} == dict.fromkeys(keys, rounds)


def test_a_spent_budget_ends_the_rounds_after_the_first() -> None:
    times = timing.time_interleaved({"a": lambda: time.sleep(0.01)}, rounds=50, budget_s=0.0)
    assert len(times["a"]) == 1
    times = timing.time_interleaved({"a": lambda: time.sleep(0.01)}, rounds=50, budget_s=0.05)
    assert 1 <= len(times["a"]) < 10
