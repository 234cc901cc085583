"""Several labels per input, or none: a yes or no for each class, learned with binary cross-entropy.

Each class has a threshold of its own, chosen on the validation split. The primary metric, the mean average precision,
doesn't depend on thresholds. Not supported: classes that exclude each other, and labels that are known in part only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from suanli.core.errors import DataError
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.sections import Section, Table
from suanli.core.task import (
    FITTED,
    Answer,
    MapColors,
    Metric,
    Records,
    SuspectTarget,
    Task,
    check_predictions,
)
from suanli.core.types import Json, Target
from suanli.tasks import _linear
from suanli.tasks._classification_scores import mean_ratio
from suanli.tasks._curves import Text, check_goal, choose_threshold, rank_scores
from suanli.tasks._label_errors import suspect_labels

MOST_SETS = 9  # of labels that a map tells apart
FEW = 3  # with fewer examples, or counterexamples, of a class a threshold would be chosen by chance
COLUMNS = {
    "name": "class",
    "count": "examples",
    "threshold": "threshold",
    "auroc": "AUROC",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "average_precision": "average precision",
}


@dataclass(frozen=True, kw_only=True)
class Multilabel(Task):
    """`goal` says how the threshold of each class is chosen, such as "f1" or "sensitivity>=0.95"."""

    name: ClassVar[str] = "multilabel"
    annotation: ClassVar[str] = "labels"
    metric: ClassVar[Metric] = Metric(name="mean_average_precision", tolerance=0.005)
    raw_names: ClassVar[tuple[str, ...]] = ("logits",)
    units: ClassVar[Mapping[str, str]] = {"log_loss": "nats"}
    averages_views: ClassVar[bool] = True
    text_outputs: ClassVar[tuple[str, ...]] = ("labels",)
    other_classes: ClassVar[str] = "anything else has none of them, or is given some"

    goal: Text = "f1"
    frequencies: tuple[float, ...] = field(default=(), metadata=FITTED)  # of each class in the training targets
    thresholds: tuple[float, ...] = field(default=(), metadata=FITTED)  # of each class; empty: all are 0.5

    def __post_init__(self) -> None:
        """Raises UsageError for what is no goal."""
        check_goal(self.goal)

    # --- targets ---

    @property
    def targets(self) -> Schema:
        """0 or 1 for each class."""
        return {"labels": Column(shape=(len(self.classes),), dtype="uint8", role="labels", names=self.classes)}

    def encode(self, target: Target, geometry: Geometry) -> Arrays:  # noqa: ARG002
        """A list of names of classes, which may be empty."""
        row = np.zeros(len(self.classes), np.uint8)
        row[[self._positions[name] for name in target]] = 1
        return {"labels": row}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def strata(self, target: Target) -> Sequence[str]:
        return tuple(target)

    def fit(self, targets: Mapping[str, Stored]) -> Self:
        """With the frequencies of the classes."""
        labels = np.asarray(targets["labels"])
        return replace(self, frequencies=tuple(labels.mean(0).tolist())) if len(labels) else self

    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:
        """By split and class; an example counts for each of its classes."""
        return {
            split: dict.fromkeys(self.classes, 0) | Counter(name for names in lists for name in names)
            for split, lists in targets.items()
        }

    def refuse_unlearnable(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Raises DataError where no training example has a label."""
        if not any(counts["train"].values()):
            raise DataError("No training example has a label.", fix="Check where the labels come from.")

    def describe_counts(self, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Classes that training or test don't have."""
        lines = []
        for split, do in (("train", "training"), ("test", "test")):
            if missing := [name for name in self.classes if not counts[split][name]]:
                lines.append(f"classes without {do} examples: {', '.join(missing[:10])}")
        return lines

    # --- learning ---

    @property
    def model_args(self) -> dict[str, Json]:
        return {"classes": len(self.classes)}

    def loss(self, outputs: Any, targets: Tensors) -> Tensors:
        """Binary cross-entropy, the mean over the classes, in float32 or better: logits (B, K), targets (B, K)."""
        import torch
        from torch.nn import functional as F

        from suanli.core.members import flatten_members

        logits, target, members = flatten_members(outputs, targets["labels"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return {"binary_cross_entropy": losses.mean(1).sum() / members}

    def guessing_loss(self) -> float:
        """Of even chances."""
        return math.log(2)

    # --- answers ---

    @property
    def outputs(self) -> Schema:
        column = Column(shape=(len(self.classes),), dtype="float32", role="probabilities", names=self.classes)
        return {"probabilities": column}

    def predict(self, outputs: Any) -> Tensors:
        """float32 probabilities (B, K), each by itself, from logits (B, K)."""
        from suanli.core.members import mean_of_members

        return {"probabilities": mean_of_members(outputs.float().sigmoid())}

    def _decide(self, probabilities: np.ndarray) -> np.ndarray:
        """bool (…, K): which reach the threshold of their class."""
        decided: np.ndarray = probabilities >= np.array(self.thresholds or 0.5)
        return decided

    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:  # noqa: ARG002
        """All labels that reach their threshold, and the `top` probabilities, the highest first."""
        probabilities = prediction["probabilities"]
        order = np.argsort(-probabilities, kind="stable")
        decided = self._decide(probabilities)
        labels = [self.classes[i] for i in order if decided[i]]
        shares = {self.classes[i]: float(probabilities[i]) for i in order[: max(top, 1)]}
        text = "  ".join(f"{self.classes[i]} {probabilities[i]:.1%}" for i in order if decided[i]) or "no label"
        return Answer(
            kind="labels",
            text=text,
            values={"labels": labels, "probabilities": shares},
            columns=("labels", "probabilities"),
        )

    def with_threshold(self, threshold: float) -> Self:
        """With one threshold for all classes."""
        return replace(self, thresholds=(threshold,) * len(self.classes))

    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:  # noqa: ARG002
        labels = [self.classes[i] for i in np.flatnonzero(target["labels"])]
        return Answer(kind="labels", text=", ".join(labels) or "no label", values={"labels": labels})

    @property
    def needs_calibration(self) -> bool:
        return True

    def calibrate(self, records: Records) -> Self:
        """With the threshold of each class that reaches the goal best on these records."""
        return replace(self, thresholds=tuple(self._choose(*columns) for columns in _columns(records)))

    def _choose(self, scores: np.ndarray, target: np.ndarray) -> float:
        """0.5 where there are too few examples to choose."""
        few = min(target.sum(), (~target).sum()) < FEW
        chosen = None if few else choose_threshold(scores.astype(np.float64), target, self.goal)
        return 0.5 if chosen is None else chosen

    # --- scores ---

    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:
        """`target`, `score` and `decided` (N, K), and the `loss` in nats."""
        target, probabilities = np.asarray(targets["labels"]).astype(bool), predictions["probabilities"]
        check_predictions(predictions, len(target))
        unit = np.finfo(np.float32).eps
        own = np.where(target, probabilities, 1 - probabilities).astype(np.float64)
        losses = -np.log(own.clip(unit, 1)).mean(1)
        return {"target": target, "score": probabilities, "decided": self._decide(probabilities), "loss": losses}

    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """`mean_average_precision` is the mean over the classes that occur (0 where none does); `f1_micro` counts all
        labels alike; `f1_macro` is the mean over the classes that occur or were predicted; `subset_accuracy` the share
        of examples all of whose labels are right."""
        weights = np.ones(len(records["target"])) if weights is None else weights
        return {name: float(values[0]) for name, values in self.resampled_scores(records, weights[None]).items()}

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        """All R at once, one class after another."""
        weights = weights.astype(np.float64)
        target, decided, count = records["target"], records["decided"], weights.sum(1)
        parts = (target & decided, target, decided)
        right, occurring, predicted = (weights @ part.astype(np.float64) for part in parts)
        precisions = np.stack([rank_scores(*columns, weights)[1] for columns in _columns(records)], axis=1)
        defined = ~np.isnan(precisions)
        return {
            "mean_average_precision": np.where(defined, precisions, 0).sum(1) / np.maximum(defined.sum(1), 1),
            "f1_micro": 2 * right.sum(1) / np.maximum((occurring + predicted).sum(1), 1e-300),
            "f1_macro": np.nan_to_num(mean_ratio(2 * right, occurring + predicted)),
            "subset_accuracy": weights @ (target == decided).all(1) / count,
            "log_loss": weights @ records["loss"] / count,
        }

    def constant_baseline(self, targets: Mapping[str, Stored]) -> tuple[str, Records] | None:
        """The frequencies of the classes as probabilities, so the labels of more than half of the examples are the
        answer."""
        if not self.frequencies:
            return None
        frequent = [f'"{name}"' for name, share in zip(self.classes, self.frequencies, strict=True) if share >= 0.5]
        predictions = {"probabilities": np.tile(np.array(self.frequencies, np.float32), (len(targets["labels"]), 1))}
        return f"always answering {', '.join(frequent) or 'no label'}", self._plain.records(predictions, targets)

    def linear_baseline(
        self, features: Any, targets: Mapping[str, Stored], other_features: Any, other_targets: Mapping[str, Stored]
    ) -> tuple[str, Records] | None:
        """A logistic regression for each class; the frequency of one that always or never occurs."""
        labels = np.asarray(targets["labels"])
        if features.size * len(self.classes) > _linear.MOST_WORK:
            return None
        predicted = np.tile(labels.mean(0).astype(np.float32), (other_features.shape[0], 1))
        for i in range(len(self.classes)):
            if (own := _linear.classify(features, labels[:, i], 2, other_features)) is not None:
                predicted[:, i] = own[:, 1]
        return "logistic regression", self._plain.records({"probabilities": predicted}, other_targets)

    def find_suspects(self, features: np.ndarray, targets: Mapping[str, Stored]) -> list[SuspectTarget]:
        """By confident learning, for each label."""
        return suspect_labels(features, np.asarray(targets["labels"]))

    def map_colors(self, targets: Mapping[str, Stored]) -> MapColors:
        """By the set of labels, where it is one of the most frequent."""
        labels = np.asarray(targets["labels"])
        sets, place, counts = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        frequent = np.argsort(-counts, kind="stable")[:MOST_SETS]
        names = [", ".join(self.classes[i] for i in np.flatnonzero(sets[one])) or "no label" for one in frequent]
        ranks = np.full(len(sets), len(names))
        ranks[frequent] = np.arange(len(names))
        return MapColors(groups=ranks[place.reshape(-1)], names=(*names, "other labels"))

    @property
    def _plain(self) -> Self:
        """Without thresholds, which suit this model only."""
        return replace(self, thresholds=())

    def errors(self, records: Records) -> np.ndarray:
        """How far the probabilities of wrong labels are from the truth, added up."""
        distances = np.abs(records["target"] - records["score"].astype(np.float64)).clip(1e-6)
        errors: np.ndarray = (distances * (records["target"] != records["decided"])).sum(1)
        return errors

    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """The sum of the differences of the probabilities, as a share of that of the larger ones, which counts 1 at
        least."""
        before, after = expected["probabilities"], answered["probabilities"]
        distances: np.ndarray = np.abs(after - before).sum(1) / np.maximum(before, after).sum(1).clip(1)
        return distances

    def agreement(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """Whether all labels are the same."""
        same: np.ndarray = (self._decide(expected["probabilities"]) == self._decide(answered["probabilities"])).all(1)
        return same

    def evaluate(self, records: Records) -> dict[str, Json]:
        """`per_class`: its threshold and scores; one that isn't defined is None."""
        thresholds = self.thresholds or (0.5,) * len(self.classes)
        rows = []
        for i, (scores, target) in enumerate(_columns(records)):
            decided = records["decided"][:, i]
            area, precision = (float(one[0]) for one in rank_scores(scores, target, np.ones((1, len(target)))))
            right, count, predicted = (int(one.sum()) for one in (target & decided, target, decided))
            rows.append(
                {
                    "name": self.classes[i],
                    "count": count,
                    "threshold": thresholds[i],
                    "precision": right / predicted if predicted else None,
                    "recall": right / count if count else None,
                    "f1": 2 * right / (count + predicted) if count + predicted else None,
                    "auroc": None if math.isnan(area) else area,
                    "average_precision": None if math.isnan(precision) else precision,
                }
            )
        return {"per_class": rows}

    @classmethod
    def sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        rows = figures.get("per_class") or []
        rows = sorted(rows, key=lambda row: 2.0 if (value := row.get("average_precision")) is None else value)
        table = Table(
            title="Each class",
            columns=tuple(COLUMNS.values()),
            formats=("text", "count", "number", *("percent",) * 5),
            rows=tuple(tuple(row.get(name) for name in COLUMNS) for row in rows),
            note="Each class, the lowest average precision first. Thresholds were chosen on validation data.",
        )
        return [table] if rows else []


def _columns(records: Records) -> list[tuple[np.ndarray, np.ndarray]]:
    """The scores and the targets (N,) of each class."""
    return list(zip(records["score"].T, records["target"].T, strict=True))


TASK = Multilabel
