"""Evaluates one model on one split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from suanli.compute.infer import infer
from suanli.core.baselines import compare_with_baselines
from suanli.core.console import Progress, plural, say
from suanli.core.errors import DataError, MachineError
from suanli.core.schema import Arrays, Geometry, Tensors, example_of
from suanli.core.task import Records
from suanli.core.types import Device, Split, Step
from suanli.core.windows import merge_windows
from suanli.data.loader import Feed
from suanli.data.samples import answer_values, preview_values, show_input
from suanli.data.windows import input_of
from suanli.engines import saliency
from suanli.models.backbone import HeadInputs
from suanli.models.model_folder import SavedModel
from suanli.training.augment import compose
from suanli.training.validation import validation_batch_size
from suanli.verbs._embeddings import MOST, Embedded, Embedder, most_of, sample
from suanli.verbs._evaluation import AugmentedScores, Evaluation, Example
from suanli.verbs._leakage import find_rows, score_part, select_rows

LISTED = 24  # samples, and mistakes, that are kept with their pictures
TOP = 20  # entries of each of their answers, at least


class Evaluator:
    """One model on one split."""

    def __init__(self, saved: SavedModel, split: Split, device: Device) -> None:
        self.saved, self.split, self.device = saved, split, device
        self.step = Step(model=saved.module.to(device.torch_name))
        self.feed = Feed(split, device)
        self.windows = split.windows
        self.batch_size = validation_batch_size(saved.recipe)
        self.records: Records = {}  # of the last evaluation, of the examples whose scores count
        self.rows = np.arange(0)  # their positions in the split
        self.worst: list[int] = []  # the positions of the mistakes
        self.wrong = np.zeros(len(split), bool)  # of each example whose score counts
        self.embedded: Embedded | None = None  # None: the network has no embeddings, or none were asked for
        self.infer_s = 0.0  # that all answers took

    def evaluate(
        self, name: str, augmented_views: bool, training: Split | None, *, embedder: Embedder | None = None
    ) -> Evaluation:
        """`name`: of the split; `training`: for baselines that learn; `embedder`: to keep the embeddings of the split.
        Raises DataError for no examples."""
        started = time.perf_counter()
        task, split = self.saved.task, self.split
        if len(split) == 0:
            raise DataError("The split has no examples.", fix="Choose another split.")
        say(f"evaluating {plural(len(split), 'example')}")
        for line in task.describe():
            say(line)
        predictions = self._answer(name, embedder)
        records = task.records(predictions, split.targets)
        evaluation, records, rows = summarize(name, self.saved, split, records, training)
        self.records, self.rows = records, rows
        errors = task.errors(records)
        worst = np.argsort(-errors, kind="stable")[:LISTED]
        sample = np.random.default_rng(0).permutation(len(rows))[:LISTED]
        self.wrong[rows] = errors > 0
        self.worst = [int(rows[i]) for i in worst.tolist() if errors[i] > 0]
        return replace(
            evaluation,
            with_augmentation=self._score_views(rows) if augmented_views and task.averages_views else None,
            mistakes=self._explain([i for i in worst.tolist() if errors[i] > 0], rows, predictions, errors),
            samples=[self._example(int(rows[i]), predictions, errors[i]) for i in sample],
            seconds=time.perf_counter() - started,
        )

    def _answer(self, name: str, embedder: Embedder | None) -> Arrays:
        """The predictions, and on the way the embeddings, which inputs in windows don't have."""
        started, task = time.perf_counter(), self.saved.task
        embedder = embedder if self.windows is None else None
        rows = sample(len(self.split), MOST[name])
        wanted = np.isin(np.arange(len(self.split)), rows)
        with HeadInputs(self.step.model, embedder.head, wanted=wanted) if embedder else nullcontext() as seen:
            answers = infer(self.step, self.saved.preprocess, task, self._inputs("Evaluating"))
        predictions = merge_windows(task, answers, self.windows)
        self.infer_s = time.perf_counter() - started
        if seen is not None:
            try:
                vectors = seen.vectors(len(self.split))
            except MachineError as error:
                say(f"no embeddings: {error.message}")
                return predictions
            kept = sample(len(rows), most_of(vectors))
            self.embedded = Embedded(name=name, split=self.split, rows=rows[kept], vectors=vectors[kept])
        return predictions

    def _inputs(self, title: str) -> Iterator[Tensors]:
        done = 0
        with Progress(title, len(self.feed)) as progress:
            for inputs, _, positions in self.feed.in_order(self.batch_size):
                yield inputs
                done += len(positions)
                progress.update(done)

    def _score_views(self, rows: np.ndarray) -> AugmentedScores | None:
        """Scores of these examples over the mean of several views; None where the recipe's augmentations have none."""
        task, preprocess = self.saved.task, self.saved.preprocess
        pipeline = compose(self.saved.recipe.augment, preprocess.roles, task.targets)
        views = len(pipeline.views(preprocess.to_model(self.feed.inputs(torch.arange(1)))))
        if views == 1:
            return None
        inputs = self._inputs(f"Evaluating {views} views")
        predictions = infer(self.step, preprocess, task, inputs, views=pipeline.views)
        records = task.records(merge_windows(task, predictions, self.windows), self.split.targets)
        part = score_part(task, self.split, records, rows)
        return {"views": views, "scores": part["scores"], "intervals": part["intervals"]}

    def _explain(
        self, places: Sequence[int], rows: np.ndarray, predictions: Arrays, errors: np.ndarray
    ) -> list[Example]:
        """The examples at these places of `rows`, with what their answers rest on, where that can be found. An answer
        that is a place says it itself."""
        examples = [self._example(int(rows[i]), predictions, errors[i]) for i in places]
        if self.saved.task.shows_places:
            return examples
        inputs = [input_of(self.split, int(rows[i]), self.saved.preprocess) for i in places]
        try:
            found = saliency.explain(self.saved, inputs)
        except MachineError as error:
            say(f"the report shows no saliency maps: {error.message}")
            return examples
        for example, one in zip(examples, found, strict=True):
            picture = one.marked.picture
            example["saliency"] = {
                "method": one.method,
                "picture": None if picture is None else preview_values(picture),
                "words": one.marked.words,
            }
        return examples

    def _example(self, position: int, predictions: Arrays, error: float) -> Example:
        task, split = self.saved.task, self.split
        geometry = Geometry.from_array(split.geometries[position])
        inputs = input_of(split, position, self.saved.preprocess)
        answer, expected = task.answer_beside_target(
            example_of(predictions, position),
            example_of(split.targets, position),
            geometry,
            top=max(TOP, task.usual_top),
        )
        shown = show_input(self.saved.preprocess, task, inputs, geometry)
        return {
            "name": split.names[position],
            "expected": answer_values(expected),
            "answer": answer_values(answer),
            "error": float(error),
            "view": shown["view"],
            "preview": shown["preview"],
        }


def summarize(
    name: str, saved: SavedModel, split: Split, records: Records, training: Split | None
) -> tuple[Evaluation, Records, np.ndarray]:
    """What follows from the records of a split alone, with the records of the examples whose scores count, and their
    positions. `name`: of the split; `training`: for baselines that learn."""
    task = saved.task
    rows, leakage = find_rows(task, split, name, records)
    part = score_part(task, split, records, rows)
    records = select_rows(records, rows)
    evaluation = Evaluation(
        split=name,
        count=len(rows),
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        scores=part["scores"],
        units={score: task.unit_of(score) for score in part["scores"]},
        intervals=part["intervals"],
        with_augmentation=None,
        leakage=leakage,
        baselines=compare_with_baselines(task, saved.preprocess, records, split, training, rows),
        details=task.evaluate(records),
        remarks=task.describe_scores(records),
        mistakes=[],
        samples=[],
        seconds=0.0,
    )
    return evaluation, records, rows
