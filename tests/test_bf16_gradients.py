"""Gradients that are sent in bfloat16: half the bytes, the same weights everywhere, and what is learned differs by
their rounding only."""

from __future__ import annotations

import json

import numpy as np
import pytest

from groups import MEMBER, read_outputs, run_in_own_network
from suanli.core.registry import load

NAME = "bf16_gradients"
RAGGED = {"model": "speednet", "model_args": {"widths": [16, 32, 32]}, "epochs": 5, "batch_size": 90}
CASES = {
    "at once": RAGGED,
    "in parts, clipped": RAGGED | {"accumulate": 2, "clip_norm": 1.0},
}
STEPS = 12


@pytest.fixture(scope="module")
def trainings() -> dict[tuple[str, str], list[dict]]:
    """By case and speedups: what each of two processes found. All in one start of theirs."""
    keys = [(case, speedups) for case in CASES for speedups in ("none", NAME)]
    wanted = [
        {
            "data": "digits",
            "settings": CASES[case],
            "speedups": speedups,
            "shares": [0.7, 0.3],
            "steps": STEPS,
            "compare": True,
        }
        for case, speedups in keys
    ]
    both = read_outputs(run_in_own_network(2, [str(MEMBER), json.dumps(wanted)]))
    return {key: [member[i] for member in both] for i, key in enumerate(keys)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned_differs_by_rounding_and_nowhere_else(trainings, case):
    plain, rounded = trainings[case, "none"], trainings[case, NAME]
    for processes in (plain, rounded):
        assert [p["mine"] for p in processes] != [45, 45]
        assert processes[0]["weights"] == processes[1]["weights"]
        assert processes[0]["losses"] == processes[1]["losses"]
    assert plain[0]["losses"] != rounded[0]["losses"], "nothing was rounded"
    # Learning amplifies what rounding does: a mistake would show at once, rounding only later.
    np.testing.assert_allclose(rounded[0]["losses"][:4], plain[0]["losses"][:4], rtol=0.005)
    np.testing.assert_allclose(rounded[0]["losses"], plain[0]["losses"], rtol=0.1)
    # The first step's gradients, as the planner compares them: far below what the speedup may cause.
    assert 0 < rounded[0]["difference"] < load("speedups", NAME).tolerance / 4


@pytest.mark.parametrize("case", CASES)
def test_half_the_bytes_are_sent(trainings, case):
    plain, rounded = (trainings[case, speedups][0] for speedups in ("none", NAME))
    # Of two processes each receives as many bytes as the gradients have; what else is said is the same in both.
    gradients = 2 * 4 * plain["parameters"] * STEPS
    assert gradients < plain["received_bytes"] < 1.3 * gradients
    assert plain["received_bytes"] - rounded["received_bytes"] == pytest.approx(gradients / 2, rel=0.03)
