"""Compares the score of a trained network as its plan computes it with its score in float32.

Training in a lower precision may end in weights that answer well only in that precision. The inputs come from the
validation split, which took no part in training or planning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from suanli.compute.infer import infer
from suanli.compute.step_runner import apply_settings
from suanli.core import compare
from suanli.core.registry import load
from suanli.core.schema import Arrays, select
from suanli.core.types import Difference, Plan, Step
from suanli.data.windows import split_windows
from suanli.training.loop import Loop
from suanli.training.validation import validation_batch_size

MOST_INPUTS = 2_000  # enough to see a loss of a point
TIME_SHARE = 0.01  # of the training's time that float32 may take for its answers; the first batch is always answered


def low_precision_speedups(plan: Plan) -> list[str]:
    """The speedups of a plan that compute in a lower precision."""
    return [name for name in plan.speedups if "numerics" in load("speedups", name).risks]


def compare_with_float32(loop: Loop) -> tuple[Difference, int, float] | None:
    """What the plan gains in the primary metric over float32, the number of inputs, and the loss that is allowed; None:
    the split is empty."""
    order = np.random.default_rng(0).permutation(len(loop.val_feed))[:MOST_INPUTS]  # a split may be sorted by class
    batches = torch.from_numpy(order).split(validation_batch_size(loop.recipe))  # type: ignore[no-untyped-call]
    float32 = replace(loop.compute, compute=None, autocast_dtype=None, settings=())
    until = time.perf_counter() + TIME_SHARE * loop.progress.seconds
    expected: list[Arrays] = []
    for positions in batches:
        expected.append(_predict(loop, float32, positions))
        late = time.perf_counter() > until
        if loop.compute.sharded:  # every process is needed for an answer, so all stop together
            late = bool(loop.group.max(late)[0])
        if late:
            break
    if not expected:
        return None
    actual = [_predict(loop, loop.compute, positions) for positions in batches[: len(expected)]]
    compared = order[: sum(len(positions) for positions in batches[: len(expected)])]
    split = split_windows(loop.val_feed.split, loop.task)
    targets = {name: select(column, compared) for name, column in split.targets.items()}
    before, after = (loop.task.records(_join(answers), targets) for answers in (expected, actual))
    groups = None if split.groups is None else split.groups[compared]
    metric = loop.task.metric
    allowed = metric.allowed_loss(loop.task.scores(before)[metric.name])
    return compare.difference(loop.task, before, after, groups), len(compared), allowed


def _join(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _predict(loop: Loop, step: Step, positions: torch.Tensor) -> Arrays:
    """Predictions (B, …) of validation inputs at these positions, computed as `step` says."""
    with apply_settings(step):
        return infer(step, loop.preprocess, loop.task, [loop.val_feed.inputs(positions)])
