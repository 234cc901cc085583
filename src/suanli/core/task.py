"""What is learned and how it is scored: the seam that carries any task. One task a file: `tasks/<name>.py`.

A task turns raw targets into arrays, gives the loss, turns what the network returns into predictions, and these into
records: one row an example, which is all that scores depend on. So one bootstrap gives every score of every task its
interval (`core/compare.py`), and cache, training, engines, server and report need no line for a new task.
"""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np
from pydantic import TypeAdapter, ValidationError

from suanli.core.answers import Answer as Answer
from suanli.core.checked_targets import CheckedTarget, TargetReport
from suanli.core.errors import DataError, Diverged, UsageError, unknown
from suanli.core.metric import Metric as Metric
from suanli.core.metric import format_number as format_number
from suanli.core.metric import format_score as format_score
from suanli.core.schema import Arrays, Geometry, Schema, Stored, Tensors
from suanli.core.sections import Section
from suanli.core.types import Difference, Json, Target, TreeColumns

if TYPE_CHECKING:
    import torch

Records: TypeAlias = Mapping[str, np.ndarray]  # columns with one row an example: all that scores depend on
FITTED = {"fitted": True}  # metadata of a field that `fit` fills, and a user can't set


@dataclass(frozen=True, kw_only=True)
class SuspectTarget:
    """A target that is likely wrong."""

    position: int  # of the example
    suggested: Arrays  # one example of `Task.targets`: what it should probably be
    confidence: float  # from 0.5 to 1: that the suggestion is the better one


@dataclass(frozen=True, kw_only=True)
class MapColors:
    """By what the examples on a map are coloured: by the group that each is in, or by a number."""

    groups: np.ndarray | None = None  # (N,) int64, positions in `names`
    names: tuple[str, ...] = ()
    values: np.ndarray | None = None  # (N,) float64


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A subclass is a frozen dataclass, saved with the model. Its fields are settings, and what it learned from the
    targets of the training split. Shapes: B batch, N examples, R resamples."""

    name: ClassVar[str]
    annotation: ClassVar[str]  # what a `Source` must carry: "class", "labels", "value", "boxes"
    metric: ClassVar[Metric]
    units: ClassVar[Mapping[str, str]] = {}  # of scores beside the metric that aren't fractions: "nats", "" for unknown
    distances: ClassVar[frozenset[str]] = frozenset()  # scores that are never below 0 and that noise makes larger
    has_counts: ClassVar[bool] = False  # sums of the loss are divided by `counts`; else by the number of examples
    learns_from: ClassVar[str] = "scores"  # what the network returns: see `Model.returns`
    # Of the tensors that the network returns, in a file without `predict`, where those behind them are left out. Empty:
    # all are there, as "output_0" and so on.
    raw_names: ClassVar[tuple[str, ...]] = ()
    averages_views: ClassVar[bool] = False  # predictions say nothing of places: those of several views have a mean
    # What becomes of what is of none of the classes, for people who get the model without its data.
    other_classes: ClassVar[str] = "anything else is given one of them, too"
    # Outputs on the wire that are text: the entry of `Answer.values` of that name; "answer" is all of them as JSON.
    text_outputs: ClassVar[tuple[str, ...]] = ("answer",)
    takes_windows: ClassVar[bool] = False  # it has `cut` and `merge`, for inputs in windows (core/windows.py)
    usual_top: ClassVar[int] = 5  # entries of an answer that ranks, where the user names no number

    classes: tuple[str, ...] = ()  # in the order of the model's outputs; empty: the task has none

    @classmethod
    def of(cls, classes: Sequence[str], settings: Mapping[str, Json]) -> Self:
        """A task with these classes and values of its fields. Raises UsageError for one that is unknown or wrong."""
        allowed = [f.name for f in fields(cls) if f.name != "classes"]
        for name in settings:
            if name not in allowed:
                raise unknown(f"setting of the task {cls.name}", name, cls.setting_names())
        try:
            return TypeAdapter(cls).validate_python({"classes": tuple(classes), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"The setting {first['loc'][0]} of the task {cls.name} can't be {first['input']!r}: "
                f"{first['msg'].lower()}.",
                fix=f"It has the settings: {', '.join(cls.setting_names()) or 'none'}.",
            ) from error

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The fields that a user may set."""
        return tuple(f.name for f in fields(cls) if f.name != "classes" and "fitted" not in f.metadata)

    @property
    def shows_places(self) -> bool:
        """Whether its answers are places in the input, which people can only judge when they see its details."""
        return any(column.role in ("boxes", "mask") for column in self.outputs.values())

    @classmethod
    def unit_of(cls, score: str) -> str:
        """Of one of `scores`: "fraction", "nats"."""
        return cls.metric.unit if score == cls.metric.name else cls.units.get(score, "fraction")

    @property
    def settings(self) -> dict[str, Json]:
        """Every field but the classes: `type(self).of(self.classes, self.settings)` is an equal task."""
        values = asdict(self)
        del values["classes"]
        return values

    # --- targets ---

    @property
    @abstractmethod
    def targets(self) -> Schema:
        """As they are cached and as a batch holds them."""

    @abstractmethod
    def encode(self, target: Target, geometry: Geometry) -> Arrays:
        """One target as arrays of `targets`, in the model's coordinates. Raises BadInput where it can't be used."""

    def fit(self, targets: Mapping[str, Stored]) -> Self:  # noqa: ARG002
        """A copy with what depends on the encoded targets of the training split, such as the weights of classes."""
        return self

    def strata(self, target: Target) -> Sequence[str]:  # noqa: ARG002
        """The classes of a raw target: of each, every split that suanli makes gets some examples."""
        return ()

    @abstractmethod
    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:
        """By split, how many targets there are of each class, or of each range of values: the table of the data check.
        Every split has the same names."""

    def refuse_unlearnable(self, counts: Mapping[str, Mapping[str, int]]) -> None:  # noqa: B027  # few tasks refuse
        """Raises DataError where `count_targets` shows that nothing can be learned."""

    def describe_counts(self, counts: Mapping[str, Mapping[str, int]]) -> list[str]:  # noqa: ARG002
        """What a person should know of `count_targets` before training, as sentences for a terminal."""
        return []

    def check_targets(self, examples: Mapping[str, Sequence[CheckedTarget]]) -> TargetReport:  # noqa: ARG002
        """What a person should know of the targets of each split, beside `count_targets`: what is wrong with them and
        with how they fit their inputs, sizes, shapes."""
        return TargetReport()

    def name_target(self, target: Target) -> str:
        """A raw target in a few words; equal for two that mean the same."""
        return str(target)

    @classmethod
    def data_sections(cls, figures: Mapping[str, Json]) -> list[Section]:  # noqa: ARG003
        """What the report shows of the figures of `check_targets`, each of which may be missing."""
        return []

    # --- learning ---

    @property
    @abstractmethod
    def model_args(self) -> dict[str, Json]:
        """What `Model.build` must know of the task: {"classes": 10} is a head that gives ten numbers."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensors) -> Tensors:
        """Named sums, scalars, over a batch or a part of it, from what the network returns. Training minimises the
        total of each sum divided by its count."""

    def counts(self, targets: Tensors) -> Tensors:
        """What each sum of `loss` is divided by, scalars that depend on the targets only. They are summed over
        micro-batches and processes. Called where `has_counts`."""
        raise NotImplementedError

    @abstractmethod
    def guessing_loss(self) -> float:
        """The loss of a network that has learned nothing: a training far above it diverges."""

    # --- answers ---

    @property
    @abstractmethod
    def outputs(self) -> Schema:
        """Of `predict`, and so of the exported graph. Shapes are fixed: lists of unknown length are padded."""

    @abstractmethod
    def predict(self, outputs: Any) -> Tensors:
        """float32 tensors of `outputs` (B, …) from what the network returns. Part of the exported graph."""

    @property
    def listed(self) -> tuple[str, ...]:
        """Names of the outputs that are lists, in which rounding may swap or drop entries: they are compared by
        `drift`, which pairs the entries, and not value by value."""
        return tuple(name for name, column in self.outputs.items() if column.role == "boxes")

    def explained(self, outputs: Any) -> torch.Tensor:
        """(B,): the number that a saliency map explains, of what the network returns: the largest, which for a
        classifier is the logit of its answer. A task whose network returns more than one tensor overrides it."""
        largest: torch.Tensor = outputs.flatten(1).amax(1)
        return largest

    @abstractmethod
    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:
        """For one example of `predict`; of a list, at most the `top` likeliest entries."""

    @property
    def shown_from(self) -> float | None:
        """The probability from which an entry of an answer's list is given, such as a box; None: answers have no such
        lists."""
        return None

    def with_threshold(self, threshold: float) -> Self:  # noqa: ARG002
        """A copy that decides by this probability, from 0 to 1, in place of the one that was chosen. Raises UsageError
        where answers depend on no threshold."""
        raise UsageError(f"Answers of the task {self.name} depend on no threshold.", fix="Leave it out.")

    def to_input(self, predictions: Arrays, geometries: Sequence[Geometry]) -> Arrays:  # noqa: ARG002
        """The arrays of B examples of `predict` in the coordinates of their inputs, for clients that read tensors."""
        return predictions

    def answer_beside_target(
        self, prediction: Arrays, target: Arrays, geometry: Geometry, *, top: int
    ) -> tuple[Answer, Answer]:
        """`answer` and `describe_target` of one example, for galleries. A task whose answers are lists says of each
        entry whether it is right (`Answer`)."""
        return self.answer(prediction, geometry, top=top), self.describe_target(target, geometry)

    def cut(self, target: Arrays, geometry: Geometry, size: Sequence[int]) -> Arrays:
        """What a window of this size has of one example of `targets`, which is in the coordinates of the whole input.
        Called where `takes_windows`."""
        raise NotImplementedError

    def merge(self, predictions: Arrays, geometries: Sequence[Geometry], size: Sequence[int]) -> Arrays:
        """One prediction, in the coordinates of the whole input, from those of its windows (T, …), each of this size.
        Called where `takes_windows`."""
        raise NotImplementedError

    def texts(self, predictions: Arrays, geometries: Sequence[Geometry]) -> dict[str, list[str]]:
        """`text_outputs` of B examples of `predict`, for a server. A task overrides it where it can do better than one
        answer after another."""
        texts: dict[str, list[str]] = {name: [] for name in self.text_outputs}
        for i, geometry in enumerate(geometries):
            one = {name: array[i] for name, array in predictions.items()}
            values = self.answer(one, geometry, top=sys.maxsize).values
            for name, column in texts.items():
                value = values if name == "answer" else values[name]
                column.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return texts

    @abstractmethod
    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:
        """A true target in the form of an answer, for galleries. `target` is one example of `targets`."""

    # --- scores ---

    @abstractmethod
    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:
        """Of N examples. Raises DataError for no examples, and Diverged for predictions that aren't finite."""

    @abstractmethod
    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every score by its name. `weights` (N,), integers or not, say how often each example counts; None: once. A
        score that isn't defined, such as the recall of a class without examples, is NaN; the primary metric never
        is."""

    def undefined_scores(self, records: Records) -> Collection[str]:  # noqa: ARG002
        """The names of those of `scores` that mean nothing for these records, whatever their value: shown as n/a. The
        primary metric is never one of them."""
        return ()

    def defined_scores(self, records: Records) -> dict[str, float | None]:
        """`scores`, with None for those that aren't defined for these records."""
        undefined = self.undefined_scores(records)
        return {
            name: None if name in undefined or math.isnan(value) else value
            for name, value in self.scores(records).items()
        }

    def describe_scores(self, records: Records) -> list[str]:  # noqa: ARG002
        """What a person should know of the scores of these records, such as which classes they leave out."""
        return []

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`scores` (R,) for each row of weights (R, N), NaN where one isn't defined. A task overrides it where it can
        do better than one row after another."""
        rows = [self.scores(records, row) for row in weights]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}

    def resampled_metric(self, records: Records, weights: np.ndarray) -> np.ndarray:
        """The primary metric (R,) of `resampled_scores`. A task overrides it where it costs much less than all."""
        return self.resampled_scores(records, weights)[self.metric.name]

    def closed_intervals(self, records: Records) -> dict[str, tuple[float, float]]:  # noqa: ARG002
        """95 % intervals of scores that have a closed form, which needs no resamples; examples are independent."""
        return {}

    def closed_difference(self, before: Records, after: Records) -> Difference | None:  # noqa: ARG002
        """The gain in the primary metric on the same independent examples; None: it has no closed form."""
        return None

    def constant_baseline(self, targets: Mapping[str, Stored]) -> tuple[str, Records] | None:  # noqa: ARG002
        """The same answer for every input, whatever it is, by what `fit` learned: its description ('always answering
        "dog"') and its records of N targets. None: the task has none, or isn't fitted."""
        return None

    def linear_baseline(
        self,
        features: Any,  # noqa: ARG002
        targets: Mapping[str, Stored],  # noqa: ARG002
        other_features: Any,  # noqa: ARG002
        other_targets: Mapping[str, Stored],  # noqa: ARG002
    ) -> tuple[str, Records] | None:
        """A linear model that learned targets (M,) from `features` (M, F): its name ("logistic regression") and its
        records of N other examples. None: the task has none, or it would take more than a second or two."""
        return None

    def tree_baseline(
        self,
        columns: TreeColumns,  # noqa: ARG002
        targets: Mapping[str, Stored],  # noqa: ARG002
        other_columns: TreeColumns,  # noqa: ARG002
        other_targets: Mapping[str, Stored],  # noqa: ARG002
    ) -> tuple[str, Records] | None:
        """As `linear_baseline`, of decision trees on the columns of a table."""
        return None

    def find_suspects(self, features: np.ndarray, targets: Mapping[str, Stored]) -> list[SuspectTarget] | None:  # noqa: ARG002
        """Targets (N,) that are likely wrong, the surest first, by what a simple model on the embeddings (N, F) says of
        each example that it hasn't learned from. None: the task has no such model, or there are too few examples."""
        return None

    def map_colors(self, targets: Mapping[str, Stored]) -> MapColors:  # noqa: ARG002
        """By what a map of these examples is coloured."""
        return MapColors()

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` changes anything."""
        return False

    def calibrate(self, records: Records) -> Self:  # noqa: ARG002
        """A copy with what is chosen on records of the validation split, such as a threshold. Called once, when the
        training is over; the copy is saved with the model."""
        return self

    def describe(self) -> list[str]:
        """What a person should know of a fitted task, such as the threshold of its answers, as sentences."""
        return []

    @abstractmethod
    def errors(self, records: Records) -> np.ndarray:
        """How wrong each answer is (N,); 0: right. The report shows the worst."""

    @abstractmethod
    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """How far each answer is from the reference's (N,), from 0 (equal) to about 1 (unrelated)."""

    def agreement(self, expected: Arrays, answered: Arrays) -> np.ndarray | None:  # noqa: ARG002
        """Whether each answer decides as the reference's does, bool (N,), such as for the same class; None: answers of
        this task are no decisions."""
        return None

    def evaluate(self, records: Records) -> dict[str, Json]:  # noqa: ARG002
        """Figures beyond `scores`, as plain values for JSON; `sections` shows them."""
        return {}

    @classmethod
    def sections(cls, figures: Mapping[str, Json]) -> list[Section]:  # noqa: ARG003
        """What the report shows of `evaluate`'s figures, each of which may be missing."""
        return []


def check_predictions(predictions: Arrays, count: int) -> None:
    """Raises DataError where there are no examples (`count`), and Diverged for predictions that aren't finite."""
    if not count:
        raise DataError("The split has no examples to evaluate.", fix="Give one with labelled examples.")
    for values in predictions.values():
        assert len(values) == count, (len(values), count)
        if not np.isfinite(values).all():
            raise Diverged(
                "The model's answers are not finite numbers.", fix="Train again with a lower lr or clip_norm."
            )
