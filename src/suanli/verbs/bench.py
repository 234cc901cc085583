"""bench: from plain PyTorch to the full plan, one change at a time, each with its speed, its cost and its score.

Leaves a run directory with bench.json, a line of the ledger for each figure, and the report, but no trained model. How
variants are measured is in `training/ablation.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from suanli.compute import planner
from suanli.compute.plan import check_request, plain_plan
from suanli.compute.plan_cache import PlanCache
from suanli.core.console import plural, size, warn
from suanli.core.errors import GateError, MachineError, UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import Run, measurement
from suanli.core.task import format_score
from suanli.core.types import AnyPath, Environment, Json, Measurement, Plan, Recipe
from suanli.data.decode import decode
from suanli.machine import peak
from suanli.machine.device import detect
from suanli.training.ablation import ROUNDS, run_ablation
from suanli.training.ablation_records import Ablation, EvaluationFigures, TrainingFigures, Variant
from suanli.training.forecast import explain_out_of_memory
from suanli.training.prepare import DataOptions, resolve
from suanli.training.setup import Setup
from suanli.verbs._bench_run import refuse_place, save_figures

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Measured: TypeAlias = TrainingFigures | EvaluationFigures


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The figures of a bench, and the run directory that has them."""

    run: Run
    ablation: Ablation
    seconds: float

    def to_json(self) -> dict[str, object]:
        scores = {f"val_{name}": value for name, value in self.ablation.full.scores.items()}
        return self.ablation.to_json() | {"run": str(self.run.path), "scores": scores}


class PlanRefused(GateError):
    """The full plan costs more of the score than the task tolerates; `result` has every figure."""

    def __init__(self, result: BenchResult) -> None:
        full, harmful = result.ablation.full, " and ".join(result.ablation.harmful_speedups())
        super().__init__(
            f"The full plan ({full.name}) is rejected: {full.refused}",
            fix=f"Train without {harmful or 'it'}; the figures are in {result.run.path}.",
        )
        self.result = result


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
    target: str | None = None,
    group_column: str | None = None,
    group_pattern: str | None = None,
    time_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
) -> BenchResult:
    """Measure what each change of the plan brings on this data and this machine, in training and evaluation.

    Every variant trains `steps` steps from the same start, in `rounds` rounds; without `steps`, as many as fit into
    `time_budget_s` (five minutes) and at most the recipe's. `price_per_hour` of the machine, in any currency, adds how
    many examples one unit of it buys.

    Raises PlanRefused (a GateError) when the full plan's score on the validation split is worse than plain PyTorch's
    by more than the task tolerates, MachineError when a speedup that was named doesn't run; the run directory has the
    figures then, too.
    """
    started = time.perf_counter()
    check_options(steps, rounds, time_budget_s, price_per_hour)
    machine = detect(device)
    check_request(speedups, machine, threads)
    refuse_place(data, out)
    columns = {
        "input_column": input_column,
        "label_column": label_column,
        "target": target,
        "group_column": group_column,
        "group_pattern": group_pattern,
        "time_column": time_column,
    }
    options = DataOptions.of(data, data_dir=data_dir, cache_dir=cache_dir, max_bad=max_bad, **columns)
    changes = {"model": model, "epochs": epochs, "batch_size": batch_size}
    changes = {name: value for name, value in changes.items() if value is not None} | dict(settings or {})
    recipe, prepared = resolve(options, recipe=recipe, settings=changes)
    cache = cache_dir_of(options.cache_dir)
    with explain_out_of_memory(machine):
        setup = Setup(recipe, prepared, machine)
        plan = _plan(setup, speedups, threads, cache, steps)
        ceilings = peak.probe(machine, cache, decode)
        ablation, trained = run_ablation(
            setup, plan, ceilings, steps=steps, rounds=rounds, budget_s=time_budget_s, price_per_hour=price_per_hour
        )
    measurements = partial(_measurements, ablation, trained)
    figures = ablation.to_json()
    run = save_figures(
        "bench", figures, measurements, out, recipe=trained, prepared=prepared, options=options, device=machine
    )
    result = BenchResult(run=run, ablation=ablation, seconds=time.perf_counter() - started)
    _apply_gate(result, speedups, PlanCache(cache, setup.key, threads))
    return result


def _plan(setup: Setup, speedups: str, threads: int | None, cache: Path, measured_steps: int | None) -> Plan:
    loop = setup.trial(plain_plan(setup.device))
    if measured_steps is None and loop.steps < 2:
        raise UsageError(
            "The training has 1 step; bench needs at least 2.", fix="Raise --epochs or lower --batch-size."
        )
    return planner.plan(setup, speedups, steps=round(loop.full_size_steps_left), threads=threads, cache=cache)


def check_options(steps: int | None, rounds: int, budget_s: float | None, price_per_hour: float | None) -> None:
    """Raises UsageError for values that can't be used."""
    if rounds < 1:
        raise UsageError(f"--rounds can't be {rounds}.", fix="Give 1 or more; 5 show a spread.")
    if steps is not None and steps < 2:
        raise UsageError(f"--steps can't be {steps}.", fix="Give 2 or more: the first ones only warm up.")
    if budget_s is not None and not budget_s > 0:
        raise UsageError(f"--time-budget-s can't be {budget_s}.", fix="Give a number of seconds above 0.")
    if price_per_hour is not None and not (price_per_hour > 0 and math.isfinite(price_per_hour)):
        raise UsageError(f"--price-per-hour can't be {price_per_hour}.", fix="Give what an hour costs, above 0.")


def _apply_gate(result: BenchResult, requested: str, plans: PlanCache) -> None:
    """Raises PlanRefused, or MachineError for a speedup that doesn't run: only "auto" may skip it."""
    ablation = result.ablation
    for remark in ablation.remarks():
        warn(remark)
    if ablation.full.refused is not None:
        if requested == "auto":  # the next training does without
            reason = f"the gate rejected it in {result.run.path}: {ablation.full.refused}"
            plans.refuse(dict.fromkeys(ablation.harmful_speedups(), reason))
        raise PlanRefused(result)
    for variant in ablation.variants:
        if variant.failed and requested != "auto":
            raise MachineError(
                f"{variant.name.removeprefix('+ ')} doesn't run here: {variant.refused}",
                fix="Leave it out, or use --speedups auto.",
            )


def _measurements(ablation: Ablation, recipe: Recipe, environment: Environment) -> Iterator[Measurement]:
    for variant in ablation.variants:
        for metric, figures in (("examples_per_s", variant.train), ("evaluated_per_s", variant.evaluate)):
            if figures is not None:
                yield measurement(
                    metric,
                    figures.examples_per_s.median,
                    "1/s",
                    environment=environment,
                    recipe=recipe,
                    variant="+".join(variant.speedups) or "none",
                    scores={f"val_{name}": value for name, value in variant.scores.items()},
                    spread=figures.examples_per_s.half_iqr,
                    count=figures.rounds,
                )


# --- for people -----------------------------------------------------------------------------


def table(result: BenchResult) -> Group:
    """One row a variant, for training, for evaluation and for the score: three tables, since one would be wider than
    many terminals."""
    from rich.console import Group

    ablation = result.ablation
    device = f"{ablation.device}, batches of {ablation.batch_size:,}, {plural(ablation.rounds, 'round')}"
    return Group(
        device,
        "",
        _speeds("Training", [(variant, variant.train) for variant in ablation.variants]),
        "",
        _speeds("Evaluation", [(variant, variant.evaluate) for variant in ablation.variants]),
        "",
        _scores(ablation),
        "",
        f"Run:    {result.run.path}",
        f"Report: {result.run.path / 'report.html'}",
    )


# Title and text of each column; one without any text is left out.
_COLUMNS: tuple[tuple[str, Callable[[Measured], str]], ...] = (
    (
        "examples/s",
        lambda f: f"{f.examples_per_s.median:,.0f}" + _plus_minus(f.examples_per_s.half_iqr),
    ),
    ("× plain", lambda f: f"{f.ratio.median:.2f}"),
    ("p50/p95 ms", lambda f: "/".join(map(_ms, f.percentiles_ms))),
    ("memory", lambda f: "" if f.peak_memory_bytes is None else size(f.peak_memory_bytes)),
    ("ceiling", lambda f: "" if f.share_of_ceiling is None else f"{f.share_of_ceiling:.0%}"),
    ("J/example", lambda f: "" if f.joules_per_example is None else f"{f.joules_per_example:.3g}"),
    ("per price", lambda f: "" if f.examples_per_price is None else f"{f.examples_per_price:,.0f}"),
)


def _plus_minus(half_iqr: float | None) -> str:
    return "" if half_iqr is None else f" ±{half_iqr:,.0f}"


def _speeds(title: str, measured: Sequence[tuple[Variant, Measured | None]]) -> Table:
    columns = [(name, text) for name, text in _COLUMNS if any(f is not None and text(f) for _, f in measured)]
    table = _table(title, *(name for name, _ in columns))
    for variant, figures in measured:
        table.add_row(variant.name, *(text(figures) if figures is not None else "failed" for _, text in columns))
    return table


def _scores(ablation: Ablation) -> Table:
    unit = ablation.unit
    title = f"Validation {ablation.metric} after {ablation.steps:,} equal steps"
    table = _table(title, ablation.metric, "vs plain", "95 % interval", "gate")
    for variant in ablation.variants:
        score = variant.scores.get(ablation.metric)
        change = variant.difference
        table.add_row(
            variant.name,
            "" if score is None else format_score(score, unit),
            "" if change is None else format_score(change.median, unit, "+"),
            "" if change is None else f"{format_score(change.low, unit, '+')} … {format_score(change.high, unit, '+')}",
            variant.verdict or ("" if change is None else "passed"),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    table.add_column("change", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
