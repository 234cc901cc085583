"""A race finds the fastest of several ways with few noisy timings. All times here are invented."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suanli.compute.race import NEAR, ROUNDS, Race

TIMES = st.dictionaries(st.integers(0, 30), st.floats(0.01, 10), min_size=1, max_size=16)
# Milliseconds of a `speednet` step by layout, precision and allocator: on a Xeon with AMX, and with the instructions of
# one without it. Measured, see records/2026-11-30_xeon-2core_plan.
WITH_AMX = {"clba": 122, "clb": 143, "ba": 209, "cloa": 211, "b": 225, "cla": 230, "clo": 249, "cl": 275, "a": 352}
WITHOUT_AMX = {"cla": 228, "clba": 293, "cl": 296, "clb": 311, "a": 342, "ba": 400, "b": 455, "": 494}


def run(
    race: Race[object], seconds: dict[object, float], noise: random.Random | None = None, spread: float = 0.1
) -> int:
    """Runs a race on these times; gives the number of turns. One step in 14 is disturbed, and takes much longer."""
    turns = 0
    while (entrant := race.turn) is not None:
        turns += 1
        took = seconds[entrant]
        if noise is not None:
            took *= math.exp(noise.gauss(0, spread)) * (noise.uniform(1.3, 2.5) if noise.random() < 1 / 14 else 1.0)
        race.record(took)
    return turns


@given(TIMES)
def test_without_noise_the_fastest_wins(times: dict[object, float]) -> None:
    race = Race(list(times))
    turns = run(race, times)
    assert times[race.leader] == min(times.values())
    assert turns <= ROUNDS * len(times)


@given(TIMES, st.data())
def test_one_that_is_withdrawn_never_wins_and_the_race_ends(times: dict[object, float], data: st.DataObject) -> None:
    race = Race(list(times))
    gone = set()
    for _ in range(ROUNDS * len(times) * 2):
        entrant = race.turn
        if entrant is None:
            break
        if len(race.field) > 1 and data.draw(st.booleans()):
            race.withdraw(entrant)
            gone.add(entrant)
        else:
            race.record(times[entrant])
    assert race.turn is None
    assert race.leader not in gone


@pytest.mark.parametrize("times", [WITH_AMX, WITHOUT_AMX])
@pytest.mark.parametrize(("spread", "least"), [(0.03, 0.93), (0.1, 0.9)])
def test_on_a_noisy_machine_the_winner_is_close_to_the_best(
    times: dict[object, float], spread: float, least: float
) -> None:
    noise = random.Random(0)
    close = 0
    for _ in range(200):
        entrants = list(times)
        noise.shuffle(entrants)
        race = Race(entrants)
        run(race, times, noise, spread)
        close += times[race.leader] <= min(times.values()) / 0.95
    assert close / 200 >= least


def test_a_hopeless_entrant_runs_once() -> None:
    race = Race(["fast", "slow", "near"])
    run(race, {"fast": 1.0, "slow": 3.0, "near": 1.0 + (NEAR - 1) / 2})
    assert len(race.seconds("slow")) == 1
    assert len(race.seconds("near")) == ROUNDS


def test_a_gain_counts_the_rounds_that_both_ran() -> None:
    race = Race(["fast", "slow"])
    run(race, {"fast": 1.0, "slow": 1.7})
    assert race.gain("slow", "fast").ratio == pytest.approx(1.7)
    assert race.ranking == ["fast"]


def test_a_race_needs_entrants() -> None:
    with pytest.raises(ValueError, match="entrants"):
        Race([])
