"""The trainings of a cross-validation: one for each fold, as the run was trained, without the examples of the fold."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from suanli.core.console import hide_progress, say
from suanli.core.errors import DataError, MachineError, UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import FINISHED, Run, is_run
from suanli.core.types import Plan, Source
from suanli.data.cache import PreparedData, prepare_source
from suanli.data.folds import deal_folds, fold_source
from suanli.machine.device import cores, environment
from suanli.training.options import ComputeOptions, TrainerOptions
from suanli.training.prepare import DataOptions, resolve_run
from suanli.training.runs import Resources, find_resources, plan_to_resume, training_spec
from suanli.training.session import Session

FOLDER = "folds"  # of a run, while it is cross-validated


@dataclass(frozen=True, kw_only=True)
class TrainedFold:
    prepared: PreparedData  # whose test split the run hasn't seen
    run: Run


def train_folds(run: Run, options: DataOptions, *, count: int, repetitions: int, device: str) -> Iterator[TrainedFold]:
    """Train a model for each fold, one after another. Those that were trained before an interruption are kept. Raises
    DataError where the data isn't the run's, and what a training raises."""
    recipe = run.recipe
    own = resolve_run(run, options, recipe, verb="evaluate", announce=False)
    if own.examples is None:
        raise DataError(f"An older version prepared the data of {run.path}.", fix="Train anew.")
    table, task = own.examples, own.task
    source = options.find_source(task.annotation)
    resources = find_resources(ComputeOptions(device=device), None)
    if not resources.group.is_alone:
        raise UsageError("--folds trains in one process, and this is one of several.", fix="Evaluate in one process.")
    trainer = _FoldTrainer(run, options, resources, own, source)
    for repetition in range(repetitions):
        folds = deal_folds(source, table, task.strata, count, repetition)
        for fold in range(count):
            again = f", repetition {repetition + 1} of {repetitions}" if repetitions > 1 else ""
            say(f"fold {fold + 1} of {count}{again}")
            yield trainer.train(folds, fold, f"{repetition + 1}-{fold + 1}-of-{count}")


class _FoldTrainer:
    def __init__(
        self, run: Run, options: DataOptions, resources: Resources, prepared: PreparedData, source: Source
    ) -> None:
        self.run, self.options, self.resources, self.source = run, options, resources, source
        # With given weights, the preprocessing that these were trained with; else each fold's own.
        self.preprocess = None if options.preprocess is None else prepared.preprocess
        self.plan: str | Plan | None = None
        with suppress(MachineError):  # the run was trained on a machine with other speedups
            self.plan = plan_to_resume(run.summary, resources)

    def train(self, folds: Sequence[int | None], fold: int, name: str) -> TrainedFold:
        """A run of the fold with this number, unless there is one already."""
        run, recipe, options = self.run, self.run.recipe, self.options
        with hide_progress():
            prepared = prepare_source(
                fold_source(self.source, folds, fold),
                recipe,
                cache_dir_of(options.cache_dir),
                threads=cores(),
                preprocess=self.preprocess,
            )
            place = run.path / FOLDER / name
            if _is_done(place, prepared):
                return TrainedFold(prepared=prepared, run=Run.open(place))
            shutil.rmtree(place, ignore_errors=True)
            spec = training_spec(recipe, prepared, options, self.resources, self.plan)
            about = options.describe(prepared)
            trained = Run.create(prepared.name, place, recipe, about, environment(self.resources.device))
            with trained.lock():
                self.resources.train(Session(spec), trained, TrainerOptions())
        return TrainedFold(prepared=prepared, run=trained)


def _is_done(place: Path, prepared: PreparedData) -> bool:
    """Whether an earlier cross-validation, which was interrupted, has trained this fold."""
    if not is_run(place):
        return False
    run = Run.open(place)
    return bool(run.data.get("digest") == prepared.digest and run.summary.get("status") in FINISHED)


def remove_folds(run: Run) -> None:
    shutil.rmtree(run.path / FOLDER, ignore_errors=True)
