"""The report of a run: from the records of its files to rows, sentences and charts.

The template decides how things look, this file what the report says and in which order. Each function takes records
and gives plain values, and works with any part of them absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from suanli.core.run import CROSS_VALIDATION
from suanli.core.types import SPLITS
from suanli.reporting import words
from suanli.reporting.charts import Chart, Point, Series, chart, thin
from suanli.reporting.files import RunFiles
from suanli.reporting.records import Data, Evaluation, Intervals, Metrics, Scores, Summary

ROWS = 20  # shown at once; the others fold away


@dataclass(frozen=True, kw_only=True)
class PrimaryScore:
    """The score by which runs are compared."""

    split: str
    name: str
    value: float | None
    text: str  # with its unit
    interval: str  # empty: not known
    higher_is_better: bool
    count: int | None


def primary_score(run: RunFiles) -> PrimaryScore | None:
    """From the test split; from validation, and so named, while test isn't evaluated."""
    for split in ("test", "val"):
        if (evaluation := run.evaluations.get(split)) is None or (name := evaluation.primary) is None:
            continue
        return PrimaryScore(
            split=split,
            name=name,
            value=evaluation.scores[name],
            text=words.score(evaluation.scores[name], run.unit_of(name)),
            interval=words.interval(evaluation.all_intervals.get(name), run.unit_of(name)),
            higher_is_better=evaluation.higher_is_better,
            count=evaluation.count,
        )
    return None


@dataclass(frozen=True, kw_only=True)
class ScoreColumn:
    name: str
    scores: Scores
    intervals: Intervals
    note: str = ""


def score_columns(evaluations: dict[str, Evaluation]) -> tuple[list[str], list[ScoreColumn]]:
    """Names and columns of the table of scores. An average over views is never mixed with one view."""
    columns: list[ScoreColumn] = []
    for split in (*reversed(SPLITS), CROSS_VALIDATION):
        if (evaluation := evaluations.get(split)) is None:
            continue
        name = SPLIT_NAMES[split]
        intervals = evaluation.all_intervals
        columns.append(ScoreColumn(name=f"{name}, single view", scores=evaluation.scores, intervals=intervals))
        if (leakage := evaluation.leakage) is not None:
            columns[-1] = replace(columns[-1], note=words.count(evaluation.count, "example"))
            other, which = (leakage.whole, "all") if leakage.excluded else (leakage.new, "new ones alone")
            if other is not None:
                note = f"{words.count(other.count, 'example')}, {which}"
                columns.append(
                    ScoreColumn(name=columns[-1].name, scores=other.scores, intervals=other.intervals, note=note)
                )
        if augmented := evaluation.with_augmentation:
            views = f"mean of {augmented.views} views" if augmented.views else "several views"
            name = f"{name}, test-time augmentation"
            columns.append(ScoreColumn(name=name, scores=augmented.scores, intervals=augmented.intervals, note=views))
        for one in evaluation.baselines:
            name = f"{SPLIT_NAMES[split]}, baseline"
            columns.append(ScoreColumn(name=name, scores=one.scores, intervals={}, note=one.description))
    return list(dict.fromkeys(key for column in columns for key in column.scores)), columns


SPLIT_NAMES = {"train": "Training", "val": "Validation", "test": "Test", CROSS_VALIDATION: "Cross-validation"}


@dataclass(frozen=True, kw_only=True)
class CountRow:
    name: str
    counts: tuple[int | None, ...]
    total: int
    share: float  # of the largest


def count_rows(data: Data) -> tuple[list[str], list[CountRow]]:
    """Splits, and the inputs of each class, or range of values, in them; of many classes the largest first."""
    splits = [split for split in SPLITS if split in data.counts]
    names = count_names(data)
    totals = {name: sum(data.counts[split].get(name, 0) for split in splits) for name in names}
    largest = max(totals.values(), default=0) or 1
    if data.classes and len(names) > ROWS:
        names.sort(key=lambda name: -totals[name])
    return splits, [
        CountRow(
            name=name,
            counts=tuple(data.counts[split].get(name, 0) for split in splits),
            total=totals[name],
            share=totals[name] / largest,
        )
        for name in names
    ]


def count_names(data: Data) -> list[str]:
    """As listed, then what was counted but isn't listed."""
    return list(dict.fromkeys([*data.classes, *(name for counts in data.counts.values() for name in counts)]))


def split_sizes(data: Data | None) -> dict[str, int]:
    if data is None:
        return {}
    sizes = data.sizes or {split: sum(counts.values()) for split, counts in data.counts.items()}
    return {split: sizes[split] for split in SPLITS if split in sizes}


def curves(metrics: Sequence[Metrics], name: str | None, unit: Callable[[str], str]) -> list[Chart]:
    """Loss, validation score and learning rate over epochs (over steps, if epochs aren't known). `unit` is that of a
    score."""
    by_epoch = all(metric.epoch is not None for metric in metrics)
    x_label = "epoch" if by_epoch else "step"

    def points(lines: Sequence[Metrics], field: str) -> list[Point]:
        return [(_place(m, by_epoch), _value(getattr(m, field))) for m in lines]

    training = [m for m in metrics if m.split is None]
    validation = [m for m in metrics if m.split is not None]
    name = name or next((key for m in validation for key in m.scores), "")
    percent = unit(name) == words.FRACTION
    scores = [(_place(m, by_epoch), _value(m.scores.get(name))) for m in validation]
    few = len(validation) <= 40
    x_range = (0.0, max((_place(m, by_epoch) for m in metrics), default=0.0))
    validation_loss = thin(points(validation, "loss"))
    charts = [
        chart(
            "Loss" if any(words.is_known(y) for _, y in validation_loss) else "Training loss",
            [
                Series(label="training", points=thin(points(training, "loss"))),
                Series(label="validation", points=validation_loss, colour="second", dots=few),
            ],
            x_label=x_label,
            x_range=x_range,
            y_range=(0.0, None),
        ),
        chart(
            f"Validation {words.with_spaces(name or 'score')}",
            [Series(label="validation", points=thin(scores), colour="second", dots=few)],
            x_label=x_label,
            x_range=x_range,
            y_label="" if percent else unit(name),
            show=_score_writer(scores) if percent else None,
            y_most=1.0 if percent else math.inf,
        ),
        chart(
            "Learning rate",
            [Series(label="learning rate", points=thin(points(training, "lr")))],
            x_label=x_label,
            x_range=x_range,
            y_range=(0.0, None),
        ),
        chart(
            "Examples per second",
            [Series(label="training", points=thin(points(training, "examples_per_s")))],
            x_label=x_label,
            x_range=x_range,
            y_range=(0.0, None),
        ),
    ]
    return [one for one in charts if one is not None]


def _place(metric: Metrics, by_epoch: bool) -> float:
    return metric.epoch if by_epoch and metric.epoch is not None else float(metric.step)


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def _score_writer(points: Sequence[Point]) -> Callable[[float], str]:
    values = [y for _, y in points if words.is_known(y)]
    close = max(values, default=0.0) - min(values, default=0.0) <= 0.1  # ticks at 2.5 points, or nearer
    return lambda value: words.percent(value, decimals=1 if close else 0)


@dataclass(frozen=True, kw_only=True)
class Phase:
    name: str
    seconds: float
    share: float


def phases(summary: Summary, evaluation: Evaluation | None) -> list[Phase]:
    """Where the time went; what belongs to no phase is 'other'."""
    seconds = {"evaluate": evaluation.seconds if evaluation else None, **summary.seconds}
    order = [*summary.seconds, "evaluate"]
    known = {name: s for name in order if words.is_known(s := seconds[name]) and s >= 0}
    total = known.pop("total", 0.0)
    rest = total - sum(known.values())
    if rest > 0.01 * total:
        known["other"] = rest
    all_s = sum(known.values()) or 1.0
    return [Phase(name=name, seconds=s, share=s / all_s) for name, s in known.items()]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What was trained, and how good it then was on validation."""

    name: str
    score: str
    seconds: float | None
    kept: bool


def stages(run: RunFiles) -> list[Stage]:
    """The head on frozen features, and all layers where they were trained, too; none for another training."""
    summary = run.summary
    if summary is None or (frozen := summary.frozen) is None:
        return []
    name = stage_metric(run)
    found = [
        Stage(name="head, on frozen features", **_stage(run, frozen.scores.get(name), frozen.seconds, frozen.kept))
    ]
    if summary.steps:
        after = all_layers_score(run)
        found.append(Stage(name="all layers", **_stage(run, after, summary.seconds.get("train"), not frozen.kept)))
    return found


def _stage(run: RunFiles, score: float | None, seconds: float | None, kept: bool) -> dict[str, Any]:
    text = words.score(score, run.unit_of(stage_metric(run))) if words.is_known(score) else words.UNKNOWN
    return {"score": text, "seconds": seconds, "kept": kept}


def stage_metric(run: RunFiles) -> str:
    """The score by which the stages of a training are compared."""
    scores = run.summary.frozen.scores if run.summary and run.summary.frozen else {}
    usual = run.task.metric.name if run.task else ""
    return usual if usual in scores else next(iter(scores), usual)


def all_layers_score(run: RunFiles) -> float | None:
    """On validation, of the weights that would be kept of a training of all layers."""
    name = stage_metric(run)
    scores = [m.scores.get(name) for m in run.metrics if m.split == "val" and m.step]
    known = [score for score in scores if words.is_known(score)]
    if run.recipe.get("early_stop") is None or run.task is None:
        return known[-1] if known else None
    metric = run.task.metric
    return max(known, key=lambda score: metric.gain(0.0, score), default=None)


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    name: str
    expected: str
    measured: str
    difference: str


def forecasts(summary: Summary) -> list[ForecastRow]:
    """What was expected before the first step, beside what was measured."""
    forecast = summary.forecast
    took_s = summary.seconds.get("train") if summary.status == "finished" else None
    rows = [
        ("training time", forecast.train_seconds, took_s, words.seconds),
        ("memory", forecast.memory_bytes, summary.peak_memory_bytes, words.memory),
        ("disk", forecast.disk_bytes, None, words.memory),
    ]
    return [
        ForecastRow(
            name=name, expected=show(expected), measured=show(measured), difference=_difference(expected, measured)
        )
        for name, expected, measured, show in rows
        if words.is_known(expected)
    ]


def _difference(expected: float | None, measured: float | None) -> str:
    if not words.is_known(expected) or not words.is_known(measured) or expected <= 0:
        return words.UNKNOWN
    return f"{100 * (measured / expected - 1):+.0f} %".replace("-", "−")
