"""ROC and precision-recall curves of a binary score, and the threshold that is chosen on them.

N examples, R resamples. Scores of equal size are one step of a curve, so that their order changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import BeforeValidator

from suanli.core.errors import UsageError
from suanli.core.sections import Line, Plot, Section

# A setting on the command line is read as JSON where it can be, and names of classes may be 1 or true.
Text: TypeAlias = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else json.dumps(value))]
DRAWN = 200  # points of a curve
GOALS = "f1, balanced, sensitivity>=0.95, specificity>=0.95, precision>=0.9, cost=5:1 (a miss costs 5 false alarms)"
_GOAL = re.compile(
    r"(?P<name>f1|balanced)|(?P<bounded>sensitivity|specificity|precision)>=(?P<bound>0?\.\d+|0|1|1\.0+)"
    r"|cost=(?P<miss>\d+(\.\d+)?):(?P<alarm>\d+(\.\d+)?)|threshold=(?P<threshold>0?\.\d+)"
)


def rank_scores(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The area under the ROC curve and the average precision (R,) for scores (N,), bool (N,) and weights (R, N). NaN
    where positives have no weight, and of the area where negatives have none.

    The area is the share of pairs in the right order, equal ones counted half. The average precision is the sum of
    precisions weighted by the steps in recall, without interpolation, as in scikit-learn.
    """
    yes, no = _count_steps(scores, positive, weights)
    above, wrong = yes.cumsum(1), no.cumsum(1)
    all_yes, all_no = above[:, -1], wrong[:, -1]
    precision = np.divide(above, above + wrong, out=np.zeros_like(above), where=above > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((above - yes / 2) * no).sum(1) / (all_yes * all_no), (yes * precision).sum(1) / all_yes


def _count_steps(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights (R, S) of positives and of negatives for each different score, the highest first."""
    order = np.argsort(-scores, kind="stable")
    starts = _starts(scores[order])
    sorted_weights, is_yes = weights.take(order, axis=1), positive[order].astype(np.float64)
    yes = np.add.reduceat(sorted_weights * is_yes, starts, axis=1)
    return yes, np.add.reduceat(sorted_weights * (1 - is_yes), starts, axis=1)


def _starts(ordered: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


# --- the threshold --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What each threshold gives, from "none is positive" (the first) to "all are": (S + 1,)."""

    thresholds: np.ndarray  # between two scores
    true: np.ndarray  # positives at or above it
    false: np.ndarray  # negatives at or above it

    @classmethod
    def of(cls, scores: np.ndarray, positive: np.ndarray) -> Steps:
        yes, no = (one[0] for one in _count_steps(scores, positive, np.ones((1, len(scores)))))
        different = np.unique(scores)[::-1].astype(np.float64)
        middle = (different[:-1] + different[1:]) / 2
        above = np.nextafter(np.float32(different[0]), np.float32(2))
        return cls(
            thresholds=np.concatenate([[max((different[0] + 1) / 2, float(above))], middle, [0.0]]),
            true=np.concatenate([[0], yes.cumsum()]),
            false=np.concatenate([[0], no.cumsum()]),
        )

    @property
    def sensitivity(self) -> np.ndarray:
        shares: np.ndarray = self.true / max(self.true[-1], 1)
        return shares

    @property
    def specificity(self) -> np.ndarray:
        shares: np.ndarray = 1 - self.false / max(self.false[-1], 1)
        return shares

    @property
    def precision(self) -> np.ndarray:
        """1 where none is positive."""
        count = self.true + self.false
        shares: np.ndarray = np.divide(self.true, count, out=np.ones_like(count), where=count > 0)
        return shares

    @property
    def f1(self) -> np.ndarray:
        shares: np.ndarray = 2 * self.true / np.maximum(self.true[-1] + self.true + self.false, 1)
        return shares


def check_goal(goal: str) -> None:
    """Raises UsageError for what is no goal."""
    if not _GOAL.fullmatch(goal.replace(" ", "")):
        raise UsageError(f"goal is {goal!r}.", fix=f"Give one of: {GOALS}, threshold=0.3.")


def choose_threshold(scores: np.ndarray, positive: np.ndarray, goal: str) -> float | None:
    """The threshold at or above which a score is positive, that reaches the goal best on these examples: of those that
    keep a bound, the one with the fewest mistakes of the other kind. None: without positives and negatives there is
    none to choose."""
    match = _GOAL.fullmatch(goal.replace(" ", ""))
    assert match is not None, goal
    if (fixed := match["threshold"]) is not None:
        return float(fixed)
    if positive.all() or not positive.any():
        return None
    steps = Steps.of(scores, positive)
    if match["miss"] is not None:
        value = -float(match["miss"]) * (steps.true[-1] - steps.true) - float(match["alarm"]) * steps.false
    elif match["bounded"] is not None:
        kept = {"sensitivity": steps.sensitivity, "specificity": steps.specificity, "precision": steps.precision}
        reached = kept[match["bounded"]] >= float(match["bound"]) - 1e-12
        other = steps.specificity if match["bounded"] == "sensitivity" else steps.sensitivity
        value = np.where(reached, other, -1.0)
    else:
        value = steps.f1 if match["name"] == "f1" else steps.sensitivity + steps.specificity
    return float(steps.thresholds[value.argmax()])


# --- for the report -------------------------------------------------------------------------


def curve_figures(scores: np.ndarray, positive: np.ndarray, decided: np.ndarray) -> dict[str, Any] | None:
    """Points of both curves, at most 200 each, and where the decisions (N,) lie on them; None where either class is
    missing, since they aren't defined then."""
    if positive.all() or not positive.any():
        return None
    steps = Steps.of(scores, positive)
    places = np.unique(np.linspace(0, len(steps.true) - 1, DRAWN).round().astype(int))
    roc = np.stack([1 - steps.specificity, steps.sensitivity], axis=1)[places]
    recall = np.stack([steps.sensitivity, steps.precision], axis=1)[places[1:]]
    hits = float((decided & positive).sum())
    sensitivity, false_rate = hits / positive.sum(), float((decided & ~positive).sum() / (~positive).sum())
    return {
        "roc": roc.tolist(),
        "precision_recall": recall.tolist(),
        "sensitivity": float(sensitivity),
        "specificity": 1 - false_rate,
        "precision": hits / float(decided.sum()) if decided.any() else None,
        "share": float(positive.mean()),
    }


def draw_curves(figures: Any, positive: str, threshold: float) -> list[Section]:
    """Both curves side by side, with the point at which the model decides."""
    share = figures["share"]
    chance = Line(label="by chance", points=((0.0, 0.0), (1.0, 1.0)), is_rule=True)
    level = Line(label="by chance", points=((0.0, share), (1.0, share)), is_rule=True)
    at = [(1 - figures["specificity"], figures["sensitivity"]), (figures["sensitivity"], figures["precision"])]
    curves = (("ROC and precision-recall curves", "roc", chance), ("", "precision_recall", level))
    labels = ("1 − specificity", "sensitivity (recall)")
    notes = (
        f'ROC curve. Vertical: the share of "{positive}" that is found; horizontal: the share of others taken for it.',
        f'Precision-recall curve. Vertical: the share of answers "{positive}" that are right; horizontal: the share '
        "that is found.",
    )
    dot = f"at the threshold {threshold:.3g}"
    return [
        Plot(
            title=title,
            x_label=label,
            lines=(rule, Line(label="this model", points=_points(figures[name])), *_dot(dot, point)),
            x_range=(0.0, 1.0),
            y_range=(0.0, 1.0),
            note=note,
        )
        for (title, name, rule), label, note, point in zip(curves, labels, notes, at, strict=True)
    ]


def _points(points: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in points)


def _dot(label: str, point: tuple[float, float | None]) -> tuple[Line, ...]:
    x, y = point
    return () if y is None else (Line(label=label, points=((x, y),), weights=(1.0,)),)
