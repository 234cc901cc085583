"""bench --scaling: the images per second that 1, 2, … processes reach together, what they lose and to what.

Leaves a run directory with scaling.json, a line of the ledger for each number of processes, and the report. How it is
measured is in `scaling.py`. What this doesn't do: start processes on other hosts, or train a model to keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.core.console import plural
from suanli.core.errors import MachineError, UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import Run, measurement, refuse_inside, refuse_occupied
from suanli.core.types import AnyPath, Device, Environment, Json, Measurement, Recipe
from suanli.machine import device as hardware
from suanli.parallel import group, launch
from suanli.reporting import scaling_views, speed_records
from suanli.training.prepare import DataOptions, resolve
from suanli.training.scaling import Size, judge, measure, work_out
from suanli.verbs.report import report

if TYPE_CHECKING:
    from rich.console import Group

ROUNDS = 5
MOST_UNASKED = 16  # processes on a CPU: each holds a network and some hundred megabytes of libraries


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What was found, and where it lies. `values` are those of scaling.json."""

    run: Run
    sizes: tuple[Size, ...]
    values: Mapping[str, Json]

    def to_json(self) -> dict[str, Json]:
        return {**self.values, "run": str(self.run.path)}


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
) -> Scaling:
    """Measure training steps of 1, 2, 4, … `processes` that share each batch.

    Blocks of `steps` (default: about 1.5 s) take turns in `rounds`. `processes`: "1,2,4"; by default powers of two up
    to the GPUs, or to the cores and 16. `columns`: see `DataOptions`. Raises UsageError for numbers that can't be,
    MachineError where a process ends or doesn't answer, and what a process raises.
    """
    target = hardware.detect(device)
    counts = _check(processes, steps, rounds, target)
    if out is not None:
        refuse_occupied(Path(out).expanduser())
    refuse_inside(data, out)
    options = DataOptions.of(data, data_dir=data_dir, cache_dir=cache_dir, **columns)
    chosen = {"model": model, "batch_size": batch_size}
    changes: dict[str, Json] = {k: v for k, v in chosen.items() if v is not None} | dict(settings or {})
    full, prepared = resolve(options, recipe=recipe, settings=changes)
    batch, shared = min(full.batch_size, len(prepared.splits["train"])), target.type == "cpu"
    if processes is None:
        counts = [n for n in counts if n <= batch]
    if max(counts) > batch:
        raise group.too_many_processes(max(counts), batch)
    job = {
        "options": asdict(options),
        "recipe": full.model_dump(mode="json"),
        "device": target.type,  # each process has a GPU of its own
        "speedups": speedups,
        "steps": steps,
        "cache": str(cache_dir_of(options.cache_dir)),
    }
    sizes = work_out(measure(counts, job, rounds), shared=shared)
    values = {
        "data": prepared.name,
        "model": full.model,
        "device": target.name,
        "cores": hardware.cores(),
        "batch_size": sum(sizes[0].local_batch),
        "rounds": rounds,
        "shared": shared,
        "sizes": [asdict(one) for one in sizes],
        "verdict": judge(sizes, shared=shared),
    }
    environment = hardware.environment(target)
    about = prepared.to_json() | {"source": options.subject, "options": asdict(options)}
    run = Run.create(f"{prepared.name}-scaling", out, full, about, environment)
    with run.lock():
        run.write("check.json", prepared.findings)
        run.write("scaling.json", values)
        for size in sizes:
            run.record(_line(size, environment, full))
    report(run)
    return Scaling(run=run, sizes=sizes, values=values)


def _check(processes: str | Sequence[int] | None, steps: int | None, rounds: int, target: Device) -> list[int]:
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
        given = [int(part) for part in (processes.split(",") if isinstance(processes, str) else processes)]
    except ValueError:
        raise UsageError(f"--processes can't be {processes!r}.", fix="Give numbers, such as 1,2,4.") from None
    return sorted({1, *(launch.check_count("--processes", count, target) for count in given)})


def _line(size: Size, environment: Environment, recipe: Recipe) -> Measurement:
    rate = size.images_per_s
    return measurement(
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


def table(found: Scaling) -> Group:
    """For people."""
    from rich.console import Group
    from rich.table import Table

    scaling = speed_records.Scaling.model_validate(found.values)
    said, verdict = scaling_views.abstract(scaling)
    parts: list[Table | str] = [said, ""]
    for columns, rows in scaling_views.tables(scaling).values():
        made = Table(box=None, padding=(0, 1), pad_edge=False)
        for column in columns:
            made.add_column(column, justify="right")
        for row in rows:
            made.add_row(*row)
        parts += [made, ""]
    return Group(*parts, verdict, "", f"Run:    {found.run.path}", f"Report: {found.run.path / 'report.html'}")
