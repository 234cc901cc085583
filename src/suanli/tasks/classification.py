"""Classification with one class per input: cross-entropy is the loss, accuracy the primary metric.

Scores are computed at every validation, so most come from three counts per class, in NumPy (`predict` must not import
more); tests compare them with scikit-learn. Of two classes one is the positive one: they have curves, and a threshold
that a user's goal chooses on validation data. Ordered classes are learned as any others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from suanli.core.compare import share_difference, wilson_interval
from suanli.core.errors import UsageError, unknown
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.sections import Section
from suanli.core.task import FITTED, Answer, MapColors, Metric, Records, SuspectTarget, Task
from suanli.core.types import Difference, Json, Target, TreeColumns
from suanli.tasks import _linear, _trees
from suanli.tasks._class_counts import describe_counts, refuse_unlearnable
from suanli.tasks._class_names import find_order, find_positive
from suanli.tasks._classification_scores import (
    CALIBRATION_BINS,
    calibration_error,
    check_probabilities,
    confused_pairs,
    confusion_matrix,
    count_classes,
    log_losses,
    mean_ratio,
    per_class,
    rank_targets,
    sum_bins,
)
from suanli.tasks._classification_sections import draw_figures
from suanli.tasks._curves import Text, check_goal, choose_threshold, curve_figures, rank_scores
from suanli.tasks._label_errors import suspect_classes

if TYPE_CHECKING:
    import torch

MATRIX_CLASSES = 100  # of a larger confusion matrix only the most frequent mistakes are kept
OVER_CLASSES = ("balanced_accuracy", "macro_f1")  # scores that are means over classes: not defined where there is one


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """`label_smoothing` is the share of each target that is spread over all classes; `class_weights` "balanced" lets
    each class count the same in the loss, however many examples it has. Of two classes, `positive_class` is the one
    that is looked for ("": by name, or the rarer one), and `goal` says how the threshold of its probability is chosen
    on the validation split ("": the likelier class is the answer)."""

    name: ClassVar[str] = "classification"
    annotation: ClassVar[str] = "class"
    metric: ClassVar[Metric] = Metric(name="accuracy", tolerance=0.005)
    raw_names: ClassVar[tuple[str, ...]] = ("logits",)
    units: ClassVar[Mapping[str, str]] = {"log_loss": "nats", "mean_rank_error": "ranks"}
    distances: ClassVar[frozenset[str]] = frozenset({"calibration_error"})
    averages_views: ClassVar[bool] = True
    text_outputs: ClassVar[tuple[str, ...]] = ("label",)

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    positive_class: Text = ""
    goal: Text = ""
    weights: tuple[float, ...] = field(default=(), metadata=FITTED)  # of each class in the loss; empty: all count 1
    frequencies: tuple[float, ...] = field(default=(), metadata=FITTED)  # shares of the training targets

    threshold: float | None = field(default=None, metadata=FITTED)  # from which on the positive class is the answer

    def __post_init__(self) -> None:
        """Raises UsageError for a goal or a positive class that these classes can't have."""
        for name, value in (("goal", self.goal), ("positive_class", self.positive_class)):
            if value and self.classes and len(self.classes) != 2:
                raise UsageError(f"{name} is for two classes, and there are {len(self.classes)}.", fix="Leave it out.")
        if self.positive_class and self.classes and self.positive_class not in self.classes:
            raise unknown("positive_class", self.positive_class, self.classes)
        if self.goal:
            check_goal(self.goal)

    # --- targets ---

    @property
    def targets(self) -> Schema:
        """One int64 a class."""
        return {"class": Column(shape=(), dtype="int64", role="class", names=self.classes)}

    def encode(self, target: Target, geometry: Geometry) -> Arrays:  # noqa: ARG002
        """The position of a class's name."""
        return {"class": np.array(self._positions[target], np.int64)}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def strata(self, target: Target) -> Sequence[str]:
        return (target,)

    def fit(self, targets: Mapping[str, Stored]) -> Self:
        """With the frequencies of the classes and, of two, the positive one; with "balanced", weights in inverse
        proportion to the frequencies, 0 for a class without examples."""
        counts = np.bincount(np.asarray(targets["class"]), minlength=len(self.classes))
        frequencies = tuple((counts / max(counts.sum(), 1)).tolist())
        positive = self.positive_class or (find_positive(self.classes, frequencies) if len(self.classes) == 2 else "")
        fitted = replace(self, frequencies=frequencies, positive_class=positive)
        if self.class_weights == "none":
            return fitted
        weights = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1), 0.0)
        return replace(fitted, weights=tuple(weights.tolist()))

    def count_targets(self, targets: Mapping[str, Sequence[Target]]) -> dict[str, dict[str, int]]:
        """By split and class."""
        return {split: dict.fromkeys(self.classes, 0) | Counter(names) for split, names in targets.items()}

    def refuse_unlearnable(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Raises DataError for one class only, and for a class that can't be both learned and evaluated."""
        refuse_unlearnable(self.classes, counts)

    def describe_counts(self, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Classes without test examples, and without any; classes that look ordered."""
        return describe_counts(self.classes, counts)

    # --- learning ---

    @property
    def model_args(self) -> dict[str, Json]:
        return {"classes": len(self.classes)}

    def loss(self, outputs: Any, targets: Tensors) -> Tensors:
        """Cross-entropy in float32 or better: logits (B, K), or (B, M, K) of M members, targets (B,) int64 or (B, K)
        shares.

        With weights of classes it is the weighted sum over B, not divided by the sum of the weights as torch does: so
        the mean over micro-batches is the loss of the batch, and targets may be shares.
        """
        import torch
        from torch.nn import functional as F

        from suanli.core.members import flatten_members

        logits, target, members = flatten_members(outputs, targets["class"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if target.is_floating_point():
            target = target.to(logits.dtype)
        losses = F.cross_entropy(
            logits,
            target,
            weight=_on_device(self.weights, logits.device, logits.dtype) if self.weights else None,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        return {"cross_entropy": losses.sum() / members}

    def guessing_loss(self) -> float:
        """Of equal probabilities, averaged over the classes."""
        import torch

        count = len(self.classes)
        total = self.loss(torch.zeros(count, count), {"class": torch.arange(count)})["cross_entropy"]
        return float(total / count)

    # --- answers ---

    @property
    def outputs(self) -> Schema:
        column = Column(shape=(len(self.classes),), dtype="float32", role="probabilities", names=self.classes)
        return {"probabilities": column}

    def predict(self, outputs: Any) -> Tensors:
        """float32 probabilities (B, K) from logits (B, K), or the means of those of members (B, M, K)."""
        from suanli.core.members import mean_of_members

        return {"probabilities": mean_of_members(outputs.float().softmax(dim=-1))}

    def answer(self, prediction: Arrays, geometry: Geometry, *, top: int) -> Answer:  # noqa: ARG002
        """The class that is decided for, its probability, and the `top` likeliest, best first; before them the answer,
        where the threshold decides for one of less than half."""
        probabilities = prediction["probabilities"]
        decided = int(self._decide(probabilities[None])[0])
        best = np.argsort(-probabilities, kind="stable")
        best = np.concatenate([[decided], best[best != decided]])[: max(top, 1)]
        ranked = {self.classes[i]: float(probabilities[i]) for i in best}
        label, probability = next(iter(ranked.items()))
        return Answer(
            kind="classes",
            text="  ".join(f"{name} {share:.1%}" for name, share in list(ranked.items())[:3]),
            values={"label": label, "probability": probability, "probabilities": ranked},
            columns=("label", "probability", "probabilities"),
        )

    def _decide(self, probabilities: np.ndarray) -> np.ndarray:
        """(N,) from (N, K): the likeliest class, of equal probabilities the lowest; with a threshold, the positive
        class where its probability reaches it."""
        if self.threshold is None:
            likeliest: np.ndarray = probabilities.argmax(1)
            return likeliest
        positive = self._positions[self.positive_class]
        return np.where(probabilities[:, positive] >= self.threshold, positive, 1 - positive)

    def with_threshold(self, threshold: float) -> Self:
        """Of two classes, the positive one is the answer from this probability. Raises UsageError for more classes."""
        if not self.positive_class:
            raise UsageError("A threshold is for two classes.", fix="Leave it out.")
        return replace(self, threshold=threshold)

    @property
    def _plain(self) -> Self:
        """Without a threshold, which suits this model only."""
        return self if self.threshold is None else replace(self, threshold=None)

    def describe(self) -> list[str]:
        """The positive class, and the threshold with its goal."""
        if not self.positive_class:
            return []
        line = f'positive class: "{self.positive_class}" (to choose the other: --set positive_class=NAME)'
        if self.threshold is None:
            return [line]
        name, goal = f'"{self.positive_class}"', f'chosen for the goal "{self.goal}" on validation examples'
        if self.threshold <= 0 or self.threshold > 1:
            always = name if self.threshold <= 0 else "the other class"
            return [line, f"{always} is always predicted, {goal}: no other threshold reaches it with this model"]
        at = f"{name} is predicted where its probability is at least {self.threshold:.4g}"
        return [line, f"{at}, {goal}, so accuracy may be lower than at 0.5"]

    @property
    def needs_calibration(self) -> bool:
        """Where there is a goal."""
        return bool(self.goal)

    def calibrate(self, records: Records) -> Self:
        """With the threshold that reaches the goal best on these records."""
        return replace(self, threshold=choose_threshold(records["score"], records["positive"], self.goal))

    def texts(self, predictions: Arrays, geometries: Sequence[Geometry]) -> dict[str, list[str]]:  # noqa: ARG002
        """The answer to each example, without the rest of an answer, which would take most of a server's time
        for a request."""
        return {"label": [self.classes[i] for i in self._decide(predictions["probabilities"])]}

    def describe_target(self, target: Arrays, geometry: Geometry) -> Answer:  # noqa: ARG002
        label = self.classes[int(target["class"])]
        return Answer(kind="classes", text=label, values={"label": label}, columns=("label",))

    # --- scores ---

    def records(self, predictions: Arrays, targets: Mapping[str, Stored]) -> Records:
        """`target`, `predicted`, `confidence` in it and the `bin` of that for calibration, `loss` in nats, and the
        `probabilities` of up to 100 classes; `rank` of the target where there are more than 5 classes; `positive` and
        its `score` where one of two is the positive class; `distance` in ranks where classes are ordered."""
        probabilities, target = predictions["probabilities"], np.asarray(targets["class"])
        check_probabilities(probabilities, target)
        predicted = self._decide(probabilities)
        confidence = np.take_along_axis(probabilities, predicted[:, None], 1)[:, 0].astype(np.float64).clip(0, 1)
        records = {
            "target": target.astype(np.int64),
            "predicted": predicted,
            "confidence": confidence,
            "bin": np.ceil(confidence * CALIBRATION_BINS).astype(np.int64).clip(1) - 1,
            "loss": log_losses(probabilities, target),
        }
        if len(self.classes) <= MATRIX_CLASSES:
            records["probabilities"] = probabilities
        if probabilities.shape[1] > 5:
            records["rank"] = rank_targets(probabilities, target)
        if self.positive_class:
            position = self._positions[self.positive_class]
            records |= {"positive": target == position, "score": probabilities[:, position].astype(np.float64)}
        if (ranks := find_order(self.classes)) is not None:
            records["distance"] = np.abs(np.array(ranks)[predicted] - np.array(ranks)[target])
        return records

    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every score as a fraction, but `log_loss` in nats. `top5_accuracy` where there are more than 5 classes.

        `balanced_accuracy` is the mean recall over the classes that occur; `macro_f1` the mean F1
        over those that occur or were predicted, as in scikit-learn. Of two classes, `sensitivity` is the recall of the
        positive one, `specificity` that of the other; they, `auroc` and `average_precision` may be NaN where all
        examples are of one class. `mean_rank_error` is in ranks, of ordered classes.
        """
        weights = np.ones(len(records["target"])) if weights is None else weights
        return {name: float(values[0]) for name, values in self.resampled_scores(records, weights[None]).items()}

    def undefined_scores(self, records: Records) -> Collection[str]:
        """The means over classes and what tells two classes apart, where all examples are of one."""
        if len(np.unique(records["target"])) > 1:
            return ()
        if "positive" not in records:
            return OVER_CLASSES
        return (
            *OVER_CLASSES,
            "auroc",
            "average_precision",
            "specificity" if records["positive"].all() else "sensitivity",
        )

    def describe_scores(self, records: Records) -> list[str]:
        """Over how many classes the means are."""
        occurring, names = len(np.unique(records["target"])), " and ".join(OVER_CLASSES)
        if self.undefined_scores(records):
            return [f"All examples are of one class, so {names} are not defined."]
        if occurring < len(self.classes):
            return [
                f"{names} are means over the {occurring} of {len(self.classes)} classes with examples in this split."
            ]
        return []

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Everything but the sums over examples is computed for all R at once."""
        count = weights.sum(1)
        right, occurring, predicted = count_classes(records, weights)
        scores = {"accuracy": right.sum(1) / count}
        if "rank" in records:
            scores["top5_accuracy"] = (weights * (records["rank"] < 5)).sum(1) / count
        scores["balanced_accuracy"] = mean_ratio(right, occurring)
        scores["macro_f1"] = mean_ratio(2 * right, occurring + predicted)
        scores["log_loss"] = (weights * records["loss"]).sum(1) / count
        scores["calibration_error"] = calibration_error(*sum_bins(records, weights))
        if "positive" in records:
            positive, right_ones = records["positive"], records["target"] == records["predicted"]
            scores["auroc"], scores["average_precision"] = rank_scores(records["score"], positive, weights)
            for name, own in (("sensitivity", positive), ("specificity", ~positive)):
                with np.errstate(invalid="ignore"):
                    scores[name] = weights @ (own & right_ones).astype(float) / (weights @ own.astype(float))
        if "distance" in records:
            scores["mean_rank_error"] = weights @ records["distance"] / count
        return scores

    def closed_intervals(self, records: Records) -> dict[str, tuple[float, float]]:
        """Wilson's, of the scores that are shares of examples."""
        right = {"accuracy": records["target"] == records["predicted"]}
        if "rank" in records:
            right["top5_accuracy"] = records["rank"] < 5
        if "positive" in records:
            positive, both = records["positive"], right["accuracy"]
            right |= {n: both[own] for n, own in (("sensitivity", positive), ("specificity", ~positive)) if own.any()}
        return {name: wilson_interval(int(one.sum()), len(one)) for name, one in right.items()}

    def closed_difference(self, before: Records, after: Records) -> Difference | None:
        """Agresti and Min's, of the accuracy."""
        if self.metric.name != "accuracy":
            return None
        return share_difference(*(side["predicted"] == side["target"] for side in (before, after)))

    def constant_baseline(self, targets: Mapping[str, Stored]) -> tuple[str, Records] | None:
        """The frequencies of the classes as probabilities, so the most frequent one is the answer."""
        if not self.frequencies:
            return None
        frequencies = np.array(self.frequencies, np.float32)
        predictions = {"probabilities": np.tile(frequencies, (len(targets["class"]), 1))}
        return f'always answering "{self.classes[frequencies.argmax()]}"', self._plain.records(predictions, targets)

    def linear_baseline(
        self, features: Any, targets: Mapping[str, Stored], other_features: Any, other_targets: Mapping[str, Stored]
    ) -> tuple[str, Records] | None:
        """A logistic regression."""
        learned = np.asarray(targets["class"])
        predicted = _linear.classify(features, learned, len(self.classes), other_features)
        if predicted is None:
            return None
        return "logistic regression", self._plain.records({"probabilities": predicted}, other_targets)

    def tree_baseline(
        self,
        columns: TreeColumns,
        targets: Mapping[str, Stored],
        other_columns: TreeColumns,
        other_targets: Mapping[str, Stored],
    ) -> tuple[str, Records] | None:
        predicted = _trees.classify(columns, np.asarray(targets["class"]), len(self.classes), other_columns)
        if predicted is None:
            return None
        return _trees.NAME, self._plain.records({"probabilities": predicted}, other_targets)

    def find_suspects(self, features: np.ndarray, targets: Mapping[str, Stored]) -> list[SuspectTarget] | None:
        """By confident learning."""
        return suspect_classes(features, np.asarray(targets["class"]), len(self.classes))

    def map_colors(self, targets: Mapping[str, Stored]) -> MapColors:
        return MapColors(groups=np.asarray(targets["class"]), names=self.classes)

    def errors(self, records: Records) -> np.ndarray:
        """The confidence in a wrong class."""
        wrong = records["predicted"] != records["target"]
        errors: np.ndarray = wrong * records["confidence"]
        return errors

    def drift(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """The total variation distance of the probabilities."""
        difference = answered["probabilities"] - expected["probabilities"]
        distances: np.ndarray = np.abs(difference).sum(1) / 2
        return distances

    def agreement(self, expected: Arrays, answered: Arrays) -> np.ndarray:
        """Whether the same class is decided for."""
        same: np.ndarray = self._decide(expected["probabilities"]) == self._decide(answered["probabilities"])
        return same

    def evaluate(self, records: Records) -> dict[str, Json]:
        """`curves` of two classes, `per_class` (with the area under the ROC curve of one class against the rest),
        `confusion` (rows are true classes, columns predicted ones; None for more than 100 classes),
        `confused` (the most frequent mistakes) and `reliability`.

        A figure that isn't defined, such as the recall of a class without examples, is None.
        """
        classes = self.classes
        ones = np.ones((1, len(records["target"])))
        few = len(classes) <= MATRIX_CLASSES
        figures: dict[str, Json] = {}
        table = per_class(classes, *(counts[0] for counts in count_classes(records, ones, len(classes))))
        if "positive" in records:
            decided = records["predicted"] == self._positions[self.positive_class]
            figures["curves"] = curve_figures(records["score"], records["positive"], decided)
            figures["positive_class"] = self.positive_class
            figures["threshold"] = 0.5 if self.threshold is None else self.threshold
        elif few:
            for i, row in enumerate(table):
                area = float(rank_scores(records["probabilities"][:, i], records["target"] == i, ones)[0][0])
                row["auroc"] = None if math.isnan(area) else area
        return figures | {
            "per_class": table,
            "confusion": confusion_matrix(records, len(classes)).tolist() if few else None,
            "confused": confused_pairs(records, classes),
            "reliability": [
                {"confidence": confidence / n if n else None, "accuracy": right / n if n else None, "count": int(n)}
                for right, n, confidence in zip(*(sums[0].tolist() for sums in sum_bins(records, ones)), strict=True)
            ],
        }

    @classmethod
    def sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        """Scores of each class, the confusion matrix of up to 20 classes, the most frequent mistakes, calibration."""
        return draw_figures(figures)


@lru_cache(maxsize=8)
def _on_device(weights: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(K,); read once, since a step must not wait for a copy."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32).to(device, dtype)


TASK = Classification
