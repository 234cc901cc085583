"""The score of a trained network as its plan computes it, against float32: same weights, same inputs.

Training in a lower precision may end in weights that answer well only in that precision. The inputs are the
validation split's, which took no part in training, and in planning neither.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli import gate
from suanli.gate import Difference
from suanli.inference import infer
from suanli.learner import active
from suanli.loop import Loop, validation_batch
from suanli.plugins import load
from suanli.types import Plan

EXAMINED = 2_000  # inputs at most: enough to see a loss of a point, and soon done


def rounding(plan: Plan) -> list[str]:
    """The speedups of a plan that compute in a lower precision."""
    return [name for name in plan.speedups if "numerics" in load("speedups", name).risks]


def against_float32(loop: Loop) -> tuple[Difference, int] | None:
    """How the headline score differs from float32's, and on how many inputs; None: there are none."""
    examples = min(EXAMINED, len(loop.val_feed))
    if not examples:
        return None
    answers = []
    for step in (replace(loop.compute, compute=None, autocast_dtype=None, settings=()), loop.compute):
        positions = torch.arange(examples).split(validation_batch(loop.recipe))  # type: ignore[no-untyped-call]
        rows = (rows for rows, _, _ in loop.val_feed.batches(iter(positions)))
        with active(step):
            answers.append(infer(step, loop.preprocess, loop.task, rows))
    float32, planned = answers
    return gate.difference(loop.task, float32, planned, loop.val_feed.split.targets[:examples]), examples
