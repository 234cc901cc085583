"""The figures of a classification as the report shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from suanli.core.sections import Line, Matrix, Plot, Section, Table
from suanli.core.types import Json

MATRIX_CLASSES = 20  # cells of a larger matrix are too small to read
PAIRS_BESIDE = 8  # the most frequent mistakes that fit beside a matrix


def draw_figures(figures: Mapping[str, Json]) -> list[Section]:
    """Of `Classification.evaluate`, any of which may be missing, or be of an older version."""
    classes = figures.get("per_class") or []
    sections: list[Section] = [] if not classes else [_class_table(classes)]
    sections += _confusion(
        figures.get("confusion"), [str(row.get("name")) for row in classes], figures.get("confused") or []
    )
    return [*sections, *_calibration(figures.get("reliability") or [])]


def _class_table(classes: Sequence[Mapping[str, Json]]) -> Table:
    columns = {"name": "class", "count": "inputs", "precision": "precision", "recall": "recall", "f1": "F1"}

    def f1(row: Mapping[str, Json]) -> float:
        value = row.get("f1")
        return value if value is not None and value >= 0 else 2.0  # an unknown one is last

    return Table(
        title="Each class",
        columns=tuple(columns.values()),
        formats=("text", "count", "percent", "percent", "percent"),
        rows=tuple(tuple(row.get(name) for name in columns) for row in sorted(classes, key=f1)),
        note="Each class, the lowest F1 first.",
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
            columns=("true", "predicted as", "inputs"),
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
            note="Reliability. Across: the confidence that the model states; up: the share of those answers that are "
            "right. Larger dots hold more inputs. Below the dashed line the model is surer than it should be, above "
            "it less sure.",
        )
