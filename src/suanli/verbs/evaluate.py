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


class AugmentedScores(TypedDict):
    """Scores of the mean over several views of each input."""

    views: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class Preview(TypedDict):
    media_type: str
    base64: str


class Example(TypedDict):
    """One input and its answer."""

    name: str
    true: str
    predicted: str
    probability: float
    true_probability: float
    preview: Preview


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of one model on one split; fractions, not percent."""

    split: str
    count: int
    metric: str  # the primary one of the scores; "headline" in the file
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # 95 %, of every score; that of the metric is "interval" in the file
    with_augmentation: AugmentedScores | None
    details: Mapping[str, object]  # what the task adds for the report: classes, confusion
    mistakes: Sequence[Example]  # the most confident first
    samples: Sequence[Example]
    seconds: float

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        values["headline"] = values.pop("metric")
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
    have views. Raises DataError when there is no model yet or the other data has other classes.
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
    source = _find_other_source(options, data)
    if source.kind != saved.preprocess.kind:
        raise DataError(f"The model reads {saved.preprocess.kind}, the data is {source.kind}.", fix="Use other data.")
    unknown_class = sorted(set(source.classes) - set(saved.classes))
    if unknown_class:
        raise DataError(
            f"The model doesn't know the class {unknown_class[0]!r}; it knows {', '.join(saved.classes[:10])}.",
            fix="Rename the classes of the data to those of the model.",
        )
    rows = [replace(r, split="test") for r in source.rows if r.split in (split, None)]
    source = replace(source, rows=rows, classes=saved.classes, fingerprint=f"{source.fingerprint}:{split}")
    prepared = prepare_source(
        source, saved.recipe, cache_dir_of(options.cache_dir), threads=cores(), preprocess=saved.preprocess
    )
    refuse_bad_share(prepared.findings, options.max_bad)
    return prepared.splits["test"]


def _find_other_source(options: DataOptions, data: AnyPath) -> Source:
    """Data that isn't divided needs no times, and it may have no groups."""
    options = replace(options, subject=str(data), time_column=None)
    try:
        return options.find_source()
    except UsageError as error:
        if options.group_column is None and options.group_pattern is None:
            raise
        source = replace(options, group_column=None, group_pattern=None).find_source()
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
                    "nats" if name == "log_loss" else "fraction",
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
        probabilities = infer(self.step, self.saved.preprocess, task, self._rows("Evaluating"))
        predicted = probabilities.argmax(axis=1)
        wrong = np.flatnonzero(predicted != split.targets)
        wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:LISTED]
        records = task.records(probabilities, split.targets)
        sample = np.random.default_rng(0).permutation(len(split))[:LISTED]
        return Evaluation(
            split=name,
            count=len(split),
            metric=task.metric,
            scores=task.scores(records),
            intervals=intervals(task, records, split.groups),
            with_augmentation=self._score_views() if augmented_views else None,
            details=task.evaluate(records, self.saved.classes),
            mistakes=[self._example(int(i), probabilities[i]) for i in wrong],
            samples=[self._example(int(i), probabilities[i]) for i in sample],
            seconds=time.perf_counter() - started,
        )

    def _rows(self, title: str) -> Iterator[torch.Tensor]:
        done = 0
        with Progress(title, len(self.feed)) as progress:
            for rows, _, _ in self.feed.in_order(self.batch_size):
                yield rows
                done += len(rows)
                progress.update(done)

    def _score_views(self) -> AugmentedScores | None:
        """Scores over the mean of several views; None where the recipe's augmentations have none."""
        pipeline = compose(self.saved.recipe.augment, self.saved.preprocess.kind)
        views = len(pipeline.views(self.saved.preprocess.to_model(self.feed.rows(torch.arange(1)))))
        if views == 1:
            return None
        rows = self._rows(f"Evaluating {views} views")
        task = self.saved.task
        probabilities = infer(self.step, self.saved.preprocess, task, rows, views=pipeline.views)
        records = task.records(probabilities, self.split.targets)
        return {
            "views": views,
            "scores": task.scores(records),
            "intervals": intervals(task, records, self.split.groups),
        }

    def _example(self, position: int, probabilities: np.ndarray) -> Example:
        target, predicted = int(self.split.targets[position]), int(probabilities.argmax())
        preview = self.saved.preprocess.preview(self.split.inputs[self.split.index[position]])
        return {
            "name": self.split.names[position],
            "true": self.saved.classes[target],
            "predicted": self.saved.classes[predicted],
            "probability": float(probabilities[predicted]),
            "true_probability": float(probabilities[target]),
            "preview": {
                "media_type": preview.media_type,
                "base64": base64.b64encode(preview.content).decode(),
            },
        }


def table(evaluation: Evaluation) -> str:
    """The scores as text for people."""
    metric, augmented = evaluation.metric, evaluation.with_augmentation
    lines = [f"{evaluation.split}, {evaluation.count:,} examples"]
    for name, value in evaluation.scores.items():
        low, high = evaluation.intervals[name]
        lines.append(f"  {name:<20} {value:8.4f}   95 % interval {low:.4f} to {high:.4f}")
    if augmented is not None:
        low, high = augmented["intervals"][metric]
        score = f"{metric} {augmented['scores'][metric]:.4f}   95 % interval {low:.4f} to {high:.4f}"
        lines.append(f"  with {augmented['views']} augmented views: {score}")
    return "\n".join(lines)
