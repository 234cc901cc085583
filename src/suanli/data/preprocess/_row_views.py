"""Rows of a table as people see them: what is odd about one, the fields of a form; and as a linear model does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from suanli.core.types import Json
from suanli.data.preprocess._column_types import TableColumn, date_parser, parse_number
from suanli.data.rows import Cell, text_of, to_cell

UNSEEN, MISSING = 0, 1  # codes of categories; the values of training follow
MOST_SHOWN = 500  # values of a category in a form
ONE_HOT = 20  # values of a category that a linear baseline gets


def find_flags(columns: Sequence[TableColumn], row: Mapping[str, Cell]) -> Iterator[str]:
    """What is odd about the cells of a row, as sentences."""
    for column in columns:
        cell = to_cell(row[column.name])
        text = text_of(cell)
        if column.is_missing(text):
            continue
        shown = repr(text if len(text) <= 40 else f"{text[:39]}…")
        if column.type in ("category", "yes/no"):
            if text not in column.values:
                yield f"{column.name}: {shown} is rare or new: training hasn't learned it"
            continue
        if not column.quantiles:  # dates that are all equal
            continue
        parse = parse_number if column.type == "number" else date_parser(column, column.parts[0])
        number, ends = parse(cell), column.quantiles[0]
        if np.isnan(number):
            yield f"{column.name}: {shown} is no {column.type}, and read as missing"
        elif ends and not ends[0] <= np.float32(number) <= ends[-1]:
            unit = "" if column.type == "number" else f" ({column.parts[0]})"
            yield f"{column.name}: {shown} is outside of {ends[0]:.6g} to {ends[-1]:.6g}{unit}"


def field_of(column: TableColumn) -> dict[str, Json]:
    field: dict[str, Json] = {"name": column.name, "type": column.type}
    if column.type == "number" and column.quantiles[0]:
        ends = column.quantiles[0]
        field |= {"low": ends[0], "high": ends[-1], "example": ends[len(ends) // 2]}
    elif column.values:
        field |= {"values": list(column.values[:MOST_SHOWN]), "example": column.values[0]}
    return field


def name_code(column: TableColumn, code: int) -> str:
    if code in (UNSEEN, MISSING):
        return "unseen" if code == UNSEEN else "missing"
    return column.values[code - 2]


def features(
    inputs: Mapping[str, np.ndarray], quantiles: Sequence[Sequence[float]], cardinalities: Sequence[int]
) -> np.ndarray:
    """(N, F) float64 of rows (N, …) as cached: see `TablePreprocess.features`."""
    parts = []
    if "numbers" in inputs:
        table = np.array(quantiles)
        middle, wide = table[:, 64], table[:, 96] - table[:, 32]
        spread = np.where(wide > 0, wide, np.maximum(table[:, -1] - table[:, 0], 1e-30))
        parts.append(np.nan_to_num(np.clip((inputs["numbers"].astype(np.float64) - middle) / spread, -3, 3)))
    if "categories" in inputs:
        codes = inputs["categories"]
        for place, cardinality in enumerate(cardinalities):
            parts.append((codes[:, place, None] == np.arange(min(cardinality, ONE_HOT + 2))).astype(np.float64))
    joined = np.concatenate(parts, axis=1)
    joined /= np.sqrt(max(1, len(quantiles) + len(cardinalities)))
    return joined
