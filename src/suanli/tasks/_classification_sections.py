"""The figures of a classification as the report shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from suanli.core.sections import Format, Line, Matrix, Plot, Section, Table
from suanli.core.types import Json
from suanli.tasks._curves import draw_curves

MATRIX_CLASSES = 20  # cells of a larger matrix are too small to read
PAIRS_BESIDE = 8  # the most frequent mistakes that fit beside a matrix


def draw_figures(figures: Mapping[str, Json]) -> list[Section]:
    """Of `Classification.evaluate`, any of which may be missing, or be of an older version."""
    classes = figures.get("per_class") or []
    sections: list[Section] = [] if not classes else [_class_table(classes)]
    if curves := figures.get("curves"):
        sections += draw_curves(curves, figures["positive_class"], figures["threshold"])
    sections += _confusion(
        figures.get("confusion"), [str(row.get("name")) for row in classes], figures.get("confused") or []
    )
    return [*sections, *_calibration(figures.get("reliability") or [])]


def _class_table(classes: Sequence[Mapping[str, Json]]) -> Table:
    columns = {"name": "class", "count": "examples"}
    areas = [area for row in classes if (area := row.get("auroc")) is not None]
    if areas:
        columns["auroc"] = "AUROC"
    columns |= {"precision": "precision", "recall": "recall", "f1": "F1"}

    shares: list[Format] = ["percent"] * (len(columns) - 2)

    def f1(row: Mapping[str, Json]) -> float:
        value = row.get("f1")
        return value if value is not None and value >= 0 else 2.0  # an unknown one is last

    return Table(
        title="Each class",
        columns=tuple(columns.values()),
        formats=("text", "count", *shares),
        rows=tuple(tuple(row.get(name) for name in columns) for row in sorted(classes, key=f1)),
        note="Each class, the lowest F1 first."
        + (
            f" AUROC is the area under the ROC curve of one class against the rest; its mean is "
            f"{100 * sum(areas) / len(areas):.1f} %."
            if areas
            else ""
        ),
    )


def _confusion(counts: Json, names: Sequence[str], pairs: Sequence[Mapping[str, Json]]) -> Iterator[Section]:
    drawn = counts and len(counts) <= MATRIX_CLASSES and all(len(row) == len(counts) for row in counts)
    if drawn:
        yield Matrix(
            title="Confusion",
            names=tuple(names if len(names) == len(counts) else map(str, range(len(counts)))),
            counts=tuple(map(tuple, counts)),
            note="Confusion matrix.",
        )
    if pairs:
        yield Table(
            title="" if drawn else "Confusion",
            columns=("true", "predicted as", "examples"),
            formats=("text", "text", "count"),
            rows=tuple(
                (pair.get("true"), pair.get("predicted"), pair.get("count"))
                for pair in pairs[: PAIRS_BESIDE if drawn else None]
            ),
            note="Most confused classes.",
        )


def _calibration(bins: Sequence[Mapping[str, Json]]) -> Iterator[Plot]:
    """Stated confidence against the share that was right."""
    filled = [one for one in bins if one.get("count") and None not in (one.get("confidence"), one.get("accuracy"))]
    if filled:
        exact = Line(label="perfectly calibrated", points=((0.0, 0.0), (1.0, 1.0)), is_rule=True)
        measured = Line(
            label="this model",
            points=tuple((one["confidence"], one["accuracy"]) for one in filled),
            weights=tuple(one["count"] for one in filled),
            is_joined=True,
        )
        yield Plot(
            title="Calibration",
            x_label="confidence",
            lines=(exact, measured),
            x_range=(0.0, 1.0),
            y_range=(0.0, 1.0),
            note="Reliability. Horizontal: the confidence of the model; vertical: the accuracy at that confidence. "
            "Larger dots hold more examples. Below the dashed line the model is overconfident, above it the reverse.",
        )
