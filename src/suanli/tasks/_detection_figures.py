"""The threshold of a detector, and what the report shows of its answers: curves, confusion, kinds of mistakes.

"Shown" are the boxes whose scores reach the threshold. All figures but the average precision are at an overlap of 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from suanli.core.compare import resampled_interval
from suanli.core.errors import UsageError
from suanli.core.sections import Line, Matrix, Plot, Section, Table
from suanli.core.task import Records
from suanli.core.types import Json
from suanli.tasks._average_precision import STEPS, ClassAnswers, class_precisions
from suanli.tasks._matching import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    PLACE,
    RIGHT,
    UNCOUNTED,
    Matches,
    Objects,
)

GOALS = "f1, precision>=0.9, recall>=0.9, threshold=0.3"
_GOAL = re.compile(
    r"f1|(?P<bounded>precision|recall)>=(?P<bound>0?\.\d+|0|1|1\.0+)|threshold=(?P<threshold>0?\.\d+|0|1|1\.0+)"
)
DRAWN = 3  # classes whose curves are drawn: those with the most objects
BACKGROUND_NAME = "background"
KINDS = {  # of shown boxes that are wrong
    CLASS: ("class", "on an object of another class"),
    PLACE: ("place", "near an object of its class, at an overlap below 0.5"),
    BOTH: ("class and place", "near an object of another class, at an overlap below 0.5"),
    DUPLICATE: ("duplicate", "on an object that a better box has found already"),
    BACKGROUND: ("background", "where no object is"),
}


# --- the threshold --------------------------------------------------------------------------


def check_goal(goal: str) -> None:
    """Raises UsageError for what is no goal."""
    if not _GOAL.fullmatch(goal.replace(" ", "")):
        raise UsageError(f"goal is {goal!r}.", fix=f"Give one of: {GOALS}.")


def choose_threshold(records: Records, goal: str) -> float | None:
    """The score from which boxes are shown that reaches the goal best on these records: of those that keep a bound, the
    one with the most of the other. Where none keeps it, the one that comes nearest. None: there are no objects or no
    answers to choose by."""
    match = _GOAL.fullmatch(goal.replace(" ", ""))
    assert match is not None, goal
    if (fixed := match["threshold"]) is not None:
        return float(fixed)
    counted = _counted(records)
    scores = records["score"][counted].astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], (records["kind"][counted] == RIGHT)[order]
    objects = int(records["objects"][:, :, 0].sum())
    if not len(scores) or not objects:
        return None
    last = np.flatnonzero(np.concatenate([scores[1:] != scores[:-1], [True]]))
    found, shown = right.cumsum()[last], last + 1
    precision, recall = found / shown, found / objects
    if match["bounded"] is None:
        best = int((2 * found / (objects + shown)).argmax())
    else:
        kept, other = (precision, recall) if match["bounded"] == "precision" else (recall, precision)
        reached = kept >= float(match["bound"]) - 1e-12
        best = int(np.where(reached, other, -1).argmax() if reached.any() else kept.argmax())
    here, below = scores[last[best]], scores[last[best + 1]] if best + 1 < len(last) else 0.0
    return float((here + below) / 2)


def _counted(records: Records) -> np.ndarray:
    """(N, M): answers that are right or wrong."""
    counted: np.ndarray = (records["class"] >= 0) & (records["kind"] != UNCOUNTED)
    return counted


def shown_scores(records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
    """F1, precision and recall (R,) of the shown boxes of all classes together, for weights (R, N)."""
    shown = records["shown"] & _counted(records)
    right = weights @ (shown & (records["kind"] == RIGHT)).sum(1)
    answers, objects = weights @ shown.sum(1), weights @ records["objects"][:, :, 0].sum(1)
    return {
        "f1": _divide(2 * right, answers + objects),
        "precision": _divide(right, answers),
        "recall": _divide(right, objects),
    }


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """1 where there is nothing to find or to show."""
    shares: np.ndarray = np.divide(part, whole, out=np.ones_like(part, np.float64), where=whole > 0)
    return shares


# --- one image ------------------------------------------------------------------------------


def judge(matches: Matches, objects: Objects) -> tuple[list[str | None], list[str | None]]:
    """What each answer (D,) is, "right" or the kind of its mistake, and whether each object (G,) is found: "right" or
    "missed". None: it doesn't count."""
    names: dict[int, str | None] = {
        RIGHT: "right",
        DUPLICATE: "duplicate",
        BACKGROUND: "on background",
        UNCOUNTED: None,
    }
    names |= {kind: f"wrong {KINDS[kind][0]}" for kind in (CLASS, PLACE, BOTH)}
    found = set(matches.object[matches.kind == RIGHT].tolist())
    objects_found: list[str | None] = [
        None if ignored else "right" if i in found else "missed" for i, ignored in enumerate(objects.ignored.tolist())
    ]
    return [names[kind] for kind in matches.kind.tolist()], objects_found


# --- figures --------------------------------------------------------------------------------


def evaluate(records: Records, classes: Sequence[str], threshold: float) -> dict[str, Json]:
    """`per_class`, `curves` (of each class, precision at 101 steps of recall), `confusion` (rows true, columns shown,
    the background last), `kinds_of_mistakes` (shown boxes by kind, and missed objects), `threshold`."""
    matrix = _count_confusions(records, len(classes))
    shown = records["shown"] & _counted(records)
    kinds = np.bincount(records["kind"][shown].astype(int), minlength=UNCOUNTED + 1)
    missed = int(records["objects"][:, :, 0].sum() - kinds[RIGHT])
    return {
        "threshold": threshold,
        "per_class": _per_class(records, classes, shown),
        "curves": [
            {"name": name, "precision": precision}
            for label, name in enumerate(classes)
            if (precision := _curve(ClassAnswers.of(records, label))) is not None
        ],
        "confusion": {"names": [*classes, BACKGROUND_NAME], "counts": matrix.tolist()},
        "kinds_of_mistakes": {
            "right": int(kinds[RIGHT]),
            **{name: int(kinds[kind]) for kind, (name, _) in KINDS.items()},
            "missed": missed,
        },
    }


def _per_class(records: Records, classes: Sequence[str], shown: np.ndarray) -> list[dict[str, Json]]:
    """Counts and scores of each class; one that isn't defined is None. The interval is of the average precision."""
    objects = records["objects"][:, :, 0].sum(0)
    ones = np.ones((1, len(records["score"])))
    precisions = class_precisions(records, ones)[0]
    lows, highs = resampled_interval(len(records["score"]), partial(class_precisions, records), precisions)
    rows = []
    for label, name in enumerate(classes):
        own = shown & (records["class"] == label)
        answers, right = int(own.sum()), int((own & (records["kind"] == RIGHT)).sum())
        count = int(objects[label])
        at_half = float(ClassAnswers.of(records, label).average_precision(ones, 0, (0,))[0, 0])
        values = {
            "average_precision": float(precisions[label]),
            "low": float(lows[label]),
            "high": float(highs[label]),
            "average_precision_50": at_half,
            "precision": right / answers if answers else np.nan,
            "recall": right / count if count else np.nan,
            "f1": 2 * right / (answers + count) if answers + count else np.nan,
        }
        rows.append({"name": name, "count": count, **{n: None if np.isnan(v) else v for n, v in values.items()}})
    return rows


def _curve(one: ClassAnswers) -> list[float] | None:
    """The best precision (101,) of each step of recall or beyond; None: there is no object."""
    counts = one.uncounted[:, 0] & 1 == 0
    hits = (one.hit[:, 0] & 1)[counts]
    objects = one.objects[:, 0].sum()
    if not objects:
        return None
    if not len(hits):
        return [0.0] * len(STEPS)
    groups = one.groups[counts]
    last = np.flatnonzero(np.concatenate([groups[1:] != groups[:-1], [True]]))
    found = hits.cumsum()[last]
    best = np.maximum.accumulate((found / (last + 1))[::-1])[::-1]
    place = np.searchsorted(found / objects, STEPS)
    precision: list[float] = np.append(best, 0.0)[place].tolist()
    return precision


def _count_confusions(records: Records, classes: int) -> np.ndarray:
    """(K + 1, K + 1): each object once, under the class of the shown box that found it, or else that takes it for
    another class, or else under background; and each shown box that has no object of its own in the last row."""
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    shown = records["shown"] & _counted(records)
    kind, label, true, about = (records[name] for name in ("kind", "class", "object_class", "object"))
    right = shown & (kind == RIGHT)
    np.add.at(matrix, (true[right], label[right]), 1)
    taken = {(int(image), int(about[image, place])) for image, place in zip(*np.nonzero(right), strict=True)}
    for image, place in zip(*np.nonzero(shown & (kind != RIGHT)), strict=True):  # the best of an image first
        own = (int(image), int(about[image, place]))
        if kind[image, place] == CLASS and own not in taken:
            taken.add(own)
            matrix[true[image, place], label[image, place]] += 1
        else:
            matrix[classes, label[image, place]] += 1
    matrix[:classes, classes] = records["objects"][:, :, 0].sum(0) - matrix[:classes, :classes].sum(1)
    return matrix


# --- for the report -------------------------------------------------------------------------


def sections(figures: Mapping[str, Json]) -> list[Section]:
    """Of `evaluate`; any figure may be missing."""
    parts: list[Section] = []
    if rows := figures.get("per_class"):
        parts.append(_class_table(rows))
    if curves := figures.get("curves"):
        parts.append(_curve_plot(curves, rows or []))
    threshold = figures.get("threshold")
    if mistakes := figures.get("kinds_of_mistakes"):
        parts.append(_mistake_table(mistakes, threshold))
    if confusion := figures.get("confusion"):
        parts.append(
            Matrix(
                title="Confusion of classes",
                names=tuple(confusion["names"]),
                counts=tuple(tuple(row) for row in confusion["counts"]),
                note="Rows are true, columns shown. Under background: objects that no box found, and boxes on no "
                "object of their own.",
            )
        )
    return parts


def _class_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {
        "name": "class",
        "count": "objects",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "average_precision_50": "AP at 0.5",
        "low": "from",
        "high": "to",
        "average_precision": "AP",
    }
    ordered = sorted(rows, key=lambda row: 2.0 if (value := row.get("average_precision")) is None else value)
    return Table(
        title="Each class",
        columns=tuple(columns.values()),
        formats=("text", "count", *("percent",) * 7),
        rows=tuple(tuple(row.get(name) for name in columns) for row in ordered),
        note="AP is the average precision over overlaps from 0.5 to 0.95, with its 95 % interval; the lowest first.",
    )


def _curve_plot(curves: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Plot:
    counts = {row["name"]: row["count"] for row in rows}
    drawn = sorted(curves, key=lambda one: -counts.get(one["name"], 0))[:DRAWN]
    return Plot(
        title="Precision and recall",
        x_label="recall",
        lines=tuple(
            Line(label=one["name"], points=tuple(zip(STEPS.tolist(), one["precision"], strict=True))) for one in drawn
        ),
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        note="Vertical: the best precision at this recall or a higher one, at an overlap of 0.5"
        + ("." if len(curves) <= DRAWN else f", of the {DRAWN} classes with the most objects."),
    )


def _mistake_table(mistakes: Mapping[str, int], threshold: float | None) -> Table:
    whys = {"right": "on an object of its class", **dict(KINDS.values()), "missed": "objects that no shown box found"}
    at = "" if threshold is None else f" with a score of at least {threshold:.3g}"
    return Table(
        title="Kinds of mistakes",
        columns=("kind", "what", "count"),
        formats=("text", "text", "count"),
        rows=tuple((name, whys.get(name, ""), count) for name, count in mistakes.items()),
        note=f"Of the boxes{at}; among the missed objects are those with a box of another class or place.",
    )
