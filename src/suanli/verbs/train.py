"""train: prepared data and a recipe become a run with a model inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from suanli.core.errors import UsageError
from suanli.core.run import Run, is_run
from suanli.core.types import AnyPath, Json, Recipe
from suanli.parallel.launch import RESTARTS
from suanli.training.options import CHECKPOINT_EVERY_S, HANG_S, ComputeOptions, RecipeOptions
from suanli.training.prepare import DataOptions
from suanli.training.runs import find_resources, has_begun, join_run, resume_run, start_run


def train(
    data: AnyPath,
    *,
    model: str | None = None,
    weights: AnyPath | None = None,
    recipe: str | Recipe | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    tiles: int | None = None,
    settings: Mapping[str, Json] | None = None,
    target_accuracy: float | None = None,
    time_budget: str | float | None = None,
    device: str = "auto",
    speedups: str = "auto",
    threads: int | None = None,
    nproc: str | int | None = None,
    balance: bool = False,
    shard: bool | None = None,
    max_restarts: int = RESTARTS,
    hang_timeout_s: float = HANG_S,
    out: AnyPath | None = None,
    more_epochs: float | None = None,
    moved_to: AnyPath | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    track: Sequence[str] = (),
    input_column: str | None = None,
    label_column: str | None = None,
    target: str | None = None,
    group_column: str | None = None,
    group_pattern: str | None = None,
    time_column: str | None = None,
    folds: str | int | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
    trust_code: bool = False,
) -> Run:
    """Train a model and keep everything about it in a run directory.

    `data` is a data set (see `prepare`) or the directory of a run, which is then resumed from its last checkpoint: bit
    by bit as if it had not stopped, on a CPU. `more_epochs` continues a finished run. `moved_to` says where the data of
    a run is now, with the same content. `tiles` cuts images into tiles of so many px. `settings` sets any field of the
    recipe. `target_accuracy` (a fraction) chooses the cheapest training that is known to reach it, `time_budget`
    (seconds, or "5m") the best that is done by then. `nproc` processes of this machine ("auto": one for each GPU) share
    every batch, with the same result for any number. `folds` (5, or "5x3") then evaluates by cross-validation, as
    `evaluate` does, and keeps the model that was trained first. `trust_code` lets a saved run name code that isn't
    suanli's. `scores` of the run are those on the validation split. Raises Interrupted with the checkpoint saved,
    Diverged, OutOfMemory with a batch size that would fit, and the errors of `prepare`.
    """
    if folds is not None:
        from suanli.verbs._folds import parse_folds

        parse_folds(folds)  # before any work is done
    fields = {"model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    fields |= {"preprocess.tiles": tiles}
    changes = {name: value for name, value in fields.items() if value is not None} | dict(settings or {})
    learned = RecipeOptions(
        recipe=recipe, changes=changes, weights=weights, target_accuracy=target_accuracy, time_budget=time_budget
    )
    computed = ComputeOptions(
        device=device,
        speedups=speedups,
        threads=threads,
        nproc=nproc,
        balance=balance,
        shard=shard,
        max_restarts=max_restarts,
        hang_timeout_s=hang_timeout_s,
        checkpoint_every_s=checkpoint_every_s,
        track=track,
    )
    columns = {
        "input_column": input_column,
        "label_column": label_column,
        "target": target,
        "group_column": group_column,
        "group_pattern": group_pattern,
        "time_column": time_column,
    }
    source = DataOptions.of(data, data_dir=data_dir, cache_dir=cache_dir, max_bad=max_bad, **columns)
    resumed = Run.open(data) if is_run(data) else None
    resources = find_resources(computed, resumed)
    if folds is not None and not resources.group.is_alone:
        raise UsageError(
            "--folds trains in one process, and this is one of several.", fix="Leave one or the other out."
        )
    if resumed is not None:
        given = [*learned.given, *(["out"] if out else []), *(name for name, value in columns.items() if value)]
        trained = resume_run(
            resumed, source, resources, given=given, more_epochs=more_epochs, moved_to=moved_to, trust_code=trust_code
        )
    elif more_epochs is not None:
        raise UsageError("--more-epochs continues a run.", fix="Name the directory of a run, not a data set.")
    elif moved_to is not None:
        raise UsageError(
            "--data says where the data of a run is now.", fix="Name the run first: suanli train RUN --data D"
        )
    elif out is not None and has_begun(out, resources.group):
        trained = join_run(source, learned, resources, out=out, trust_code=trust_code)
    else:
        trained = start_run(source, learned, resources, out=out, trust_code=trust_code)
    if folds is not None:
        from suanli.verbs.evaluate import evaluate

        # Its code has just run here, so it is trusted.
        evaluate(trained, folds=folds, device=device, cache_dir=cache_dir, trust_code=True)
    return trained
