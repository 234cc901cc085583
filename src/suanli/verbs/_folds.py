"""evaluate --folds: the score of every example comes from a model that was trained without it."""

from __future__ import annotations

import re
from typing import TypedDict

import numpy as np

from suanli.compute.infer import infer
from suanli.core.console import plural, say
from suanli.core.errors import Interrupted, UsageError
from suanli.core.run import Run
from suanli.core.task import Records
from suanli.core.types import Device, Split, Step
from suanli.core.windows import merge_windows
from suanli.data.loader import Feed
from suanli.models.model_folder import SavedModel, load_model
from suanli.training.folds import TrainedFold, remove_folds, train_folds
from suanli.training.prepare import DataOptions
from suanli.training.validation import validation_batch_size

MOST_TRAININGS = 100


class Folds(TypedDict):
    """How a cross-validation was done."""

    count: int
    repetitions: int
    scores: list[float]  # the primary one of each model, on the examples that it hasn't seen


def parse_folds(folds: str | int) -> tuple[int, int]:
    """ "5" or "5x3": the number of folds, and how often they are dealt. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,3})(?:x(\d{1,3}))?", str(folds).strip())
    count, repetitions = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
    if count < 2 or not 1 <= repetitions * count <= MOST_TRAININGS:
        raise UsageError(
            f"--folds can't be {folds!r}.",
            fix=f"Give a number from 2 on, such as 5, or 5x3 to repeat it 3 times: at most {MOST_TRAININGS} trainings.",
        )
    return count, repetitions


def cross_validate(
    run: Run, saved: SavedModel, options: DataOptions, device: Device, folds: str | int
) -> tuple[Split, Records, Folds]:
    """The records of every example, each from a model that hasn't seen it, with what an evaluation needs to know of the
    examples. Trains a model for each fold; the run keeps its own."""
    count, repetitions = parse_folds(folds)
    say(f"cross-validation: {plural(count * repetitions, 'training')} of {saved.recipe.model}")
    splits: list[Split] = []
    records: list[Records] = []
    scores = []
    try:
        for trained in train_folds(run, options, count=count, repetitions=repetitions, device=device.torch_name):
            split, part = _answer(trained, device)
            splits.append(split)
            records.append(part)
            scores.append(saved.task.scores(part)[saved.task.metric.name])
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            "Stopped; the folds that are trained are kept.",
            fix=f"Go on with: suanli evaluate {run.path} --folds {folds}",
        ) from error
    joined = {name: np.concatenate([one[name] for one in records]) for name in records[0]}
    remove_folds(run)
    return _join(splits, repeated=repetitions > 1), joined, Folds(count=count, repetitions=repetitions, scores=scores)


def _answer(trained: TrainedFold, device: Device) -> tuple[Split, Records]:
    split = trained.prepared.splits["test"]
    saved = load_model(trained.run.model_path, trust_code=True)  # the code has just run here
    inputs = (batch for batch, _, _ in Feed(split, device).in_order(validation_batch_size(saved.recipe)))
    predictions = infer(Step(model=saved.module.to(device.torch_name)), saved.preprocess, saved.task, inputs)
    return split, saved.task.records(merge_windows(saved.task, predictions, split.windows), split.targets)


def _join(splits: list[Split], *, repeated: bool) -> Split:
    """The test examples of all folds. Of several repetitions, the rows of one example are a group."""
    names = [name for split in splits for name in split.names]
    groups = None
    if all(split.groups is not None for split in splits):
        groups = np.concatenate([split.groups for split in splits if split.groups is not None])
    elif repeated:
        groups = np.unique(names, return_inverse=True)[1].astype(np.int64)
    arrays = [name for name, column in splits[0].targets.items() if isinstance(column, np.ndarray)]
    leaks = [np.zeros(len(split), np.uint8) if split.leaks is None else split.leaks for split in splits]
    return Split(
        inputs={},
        index=np.arange(len(names)),
        targets={name: np.concatenate([split.targets[name] for split in splits]) for name in arrays},
        names=names,
        geometries=np.concatenate([split.geometries for split in splits]),
        groups=groups,
        leaks=np.concatenate(leaks),
    )
