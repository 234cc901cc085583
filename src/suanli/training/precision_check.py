"""The score of a trained network as its plan computes it, against float32: same weights, same inputs.

Training in a lower precision may end in weights that answer well only in that precision. The inputs are the
validation split's, which took no part in training, and in planning neither.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from suanli.compute.infer import infer
from suanli.compute.step_runner import apply_settings
from suanli.core import compare
from suanli.core.registry import load
from suanli.core.types import Difference, Plan, Step
from suanli.training.loop import Loop
from suanli.training.validation import validation_batch_size

EXAMINED = 2_000  # inputs at most: enough to see a loss of a point
SHARE = 0.01  # of the training's time that float32 may take for its answers; the first batch is always answered


def low_precision_speedups(plan: Plan) -> list[str]:
    """The speedups of a plan that compute in a lower precision."""
    return [name for name in plan.speedups if "numerics" in load("speedups", name).risks]


def compare_with_float32(loop: Loop) -> tuple[Difference, int] | None:
    """How the primary metric differs from float32's, and on how many inputs; None: there are none."""
    order = np.random.default_rng(0).permutation(len(loop.val_feed))[:EXAMINED]  # a split may be sorted by class
    batches = torch.from_numpy(order).split(validation_batch_size(loop.recipe))  # type: ignore[no-untyped-call]
    exact = replace(loop.compute, compute=None, autocast_dtype=None, settings=())
    until = time.perf_counter() + SHARE * loop.progress.seconds
    expected: list[np.ndarray] = []
    for positions in batches:
        expected.append(_answers(loop, exact, positions))
        late = time.perf_counter() > until
        if loop.group.max(late)[0] if loop.compute.sharded else late:  # all answer, or none can
            break
    if not expected:
        return None
    got = [_answers(loop, loop.compute, positions) for positions in batches[: len(expected)]]
    asked = order[: sum(map(len, expected))]
    targets = loop.val_feed.split.targets[asked]
    return compare.difference(loop.task, np.concatenate(expected), np.concatenate(got), targets), len(asked)


def _answers(loop: Loop, step: Step, positions: torch.Tensor) -> np.ndarray:
    """Probabilities (B, K) of validation inputs at these positions, computed as `step` says."""
    with apply_settings(step):
        return infer(step, loop.preprocess, loop.task, [loop.val_feed.rows(positions)])
