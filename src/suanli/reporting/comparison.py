"""Compares runs with the first of them: recipe, data, plan and machine; scores and their differences; curves; cost.

Where two runs were evaluated on the same examples, the difference of their scores is paired: what is hard for both
cancels out. Its interval covers the choice of examples, not the randomness of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from suanli.core import compare
from suanli.core.errors import DamagedFile
from suanli.core.run import Run
from suanli.core.scored_examples import ScoredExamples, pair
from suanli.core.task import Metric, Task
from suanli.core.types import AnyPath, Json
from suanli.models.model_folder import build_task, read_card
from suanli.reporting import words
from suanli.reporting.files import RunFiles, read_run
from suanli.reporting.records import Metrics
from suanli.reporting.views import all_layers_score, split_sizes, stage_metric

SPLITS = ("test", "val", "train")  # the first that all runs have is compared
SERIES = 1000  # points of a curve in JSON, at most

Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A field whose values differ; one value a run, None where it isn't known."""

    name: str
    values: tuple[Json, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    name: str
    unit: str
    values: tuple[float | None, ...]  # one a run
    intervals: tuple[Bounds | None, ...]  # 95 %


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of one run's scores over the first one's."""

    run: str
    paired: bool
    note: str  # why it isn't paired, or what to know of the pairs
    changes: Mapping[str, tuple[float, float, float]]  # by score: the difference and the ends of its 95 % interval
    verdict: str  # "better", "worse" or "no clear difference", in the primary score; empty: not known


@dataclass(frozen=True, kw_only=True)
class Cost:
    run: str
    train_seconds: float | None
    examples_per_s: float | None
    parameters: int | None
    model_bytes: int | None
    engine: str | None  # that `optimize` chose; its latency is of one example
    engine_latency_s: float | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (epoch, value) of one run; a value that isn't known is left out."""

    run: str
    loss: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]  # of `Comparison.validation_metric`


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first of `runs` is the one that the others are compared with."""

    runs: tuple[str, ...]
    differences: Mapping[str, tuple[Row, ...]]  # of "recipe", "data", "training", "plan", "machine"; only what differs
    split: str | None  # of the scores; None: no split was evaluated in all runs
    metric: str | None  # the primary score; None: the runs have different ones
    higher_is_better: bool
    scores: tuple[Score, ...]
    changes: tuple[Change, ...]  # one for each run but the first
    validation_metric: Metric | None  # of the curves; None: the runs have different ones, and each curve its own
    curves: tuple[Curve, ...]
    costs: tuple[Cost, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        return asdict(self)

    def __repr__(self) -> str:
        found = [f"{change.run} {change.verdict}" for change in self.changes if change.verdict]
        return f"Comparison({', '.join([self.runs[0], *(found or self.runs[1:])])})"


def compare_runs(paths: Sequence[AnyPath]) -> Comparison:
    """Raises DataError where no run is, DamagedFile for files that can't be used."""
    runs = [read_run(path) for path in paths]
    names = tuple(str(run.path) for run in runs)
    split = next((split for split in SPLITS if all(split in run.evaluations for run in runs)), None)
    primaries = {run.evaluations[split].primary for run in runs} if split else set()
    metric = next(iter(primaries)) if len(primaries) == 1 else None
    higher = runs[0].evaluations[split].higher_is_better if split else True
    validated = _validation_metric(runs, metric)
    return Comparison(
        runs=names,
        differences=_differences(runs),
        split=split,
        metric=metric,
        higher_is_better=higher,
        scores=tuple(_scores(runs, split)) if split else (),
        changes=tuple(_changes(runs, split, metric, higher)) if split else (),
        validation_metric=validated,
        curves=tuple(_curve(run, validated.name if validated else None) for run in runs),
        costs=tuple(map(_cost, runs)),
        remarks=tuple(_remarks(runs, split, metric)),
    )


# --- what differs ---------------------------------------------------------------------------


def _differences(runs: Sequence[RunFiles]) -> dict[str, tuple[Row, ...]]:
    parts: dict[str, Callable[[RunFiles], Mapping[str, Json]]] = {
        "recipe": lambda run: _flatten(run.recipe),
        "data": _data,
        "training": _stages,
        "plan": _plan,
        "machine": _machine,
    }
    return {name: _differing([read(run) for run in runs]) for name, read in parts.items()}


def _differing(sides: Sequence[Mapping[str, Json]]) -> tuple[Row, ...]:
    names = dict.fromkeys(name for side in sides for name in side)
    rows = (Row(name=name, values=tuple(side.get(name) for side in sides)) for name in names)
    return tuple(row for row in rows if any(value != row.values[0] for value in row.values))


def _flatten(values: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _data(run: RunFiles) -> dict[str, Json]:
    data = run.data
    if data is None:
        return {}
    sizes = {f"{split} examples": count for split, count in split_sizes(data).items()}
    values = {"name": data.name, "source": data.source, "classes": list(data.classes) or None, **sizes}
    return values | {"model input": list(data.input_shape), "digest": data.digest}


def _stages(run: RunFiles) -> dict[str, Json]:
    """Of a run that began with frozen features, the scores on validation of both models."""
    if run.summary is None or (frozen := run.summary.frozen) is None:
        return {}
    score = f"validation {words.with_spaces(stage_metric(run))}"
    return {
        f"{score}, frozen features": frozen.scores.get(stage_metric(run)),
        f"{score}, all layers": all_layers_score(run),
        "kept": "frozen features" if frozen.kept else "all layers",
    }


def _plan(run: RunFiles) -> dict[str, Json]:
    plan = run.summary.plan if run.summary else None
    if plan is None:
        return {}
    return {"speedups": list(plan.speedups), "threads": plan.threads, "origin": plan.origin}


def _machine(run: RunFiles) -> dict[str, Json]:
    here = run.environment
    if here is None:
        return {}
    names = ("cpu", "cores", "threads", "os", "python", "driver", "cuda", "cudnn")
    versions = {f"{package} version": version for package, version in here.versions.items()}
    return {"device": here.device.name, **{name: getattr(here, name) for name in names}, **versions}


# --- scores ---------------------------------------------------------------------------------


def _scores(runs: Sequence[RunFiles], split: str) -> Iterable[Score]:
    evaluations = [run.evaluations[split] for run in runs]
    for name in dict.fromkeys(name for one in evaluations for name in one.scores):
        unit = next(run.unit_of(name) for run, one in zip(runs, evaluations, strict=True) if name in one.scores)
        yield Score(
            name=name,
            unit=unit,
            values=tuple(_known(one.scores.get(name)) for one in evaluations),
            intervals=tuple(_bounds(one.all_intervals.get(name)) for one in evaluations),
        )


def _changes(runs: Sequence[RunFiles], split: str, metric: str | None, higher: bool) -> Iterable[Change]:
    first, scored = runs[0], [ScoredExamples.read(Run(run.path).scored_examples(split)) for run in runs]
    for run, examples in zip(runs[1:], scored[1:], strict=True):
        pairs = _pair(first, scored[0], run, examples)
        if isinstance(pairs, str):
            note, changes = pairs, _unpaired(first, run, split)
        else:
            note, changes = "", _paired(_task(first), *pairs, path=run.path)
            if pairs[0].preprocess != pairs[1].preprocess:
                note = "the two models preprocess their inputs differently; examples were matched by name and target"
        yield Change(
            run=str(run.path),
            paired=not isinstance(pairs, str),
            note=note,
            changes=changes,
            verdict=_verdict(changes.get(metric) if metric else None, higher),
        )


def _pair(
    first: RunFiles, before: ScoredExamples | None, run: RunFiles, after: ScoredExamples | None
) -> tuple[ScoredExamples, ScoredExamples] | str:
    """The examples of both in the same order, or why the difference can't be a paired one."""
    missing = [str(r.path) for r, examples in ((first, before), (run, after)) if examples is None]
    if missing:
        return f"{' and '.join(missing)} has no scores of single examples: evaluate again"
    if first.task is None or run.task is not first.task:
        return "their tasks differ"
    assert before is not None
    assert after is not None
    return pair(before, after)


def _task(run: RunFiles) -> Task:
    card = read_card(run.path / "model")
    return build_task(card["task"], card["classes"], card.get("task_settings", {}))


def _paired(
    task: Task, before: ScoredExamples, after: ScoredExamples, *, path: Path
) -> dict[str, tuple[float, float, float]]:
    groups = before.groups if before.groups is not None else after.groups
    try:
        return compare.changes(task, before.records, after.records, groups)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"The records of {path} aren't those of {task.name} ({error}).", fix="Evaluate both runs again."
        ) from error


def _unpaired(first: RunFiles, run: RunFiles, split: str) -> dict[str, tuple[float, float, float]]:
    """Of the scores that both have, with an interval."""
    one, other = first.evaluations[split], run.evaluations[split]
    changes = {}
    for name, value in one.scores.items():
        before, after = _known(value), _known(other.scores.get(name))
        sides = _bounds(one.all_intervals.get(name)), _bounds(other.all_intervals.get(name))
        if before is not None and after is not None and sides[0] and sides[1]:
            changes[name] = compare.independent_change(before, sides[0], after, sides[1])
    return changes


def _verdict(change: tuple[float, float, float] | None, higher: bool) -> str:
    if change is None:
        return ""
    _, low, high = change
    if low <= 0 <= high:
        return "no clear difference"
    return "better" if (low > 0) == higher else "worse"


def _remarks(runs: Sequence[RunFiles], split: str | None, metric: str | None) -> Iterable[str]:
    if split is None:
        without = [run.path for run in runs if "test" not in run.evaluations]
        yield f"No scores to compare: not evaluated yet: {', '.join(map(str, without))} (suanli evaluate RUN)."
    elif metric is None:
        yield "The runs have different primary metrics, so no score says which run is better."
    for run in runs if split else ():
        if (found := run.evaluations[split or ""].contamination) is not None:
            yield f"{run.path}: {found.describe()}"
    if split in ("val", "train"):
        yield "Not all runs were evaluated on the test split, so the scores are of a split that training has used."


def _known(value: float | None) -> float | None:
    return value if words.is_known(value) else None


def _bounds(bounds: tuple[float | None, float | None] | None) -> Bounds | None:
    if bounds is None:
        return None
    low, high = map(_known, bounds)
    return None if low is None or high is None else (low, high)


# --- curves and cost ------------------------------------------------------------------------


def _validation_metric(runs: Sequence[RunFiles], metric: str | None) -> Metric | None:
    """The primary score, or that of the task of runs that aren't evaluated yet."""
    names = {metric or (run.task.metric.name if run.task else None) for run in runs}
    name = next(iter(names)) if len(names) == 1 else None
    return runs[0].metric(name) if name is not None else None


def _curve(run: RunFiles, metric: str | None) -> Curve:
    loss = [(m.epoch, m.loss) for m in run.metrics if m.split is None]
    scores = [(m.epoch, _validation_score(m, metric)) for m in run.metrics if m.split is not None]
    return Curve(run=str(run.path), loss=_points(loss), validation=_points(scores))


def _validation_score(line: Metrics, metric: str | None) -> float | None:
    return line.scores.get(metric) if metric else next(iter(line.scores.values()), None)


def _points(points: Sequence[tuple[float | None, float | None]]) -> tuple[tuple[float, float], ...]:
    known = [(x, y) for x, y in points if words.is_known(x) and words.is_known(y)]
    step = math.ceil(len(known) / SERIES) or 1
    return tuple(known[::step])


def _cost(run: RunFiles) -> Cost:
    summary, search = run.summary, run.engines.search if run.engines else None
    weights = run.path / "model" / "weights.safetensors"
    latency = search.chosen.latency() if search else None
    return Cost(
        run=str(run.path),
        train_seconds=_known(summary.seconds.get("train")) if summary else None,
        examples_per_s=_known(summary.examples_per_s) if summary else None,
        parameters=summary.parameters if summary else None,
        model_bytes=weights.stat().st_size if weights.is_file() else None,
        engine=search.chosen.name if search else None,
        engine_latency_s=latency.p50_s if latency else None,
    )
