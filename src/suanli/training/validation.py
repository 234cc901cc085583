"""Scores on the validation split while a training runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from suanli.compute.infer import infer
from suanli.compute.step_runner import apply_settings
from suanli.core.errors import Diverged
from suanli.core.schema import Tensors, zeros
from suanli.core.task import Records, Task
from suanli.core.types import Recipe, Step
from suanli.core.windows import merge_windows
from suanli.parallel.group import ALONE, Group
from suanli.training import divergence
from suanli.training.loop import Loop


def validate(loop: Loop) -> dict[str, float]:
    """A collective: the scores of the weights that the run would keep now. Each process answers for a part of the
    split. Raises Diverged for answers that aren't finite."""
    phase, loop.phase = loop.phase, "validate"
    with loop.use_averaged_weights():
        scores = loop.task.scores(_record(loop, loop.compute, loop.group))
    loop.phase = phase
    loop.progress.add_score(scores[loop.task.metric.name], loop.task.metric)
    return scores


def calibrate(loop: Loop) -> Task:
    """The task with what it chooses on the validation split, such as a threshold, by the weights as they are and in
    float32. In this process alone; with sharded weights, a collective."""
    if not loop.task.needs_calibration or not len(loop.val_feed):
        return loop.task
    float32 = replace(loop.compute, compute=None, autocast_dtype=None, settings=())
    with apply_settings(float32):
        return loop.task.calibrate(_record(loop, float32, loop.group if loop.compute.sharded else ALONE))


def _record(loop: Loop, step: Step, group: Group) -> Records:
    """A collective of `group`, each of whose processes answers for a part of the validation split."""
    count = len(loop.val_feed)
    own = range(count)[group.even_share(count)]
    answers = infer(step, loop.preprocess, loop.task, _batches(loop, own))
    own_answers = zeros(loop.task.outputs, len(own)) | {name: column[: len(own)] for name, column in answers.items()}
    predictions = {name: group.gather_rows(rows, own.start, count) for name, rows in own_answers.items()}
    split = loop.val_feed.split
    try:
        return loop.task.records(merge_windows(loop.task, predictions, split.windows), split.targets)
    except Diverged as error:
        at = loop.progress.step
        raise Diverged(f"The model's answers became NaN at step {at}.", fix=divergence.FIX) from error


def validation_batch_size(recipe: Recipe) -> int:
    """A validation needs no gradients, so a larger batch fits; but small batches keep Ctrl-C quick."""
    return min(max(recipe.batch_size, 64), 512)


def _batches(loop: Loop, own: range) -> Iterator[Tensors]:
    """Batches of the validation inputs that this process answers for. With sharded weights every process must compute
    the same number of batches: one that has fewer adds batches of one input, and their answers are dropped."""
    size = validation_batch_size(loop.recipe)
    for inputs, _, _ in loop.val_feed.in_order(size, own):
        yield inputs
    if loop.compute.sharded:
        longest = -(-len(loop.val_feed) // loop.group.size)
        for _ in range(-(-longest // size) - -(-len(own) // size)):
            yield loop.val_feed.inputs(torch.zeros(1, dtype=torch.int64))
