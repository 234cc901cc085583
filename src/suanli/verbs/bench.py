"""bench: from plain PyTorch to the full plan, one rung at a time, each with its speed, its cost and its score.

Leaves a run directory with bench.json, a line of the ledger for each figure, and the report. How rungs are
measured is in `ladder.py`. What this doesn't do: train a model to keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.compute import planner
from suanli.compute.plan import plain_plan
from suanli.compute.plan_cache import PlanCache
from suanli.core.console import size, warn
from suanli.core.errors import GateError, MachineError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import Run, measurement, refuse_inside, refuse_occupied
from suanli.core.types import AnyPath, Environment, Json, Recipe
from suanli.data.decode import decode
from suanli.machine import device as hardware
from suanli.machine import peak
from suanli.training.ablation import ROUNDS, check, climb
from suanli.training.ablation_records import Ladder, Phase, Rung
from suanli.training.forecast import explain_out_of_memory
from suanli.training.prepare import DataOptions, resolve
from suanli.training.setup import Setup
from suanli.verbs.report import report

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a bench found, and where it lies."""

    run: Run
    ladder: Ladder
    seconds: float

    def to_json(self) -> dict[str, Json]:
        scores = {f"val_{name}": value for name, value in self.ladder.full.scores.items()}
        return self.ladder.to_json() | {"run": str(self.run.path), "scores": scores}


class Refused(GateError):
    """The full plan costs more of the score than the task tolerates; `found` has every figure."""

    def __init__(self, found: Bench) -> None:
        full, guilty = found.ladder.full, " and ".join(found.ladder.guilty())
        super().__init__(
            f"The full plan ({full.name}) is refused: {full.refused}",
            fix=f"Train without {guilty or 'it'}; the figures are in {found.run.path}.",
        )
        self.found = found


def bench(
    data: AnyPath,
    *,
    model: str | None = None,
    recipe: str | Recipe | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Json] | None = None,
    device: str = "auto",
    speedups: str = "auto",
    threads: int | None = None,
    steps: int | None = None,
    rounds: int = ROUNDS,
    time_budget_s: float | None = None,
    price_per_hour: float | None = None,
    out: AnyPath | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
) -> Bench:
    """Measure what each change of the plan brings on this data and this machine, in training and evaluation.

    Every rung trains `steps` steps from the same start, by turns in `rounds` rounds; without `steps`, as many
    as fit into `time_budget_s` (five minutes) and at most the recipe's. `price_per_hour` of the machine,
    in any currency, adds how many examples one unit of it buys.

    Raises Refused (a GateError) when the full plan's score on the validation split is worse than plain
    PyTorch's by more than the task tolerates, MachineError when a speedup that was named doesn't run; the
    run directory has the figures then, too.
    """
    started = time.perf_counter()
    check(steps, rounds, time_budget_s, price_per_hour)
    target = hardware.detect(device)
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
    chosen = {"model": model, "epochs": epochs, "batch_size": batch_size}
    changes: dict[str, Json] = {k: v for k, v in chosen.items() if v is not None} | dict(settings or {})
    full, prepared = resolve(options, recipe=recipe, settings=changes)
    cache = cache_dir_of(options.cache_dir)
    with explain_out_of_memory(target):
        setup = Setup(full, prepared, target)
        steps_ahead = round(setup.trial(plain_plan(target)).full_size_steps_left)
        plan = planner.plan(setup, speedups, steps=steps_ahead, threads=threads, cache=cache)
        ladder = climb(
            setup,
            plan,
            steps=steps,
            rounds=rounds,
            budget_s=time_budget_s,
            ceilings=peak.probe(target, cache, decode),
            price_per_hour=price_per_hour,
        )
    environment = hardware.environment(target)
    about = prepared.to_json() | {"source": options.subject, "options": asdict(options)}
    run = Run.create(f"{prepared.name}-bench", out, ladder.recipe, about, environment)
    found = Bench(run=run, ladder=ladder, seconds=time.perf_counter() - started)
    with run.lock():
        run.write("check.json", prepared.findings)
        run.write("bench.json", ladder.to_json())
        _record(run, ladder, environment)
    report(run)
    for remark in ladder.remarks():
        warn(remark)
    if ladder.full.refused is not None:
        if speedups == "auto":  # the next training does without
            reason = f"the gate refused it in {run.path}: {ladder.full.refused}"
            PlanCache(cache, setup.key, threads).refuse(dict.fromkeys(ladder.guilty(), reason))
        raise Refused(found)
    _refuse_failed(ladder, speedups)
    return found


def _refuse_failed(ladder: Ladder, requested: str) -> None:
    """Only "auto" may pass over a speedup that fails."""
    for rung in ladder.rungs:
        if rung.failed and requested != "auto":
            raise MachineError(
                f"{rung.name.removeprefix('+ ')} doesn't run here: {rung.refused}",
                fix="Leave it out, or use --speedups auto.",
            )


def _record(run: Run, ladder: Ladder, environment: Environment) -> None:
    for rung in ladder.rungs:
        scores = {f"val_{name}": value for name, value in rung.scores.items()}
        for metric, phase in (("examples_per_s", rung.train), ("evaluated_per_s", rung.evaluate)):
            if phase is None:
                continue
            run.record(
                measurement(
                    metric,
                    phase.examples_per_s.median,
                    "1/s",
                    environment=environment,
                    recipe=ladder.recipe,
                    variant="+".join(rung.speedups) or "none",
                    scores=scores,
                    spread=phase.half_iqr,
                    count=phase.examples_per_s.count,
                )
            )


# --- for people -----------------------------------------------------------------------------


def table(found: Bench) -> Group:
    """One row a rung, for training, for evaluation and for the score: three tables, since one would be wider
    than many terminals."""
    from rich.console import Group

    ladder = found.ladder
    device = f"{ladder.device}, batches of {ladder.batch_size:,}, {ladder.rounds} rounds"
    return Group(
        device,
        "",
        _speeds("Training", [(rung, rung.train) for rung in ladder.rungs]),
        "",
        _speeds("Evaluation", [(rung, rung.evaluate) for rung in ladder.rungs]),
        "",
        _scores(ladder),
        "",
        f"Run:    {found.run.path}",
        f"Report: {found.run.path / 'report.html'}",
    )


# Title and text of each column; one without any text is left out.
_COLUMNS: tuple[tuple[str, Callable[[Phase], str]], ...] = (
    (
        "examples/s",
        lambda p: f"{p.examples_per_s.median:,.0f}" + ("" if p.half_iqr is None else f" ±{p.half_iqr:,.0f}"),
    ),
    ("× plain", lambda p: f"{p.gain.ratio:.2f}"),
    ("p50/p95 ms", lambda p: f"{_ms(p.step_ms_p50)}/{_ms(p.step_ms_p95)}"),
    ("memory", lambda p: "" if p.peak_memory_bytes is None else size(p.peak_memory_bytes)),
    ("ceiling", lambda p: "" if p.share_of_ceiling is None else f"{p.share_of_ceiling:.0%}"),
    ("J/example", lambda p: "" if p.joules_per_example is None else f"{p.joules_per_example:.3g}"),
    ("per price", lambda p: "" if p.examples_per_price is None else f"{p.examples_per_price:,.0f}"),
)


def _speeds(title: str, phases: Sequence[tuple[Rung, Phase | None]]) -> Table:
    shown = [(name, text) for name, text in _COLUMNS if any(phase is not None and text(phase) for _, phase in phases)]
    made = _table(title, *(name for name, _ in shown))
    for rung, phase in phases:
        made.add_row(rung.name, *(text(phase) if phase is not None else "failed" for _, text in shown))
    return made


def _scores(ladder: Ladder) -> Table:
    title = f"Validation {ladder.headline} after {ladder.steps:,} equal steps"
    made = _table(title, ladder.headline, "vs plain", "95 % interval", "gate")
    for rung in ladder.rungs:
        score = rung.scores.get(ladder.headline)
        change = rung.difference
        made.add_row(
            rung.name,
            "" if score is None else f"{score:.2%}",
            "" if change is None else f"{change.median:+.2%}",
            "" if change is None else f"{change.low:+.2%} … {change.high:+.2%}",
            "failed" if rung.failed else "refused" if rung.refused else "" if change is None else "passed",
        )
    return made


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    made.add_column("change", overflow="fold")
    for column in columns:
        made.add_column(column, justify="right", overflow="fold")
    return made


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
