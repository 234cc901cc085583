"""bench --scaling: the images per second that 1, 2, … processes reach together, what they lose and to what.

Groups of processes, one for each size, measure by turns, a round at a time (1 2 4, 4 2 1, …), so that each figure has
its baseline in the same minutes: one process with all threads. How the groups are run is in `scaling_groups.py`, what
a process measures in `scaling.py`, what follows from it in `scaling_figures.py`. Leaves a run directory with
scaling.json, a line of the ledger for each size, and the report. What this doesn't do: start processes on other hosts,
or train a model to keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli import distributed, hardware, launch
from suanli.console import plural, warn
from suanli.errors import MachineError, UsageError
from suanli.measure import STEADY
from suanli.places import cache_dir as cache_dir_of
from suanli.reporting import scaling_views
from suanli.rundir import Run, measurement, now, refuse_inside, refuse_occupied
from suanli.scaling_figures import Size, expectations, sizes, verdict
from suanli.scaling_groups import measured
from suanli.scaling_model import Link, doublings
from suanli.types import AnyPath, Device, Json, Recipe
from suanli.verbs.prepare import DataOptions, resolve
from suanli.verbs.report import report

if TYPE_CHECKING:
    from rich.console import Group

ROUNDS = 5
MOST_UNASKED = 16  # processes on a CPU: each holds a network and some hundred megabytes of libraries


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What was found, and where it lies."""

    run: Run
    about: Mapping[str, Json]
    sizes: tuple[Size, ...]
    verdict: Mapping[str, Json]
    expected: Mapping[str, Json] | None

    def to_json(self) -> dict[str, Json]:
        return {
            **self.about,
            "run": str(self.run.path),
            "sizes": [one.to_json() for one in self.sizes],
            "verdict": dict(self.verdict),
            "expected": self.expected,
        }


def bench_scaling(
    data: AnyPath,
    *,
    processes: str | Sequence[int] | None = None,
    per_host: int | None = None,
    between_us: float | None = None,
    between_gbit: float | None = None,
    model: str | None = None,
    recipe: str | Recipe | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Json] | None = None,
    device: str = "auto",
    speedups: str = "auto",
    steps: int | None = None,
    rounds: int = ROUNDS,
    out: AnyPath | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
) -> Scaling:
    """Measure training steps of 1, 2, 4, … `processes` that share each batch, and work out what 1,024 would reach.

    Blocks of `steps` (default: about 1.5 s) take turns in `rounds`. `processes`: "1,2,4"; by default powers of two up
    to the GPUs, or to the cores and 16. For the expectation, hosts of `per_host` processes are linked with a latency of
    `between_us` microseconds and `between_gbit` gigabits a second; by default all are linked as those here.
    Raises UsageError for numbers that can't be, MachineError where a process ends or doesn't answer, and what a
    process raises.
    """
    target = hardware.detect(device)
    if target.type == "mps":
        raise MachineError("Processes can't share Apple's mps.", fix="Use --device cpu.")
    counts = _counts(processes, target)
    _check(rounds, steps, per_host, between_us, between_gbit)
    if out is not None:
        refuse_occupied(Path(out).expanduser())
    refuse_inside(data, out)
    options = DataOptions.of(
        data,
        input_column=input_column,
        label_column=label_column,
        data_dir=data_dir,
        cache_dir=cache_dir,
        max_bad=max_bad,
    )
    chosen = {"model": model, "batch_size": batch_size}
    changes: dict[str, Json] = {k: v for k, v in chosen.items() if v is not None} | dict(settings or {})
    full, prepared = resolve(options, recipe=recipe, settings=changes)
    most = min(full.batch_size, len(prepared.splits["train"]))
    if processes is None:
        counts = [n for n in counts if n <= most]
    if max(counts) > most:
        raise distributed.too_many(max(counts), most)
    wanted = {
        "options": asdict(options),
        "recipe": full.model_dump(mode="json"),
        "device": "cuda" if target.type == "cuda" else "cpu",
        "speedups": speedups,
        "steps": steps,
        "cache": str(cache_dir_of(options.cache_dir)),
    }
    told = measured(counts, wanted, rounds)
    batch, shared = int(told[1][0]["batch"]), target.type == "cpu"
    found = sizes(told, batch=batch, shared=shared)
    between = _between(between_us, between_gbit, found[-1].link)
    environment = hardware.environment(target)
    about = prepared.to_json() | {"source": options.subject, "options": asdict(options)}
    made = Scaling(
        run=Run.create(f"{prepared.name}-scaling", out, full, about, environment),
        about=_about(target, full, prepared.name, batch, shared, rounds),
        sizes=found,
        verdict=verdict(found, shared=shared),
        expected=expectations(found, batch=batch, shared=shared, per_host=per_host, between=between),
    )
    _keep(made, prepared.findings, environment, full)
    return made


def _keep(made: Scaling, findings: Json, environment: Mapping[str, Json], recipe: Recipe) -> None:
    run = made.run
    with run.lock():
        run.write("check.json", findings)
        run.write("scaling.json", {k: v for k, v in made.to_json().items() if k != "run"})
        for one in made.sizes:
            variant = plural(one.processes, "process", "processes")
            rate = one.images_per_s
            told = measurement(
                "examples_per_s",
                rate.median,
                "1/s",
                environment=environment,
                recipe=recipe,
                variant=variant,
                scores={},
                spread=rate.half_iqr,
                count=rate.count,
            )
            run.record(told)
    report(run)
    for one in made.sizes:
        if one.images_per_s.relative > STEADY:
            who = plural(one.processes, "process", "processes")
            warn(f"{who}: figures varied by {one.images_per_s.relative:.0%} between rounds.")


def _about(target: Device, recipe: Recipe, data: str, batch: int, shared: bool, rounds: int) -> dict[str, Json]:
    return {
        "data": data,
        "model": recipe.model,
        "device": target.name,
        "device_type": target.type,
        "cores": hardware.cores(),
        "batch_size": batch,
        "rounds": rounds,
        "shared": shared,
        "time": now(),
    }


# --- what is asked for ----------------------------------------------------------------------


def _counts(processes: str | Sequence[int] | None, target: Device) -> list[int]:
    """The numbers of processes, 1 among them, ascending. Raises UsageError."""
    if processes is None:
        most, what = launch.most_processes(target)
        return doublings(most if what == launch.GPU else min(most, MOST_UNASKED))
    try:
        given = [int(part) for part in (processes.split(",") if isinstance(processes, str) else processes)]
    except ValueError:
        raise UsageError(f"--processes can't be {processes!r}.", fix="Give numbers, such as 1,2,4.") from None
    return sorted({1, *(launch.checked_count("--processes", count, target) for count in given)})


def _check(
    rounds: int, steps: int | None, per_host: int | None, between_us: float | None, between_gbit: float | None
) -> None:
    if rounds < 1:
        raise UsageError(f"--rounds can't be {rounds}.", fix="Give 1 or more; 5 tell a spread.")
    if steps is not None and steps < 2:
        raise UsageError(f"--steps can't be {steps}.", fix="Give 2 or more.")
    if per_host is not None and per_host < 1:
        raise UsageError(f"--per-host can't be {per_host}.", fix="Give how many processes a host has, 1 or more.")
    given = (per_host, between_us, between_gbit)
    if any(value is not None for value in given) and None in (per_host, between_gbit):
        raise UsageError(
            "A link between hosts needs --per-host and --between-gbit.", fix="Give both; --between-us says its latency."
        )
    if between_us is not None and not 0 <= between_us < 1e6:
        raise UsageError(f"--between-us can't be {between_us:g}.", fix="Give microseconds, 0 to a million.")
    if between_gbit is not None and not 0 < between_gbit < 1e6:
        raise UsageError(f"--between-gbit can't be {between_gbit:g}.", fix="Give gigabits a second, such as 25.")


def _between(latency_us: float | None, gbit: float | None, within: Link | None) -> Link | None:
    """Between hosts; a latency that isn't given is that of the processes here."""
    if gbit is None or within is None:
        return None
    latency_s = within.latency_s if latency_us is None else latency_us * 1e-6
    return Link(latency_s=latency_s, bytes_per_s=gbit * 1e9 / 8)


# --- for people -----------------------------------------------------------------------------


def table(found: Scaling) -> Group:
    """One row a size; what it comes to; and what is expected."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    told = scaling_views.section(scaling_views.read(found.to_json()))
    parts: list[object] = [Text(told.title, style="bold"), ""]
    for made in told.tables:
        shown = Table(title=made.title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
        for column in made.columns:
            shown.add_column(column, justify="right", overflow="fold")
        for row in made.rows:
            shown.add_row(*row)
        parts += [shown, ""]
    parts += [Text(sentence) for sentence in told.sentences]
    where = found.run.path
    return Group(*parts, "", f"Run:    {where}", f"Report: {where / 'report.html'}")  # type: ignore[arg-type]
