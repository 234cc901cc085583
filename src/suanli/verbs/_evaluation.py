"""What `evaluate` returns and writes, and how people see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NotRequired, TypedDict

from suanli.core.baselines import Baseline
from suanli.core.console import plural
from suanli.core.notebook import html_table
from suanli.core.overlaps import Contamination
from suanli.core.task import Metric, format_number, format_score
from suanli.core.types import Json
from suanli.data.samples import AnswerValues, PreviewValues, View
from suanli.verbs._folds import Folds
from suanli.verbs._leakage import Leakage


class AugmentedScores(TypedDict):
    """Scores of the mean over several views of each input."""

    views: int
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]


class ExampleSaliency(TypedDict):
    """What an answer rests on, as a picture or as words with weights from -1 to 1."""

    method: str
    picture: PreviewValues | None
    words: Sequence[tuple[str, float]]


class Example(TypedDict):
    """One input and its answer."""

    name: str
    expected: AnswerValues
    answer: AnswerValues
    error: float  # how wrong the answer is; 0: right
    view: View
    preview: PreviewValues
    saliency: NotRequired[ExampleSaliency]  # of mistakes, where the network can be explained


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of one model on one split; fractions are not percent."""

    split: str
    count: int
    metric: str  # the primary one of the scores; "headline" in the file
    higher_is_better: bool  # of the metric
    scores: Mapping[str, float | None]  # None: not defined for these examples
    units: Mapping[str, str]  # of every score: "fraction", "nats"; that of the metric is "unit" in the file
    # 95 %, of every score that is defined; that of the metric is "interval" in the file.
    intervals: Mapping[str, tuple[float, float]]
    with_augmentation: AugmentedScores | None
    leakage: Leakage | None = None  # None: no example is in training, or the run doesn't say what it was trained on
    folds: Folds | None = None  # None: one model answered for all examples
    details: Mapping[str, object]  # what the task adds for the report: classes, confusion
    mistakes: Sequence[Example]  # the worst first
    samples: Sequence[Example]
    seconds: float
    remarks: Sequence[str] = ()  # of the task, on its scores
    contamination: Contamination | None = None  # None: no weights are known to have seen the examples
    baselines: Sequence[Baseline] = ()

    def as_metric(self) -> Metric:
        """The primary metric, to write amounts of it."""
        unit = self.units[self.metric]
        return Metric(name=self.metric, tolerance=0, unit=unit, higher_is_better=self.higher_is_better)

    def __repr__(self) -> str:
        score = format_score(self.scores[self.metric], self.units[self.metric])
        return f"Evaluation({self.split}, {plural(self.count, 'example')}, {self.metric} {score})"

    def _repr_html_(self) -> str:
        rows = [
            (name, _row(value, self.intervals.get(name), self.units[name]).strip())
            for name, value in self.scores.items()
        ]
        return html_table(f"{self.split}, {plural(self.count, 'example')}", rows)

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        values["headline"] = values.pop("metric")
        values["unit"] = self.units[self.metric]
        values["interval"] = self.intervals[self.metric]
        details: dict[str, Json] = values.pop("details")
        assert not values.keys() & details.keys(), "a task's figures have names of their own"
        return values | details


def table(evaluation: Evaluation) -> str:
    """The scores as text for people."""
    metric, augmented = evaluation.metric, evaluation.with_augmentation
    leakage, folds = evaluation.leakage, evaluation.folds
    lines = [f"{evaluation.split}, {plural(evaluation.count, 'example')}"]
    if folds is not None:
        again = f", {folds['repetitions']} repetitions" if folds["repetitions"] > 1 else ""
        lines[0] += f", each predicted by a model that hasn't seen it ({folds['count']} folds{again})"
    if leakage is not None and leakage["excluded"]:
        lines[0] += " that are not in training"
    lines += _score_lines(evaluation)
    lines += [f"  {one.describe(evaluation.as_metric())}" for one in evaluation.baselines]
    lines += [f"  {remark}" for remark in evaluation.remarks]
    if evaluation.contamination is not None:
        lines.append(f"  {evaluation.contamination.describe()}")
    if augmented is not None:
        row = _row(augmented["scores"][metric], augmented["intervals"][metric], evaluation.units[metric])
        lines.append(f"  with test-time augmentation ({augmented['views']} views): {metric} {row}")
    if folds is not None:
        low, high = (_number(score(folds["scores"]), evaluation.units[metric]) for score in (min, max))
        lines.append(f"  range over the models: {metric} {low} to {high}")
    if leakage is not None:
        other = leakage["whole"] if leakage["excluded"] else leakage["new"]
        leaked = leakage["exact"] + leakage["near"]
        if other is not None:
            row = _row(other["scores"][metric], other["intervals"][metric], evaluation.units[metric])
            which = f"all {other['count']:,} examples" if leakage["excluded"] else f"the {other['count']:,} others"
            lines.append(f"  {which}: {metric} {row}")
        if leakage["excluded"]:
            lines[-1] += f"; too high, since {leaked:,} are training examples"
        else:
            lines.append(f"  {leaked:,} of these are training examples: the scores are too high")
    return "\n".join(lines)


def _score_lines(evaluation: Evaluation) -> list[str]:
    """A line for each score, in columns: the model's, its interval, those of the baselines. Fits 80 characters."""
    baselines = evaluation.baselines
    rows = [("", "model", "95 % interval", *(one.name for one in baselines))]
    for name, value in evaluation.scores.items():
        unit, bounds = evaluation.units[name], evaluation.intervals.get(name)
        interval = (
            "" if value is None or bounds is None else f"{_number(bounds[0], unit)} to {_number(bounds[1], unit)}"
        )
        if unit != "fraction":
            interval = f"{interval} {unit}".strip()
        others = ["" if value is None else _number(one.scores.get(name), unit) for one in baselines]
        rows.append((name, _number(value, unit), interval, *others))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, score, interval, *others in rows:
        cells = [f"{name:<{widths[0]}}", f"{score:>{widths[1]}}", f"{interval:<{widths[2]}}"]
        cells += [f"{text:>{width}}" for text, width in zip(others, widths[3:], strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    if baselines:
        lines.insert(0, f"{'':{sum(widths[:3]) + 8}}baseline{'s' if len(baselines) > 1 else ''}:")
    return lines


def _row(value: float | None, interval: tuple[float, float] | None, unit: str) -> str:
    """A score and its interval, with the unit behind both."""
    if value is None or interval is None:
        return "n/a"
    score, low, high = (_number(number, unit) for number in (value, *interval))
    return f"{score}   95 % interval {low} to {high} {'' if unit == 'fraction' else unit}".rstrip()


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if unit == "fraction" else format_number(value)
