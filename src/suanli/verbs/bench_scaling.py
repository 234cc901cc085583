"""bench --scaling: the images per second that 1, 2, … processes reach together, what they lose and to what.

Leaves a run directory with scaling.json, a line of the ledger for each number of processes, and the report. How it is
measured is in `training/scaling.py`. It starts no processes on other hosts and keeps no trained model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from suanli.core.console import plural
from suanli.core.errors import MachineError, UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import Run, measurement
from suanli.core.types import AnyPath, Device, Environment, Json, Measurement, Recipe
from suanli.data.cache import PreparedData
from suanli.machine.device import cores, detect
from suanli.parallel import group, launch
from suanli.reporting import scaling_views
from suanli.training.prepare import DataOptions, resolve
from suanli.training.scaling import judge, measure_groups, summarize
from suanli.training.scaling_records import Scaling, ScalingSize
from suanli.verbs._bench_run import refuse_place, save_figures

if TYPE_CHECKING:
    from rich.console import Group

ROUNDS = 5
MOST_UNASKED = 16  # processes on a CPU: each holds a network and some hundred megabytes of libraries


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """The figures, and the run directory that has them."""

    run: Run
    scaling: Scaling

    def to_json(self) -> dict[str, object]:
        return self.scaling.to_json() | {"run": str(self.run.path)}


def bench_scaling(
    data: AnyPath,
    *,
    processes: str | Sequence[int] | None = None,
    model: str | None = None,
    recipe: str | Recipe | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Json] | None = None,
    device: str = "auto",
    speedups: str = "auto",
    steps: int | None = None,
    rounds: int = ROUNDS,
    out: AnyPath | None = None,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
    **columns: Any,
) -> ScalingResult:
    """Measure training steps of 1, 2, 4, … `processes` that share each batch.

    Blocks of `steps` (default: about 1.5 s) take turns in `rounds`. `processes`: "1,2,4"; by default powers of two up
    to the GPUs, or to the cores and 16. `columns`: see `DataOptions`. Raises UsageError for numbers that can't be,
    MachineError where a process ends or doesn't answer, and what a process raises.
    """
    target = detect(device)
    counts = _counts(processes, steps, rounds, target)
    refuse_place(data, out)
    options = DataOptions.of(data, data_dir=data_dir, cache_dir=cache_dir, **columns)
    changes = {"model": model, "batch_size": batch_size}
    changes = {name: value for name, value in changes.items() if value is not None} | dict(settings or {})
    recipe, prepared = resolve(options, recipe=recipe, settings=changes)
    batch = min(recipe.batch_size, len(prepared.splits["train"]))
    if processes is None:
        counts = [n for n in counts if n <= batch]
    if max(counts) > batch:
        raise group.too_many_processes(max(counts), batch)
    job = {
        "options": asdict(options),
        "recipe": recipe.model_dump(mode="json"),
        "device": target.type,  # each process has a GPU of its own
        "speedups": speedups,
        "steps": steps,
        "cache": str(cache_dir_of(options.cache_dir)),
    }
    scaling = _measure(counts, rounds, job, recipe, prepared, target)
    measurements = partial(_measurements, scaling.sizes, recipe)
    figures = scaling.to_json()
    run = save_figures(
        "scaling", figures, measurements, out, recipe=recipe, prepared=prepared, options=options, device=target
    )
    return ScalingResult(run=run, scaling=scaling)


def _measure(
    counts: Sequence[int],
    rounds: int,
    job: Mapping[str, object],
    recipe: Recipe,
    prepared: PreparedData,
    target: Device,
) -> Scaling:
    shared = target.type == "cpu"
    sizes = summarize(measure_groups(counts, job, rounds), shared=shared)
    return Scaling(
        data=prepared.name,
        model=recipe.model,
        device=target.name,
        cores=cores(),
        batch_size=sum(sizes[0].local_batch),
        rounds=rounds,
        shared=shared,
        sizes=sizes,
        verdict=judge(sizes, shared=shared),
    )


def _counts(processes: str | Sequence[int] | None, steps: int | None, rounds: int, target: Device) -> list[int]:
    """The numbers of processes, 1 among them, ascending. Raises UsageError, and MachineError for an Apple GPU."""
    if target.type == "mps":
        raise MachineError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    if rounds < 1:
        raise UsageError(f"--rounds can't be {rounds}.", fix="Give 1 or more; 5 show a spread.")
    if steps is not None and steps < 2:
        raise UsageError(f"--steps can't be {steps}.", fix="Give 2 or more.")
    if processes is None:
        most, what = launch.max_processes(target)
        most = most if what == launch.GPU else min(most, MOST_UNASKED)
        return [1 << power for power in range(most.bit_length())]
    try:
        counts = [int(part) for part in (processes.split(",") if isinstance(processes, str) else processes)]
    except ValueError:
        raise UsageError(f"--processes can't be {processes!r}.", fix="Give numbers, such as 1,2,4.") from None
    return sorted({1, *(launch.check_count("--processes", count, target) for count in counts)})


def _measurements(sizes: Sequence[ScalingSize], recipe: Recipe, environment: Environment) -> Iterator[Measurement]:
    for size in sizes:
        rate = size.images_per_s
        yield measurement(
            "examples_per_s",
            rate.median,
            "1/s",
            environment=environment,
            recipe=recipe,
            variant=plural(size.processes, "process", "processes"),
            scores={},
            spread=rate.half_iqr,
            count=rate.count,
        )


def table(result: ScalingResult) -> Group:
    """For people."""
    from rich.console import Group
    from rich.table import Table

    summary, verdict = scaling_views.abstract(result.scaling)
    parts: list[Table | str] = [summary, ""]
    for columns, rows in scaling_views.tables(result.scaling).values():
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        parts += [table, ""]
    return Group(*parts, verdict, "", f"Run:    {result.run.path}", f"Report: {result.run.path / 'report.html'}")
