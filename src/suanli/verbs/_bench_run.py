"""The run directory of a bench, which is created once its figures are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from suanli.core.run import Run, refuse_inside, refuse_occupied
from suanli.core.types import AnyPath, Device, Environment, Measurement, Recipe
from suanli.data.cache import PreparedData
from suanli.machine.device import environment
from suanli.training.prepare import DataOptions
from suanli.verbs.report import report


def refuse_place(data: AnyPath, out: AnyPath | None) -> None:
    """Raises UsageError where the run can't lie in `out`, before anything is measured."""
    if out is not None:
        refuse_occupied(Path(out).expanduser())
    refuse_inside(data, out)


def save_figures(
    kind: str,
    figures: object,
    measurements: Callable[[Environment], Iterable[Measurement]],
    out: AnyPath | None,
    *,
    recipe: Recipe,
    prepared: PreparedData,
    options: DataOptions,
    device: Device,
) -> Run:
    """A run directory with <kind>.json, a line of the ledger for each figure, and the report."""
    here = environment(device)
    run = Run.create(f"{prepared.name}-{kind}", out, recipe, options.describe(prepared), here)
    with run.lock():
        run.write("check.json", prepared.findings)
        run.write(f"{kind}.json", figures)
        for measurement in measurements(here):
            run.record(measurement)
    report(run)
    return run
