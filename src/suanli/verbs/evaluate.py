"""evaluate: the scores of a trained model.

In float32 without speedups, so that the figure is the reference for all faster ways of computing. Single-view;
test-time augmentation is a separate, named figure.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypedDict

import numpy as np
import torch

from suanli.compute.infer import infer
from suanli.core.compare import intervals
from suanli.core.console import Progress, say, warn
from suanli.core.errors import DataError, UsageError, unknown
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import Run, measurement
from suanli.core.schema import Arrays, Geometry, Tensors, example_of
from suanli.core.task import Answer, format_number
from suanli.core.types import SPLITS, AnyPath, Device, Json, Source, Split, Step
from suanli.data.cache import prepare_source
from suanli.data.checks import refuse_bad_share
from suanli.data.loader import Feed
from suanli.machine.device import cores, detect, environment
from suanli.models.model_folder import SavedModel, add_scores, load_model
from suanli.training.augment import compose
from suanli.training.prepare import DataOptions, resolve
from suanli.training.validation import validation_batch_size

LISTED = 24  # samples, and mistakes, that are kept with their pictures
TOP = 20  # classes, or boxes, of each of their answers


class AugmentedScores(TypedDict):
    """Scores of the mean over several views of each input."""

    views: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class Preview(TypedDict):
    media_type: str
    base64: str


class AnswerValues(TypedDict):
    """The fields of an `Answer` that the report draws."""

    kind: str
    text: str
    values: Mapping[str, Json]


class View(TypedDict):
    """What a preview shows: a coordinate c of axis a of the input is c * scale[a] + shift[a] there."""

    size: Sequence[int]  # of the cached input
    scale: Sequence[float]
    shift: Sequence[float]


class Example(TypedDict):
    """One input and its answer."""

    name: str
    expected: AnswerValues
    answer: AnswerValues
    error: float  # how wrong the answer is; 0: right
    view: View
    preview: Preview


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of one model on one split; fractions are not percent."""

    split: str
    count: int
    metric: str  # the primary one of the scores; "headline" in the file
    higher_is_better: bool  # of the metric
    scores: Mapping[str, float]
    units: Mapping[str, str]  # of every score: "fraction", "nats"; that of the metric is "unit" in the file
    intervals: Mapping[str, tuple[float, float]]  # 95 %, of every score; that of the metric is "interval" in the file
    with_augmentation: AugmentedScores | None
    details: Mapping[str, object]  # what the task adds for the report: classes, confusion
    mistakes: Sequence[Example]  # the worst first
    samples: Sequence[Example]
    seconds: float

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        values["headline"] = values.pop("metric")
        values["unit"] = self.units[self.metric]
        values["interval"] = self.intervals[self.metric]
        details: dict[str, Json] = values.pop("details")
        return values | details


def evaluate(
    run: AnyPath,
    *,
    split: str = "test",
    data: AnyPath | None = None,
    device: str = "auto",
    augmented_views: bool = True,
    cache_dir: AnyPath | None = None,
    trust_code: bool = False,
) -> Evaluation:
    """Evaluate the model of a run on one of its splits, or on another data set.

    Writes evaluation/<split>.json and the scores into model.json; with `data`, nothing is written.
    `augmented_views` adds the figure with test-time augmentation where the recipe's augmentations
    have views. Raises DataError when there is no model yet or the other data has other targets.
    """
    started = time.perf_counter()
    run = Run.open(run)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    saved = load_model(run.model_path, trust_code=trust_code)
    options = DataOptions.of_run(run, cache_dir=cache_dir)
    if data is None:
        examples = _own_split(run, saved, options, split)
    else:
        examples = _other_data(saved, options, data, split)
    target = detect(device)
    evaluation = _Evaluator(saved, examples, target).evaluate(split, augmented_views)
    evaluation = replace(evaluation, seconds=time.perf_counter() - started)  # with loading
    if data is None:
        _write(run, evaluation, target, saved)
    return evaluation


def _own_split(run: Run, saved: SavedModel, options: DataOptions, split: str) -> Split:
    _, prepared = resolve(options, recipe=saved.recipe, settings={}, announce=False)
    if prepared.digest != run.data["digest"]:
        raise DataError(
            "The data has changed since this model was trained, so its test split may contain training inputs.",
            fix="Put the data back as it was, or evaluate it as new data with --data.",
        )
    return prepared.splits[split]


def _other_data(saved: SavedModel, options: DataOptions, data: AnyPath, split: str) -> Split:
    """Labelled inputs that the run has not seen: those of `split`, or all where nothing is split."""
    source = _find_other_source(options, data, saved.task.annotation)
    if source.kind != saved.preprocess.kind:
        raise DataError(f"The model reads {saved.preprocess.kind}, the data is {source.kind}.", fix="Use other data.")
    task = saved.task
    if source.annotation != task.annotation:
        raise DataError(
            f"The model learned {task.annotation!r} targets, the data has {source.annotation!r}.", fix="Use other data."
        )
    unknown_class = sorted(set(source.classes) - set(task.classes))
    if unknown_class:
        raise DataError(
            f"The model doesn't know the class {unknown_class[0]!r}; it knows {', '.join(task.classes[:10])}.",
            fix="Rename the classes of the data to those of the model.",
        )
    examples = [replace(one, split="test") for one in source.examples if one.split in (split, None)]
    source = replace(source, examples=examples, classes=task.classes, fingerprint=f"{source.fingerprint}:{split}")
    prepared = prepare_source(
        source, saved.recipe, cache_dir_of(options.cache_dir), threads=cores(), preprocess=saved.preprocess
    )
    refuse_bad_share(prepared.findings, options.max_bad)
    return prepared.splits["test"]


def _find_other_source(options: DataOptions, data: AnyPath, annotation: str) -> Source:
    """Data that isn't divided needs no times, and it may have no groups."""
    options = replace(options, subject=str(data), time_column=None)
    try:
        return options.find_source(annotation)
    except UsageError as error:
        if options.group_column is None and options.group_pattern is None:
            raise
        source = replace(options, group_column=None, group_pattern=None).find_source(annotation)
        warn(f"{data} is evaluated without groups: {error}")
        return source


def _write(run: Run, evaluation: Evaluation, device: Device, saved: SavedModel) -> None:
    here = environment(device)
    with run.lock():
        run.write(f"evaluation/{evaluation.split}.json", evaluation.to_json())
        add_scores(run.model_path, evaluation.split, evaluation.scores)
        for name, value in evaluation.scores.items():
            run.record(
                measurement(
                    f"{evaluation.split}_{name}",
                    value,
                    evaluation.units[name],
                    environment=here,
                    recipe=saved.recipe,
                    variant="reference",
                    scores=evaluation.scores,
                    count=evaluation.count,
                )
            )


class _Evaluator:
    """One model on one split."""

    def __init__(self, saved: SavedModel, split: Split, device: Device) -> None:
        self.saved, self.split, self.device = saved, split, device
        self.step = Step(model=saved.module.to(device.torch_name))
        self.feed = Feed(split, device)
        self.batch_size = validation_batch_size(saved.recipe)

    def evaluate(self, name: str, augmented_views: bool) -> Evaluation:
        """`name`: of the split. Raises DataError for no examples."""
        started = time.perf_counter()
        task, split = self.saved.task, self.split
        if len(split) == 0:
            raise DataError("The split has no examples.", fix="Choose another split.")
        say(f"evaluating {len(split):,} examples")
        predictions = infer(self.step, self.saved.preprocess, task, self._inputs("Evaluating"))
        records = task.records(predictions, split.targets)
        scores, errors = task.scores(records), task.errors(records)
        worst = np.argsort(-errors, kind="stable")[:LISTED]
        sample = np.random.default_rng(0).permutation(len(split))[:LISTED]
        return Evaluation(
            split=name,
            count=len(split),
            metric=task.metric.name,
            higher_is_better=task.metric.higher_is_better,
            scores=scores,
            units={score: task.unit_of(score) for score in scores},
            intervals=intervals(task, records, split.groups),
            with_augmentation=self._score_views() if augmented_views and task.averages_views else None,
            details=task.evaluate(records),
            mistakes=[self._example(int(i), predictions, errors[i]) for i in worst if errors[i] > 0],
            samples=[self._example(int(i), predictions, errors[i]) for i in sample],
            seconds=time.perf_counter() - started,
        )

    def _inputs(self, title: str) -> Iterator[Tensors]:
        done = 0
        with Progress(title, len(self.feed)) as progress:
            for inputs, _, positions in self.feed.in_order(self.batch_size):
                yield inputs
                done += len(positions)
                progress.update(done)

    def _score_views(self) -> AugmentedScores | None:
        """Scores over the mean of several views; None where the recipe's augmentations have none."""
        task, preprocess = self.saved.task, self.saved.preprocess
        pipeline = compose(self.saved.recipe.augment, preprocess.roles, task.targets)
        views = len(pipeline.views(preprocess.to_model(self.feed.inputs(torch.arange(1)))))
        if views == 1:
            return None
        inputs = self._inputs(f"Evaluating {views} views")
        records = task.records(infer(self.step, preprocess, task, inputs, views=pipeline.views), self.split.targets)
        return {
            "views": views,
            "scores": task.scores(records),
            "intervals": intervals(task, records, self.split.groups),
        }

    def _example(self, position: int, predictions: Arrays, error: float) -> Example:
        task, split = self.saved.task, self.split
        geometry = Geometry.from_array(split.geometries[position])
        inputs = example_of(split.inputs, int(split.index[position]))
        size = next(iter(inputs.values())).shape[: len(geometry.size)]
        preview = self.saved.preprocess.preview(inputs)
        return {
            "name": split.names[position],
            "expected": _to_json(task.describe_target(example_of(split.targets, position), geometry)),
            "answer": _to_json(task.answer(example_of(predictions, position), geometry, top=TOP)),
            "error": float(error),
            "view": {"size": size, "scale": geometry.scale, "shift": geometry.shift},
            "preview": {
                "media_type": preview.media_type,
                "base64": base64.b64encode(preview.content).decode(),
            },
        }


def _to_json(answer: Answer) -> AnswerValues:
    return {"kind": answer.kind, "text": answer.text, "values": answer.values}


def table(evaluation: Evaluation) -> str:
    """The scores as text for people."""
    metric, augmented = evaluation.metric, evaluation.with_augmentation
    lines = [f"{evaluation.split}, {evaluation.count:,} examples"]
    width = max(20, *map(len, evaluation.scores))
    for name, value in evaluation.scores.items():
        lines.append(f"  {name:<{width}} {_row(value, evaluation.intervals[name], evaluation.units[name], 8)}")
    if augmented is not None:
        row = _row(augmented["scores"][metric], augmented["intervals"][metric], evaluation.units[metric])
        lines.append(f"  with {augmented['views']} augmented views: {metric} {row}")
    return "\n".join(lines)


def _row(value: float, interval: tuple[float, float], unit: str, width: int = 0) -> str:
    """A score and its interval, with the unit behind both."""
    is_fraction = unit == "fraction"
    score, low, high = (f"{number:.4f}" if is_fraction else format_number(number) for number in (value, *interval))
    return f"{score:>{width}}   95 % interval {low} to {high} {'' if is_fraction else unit}".rstrip()
