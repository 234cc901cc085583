"""What is suspicious about the columns of a table: one that has the target in it, an identifier that separates, a date
in the future. And a summary of each column for the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from suanli.core.sections import Section, Table
from suanli.core.types import Json
from suanli.data.preprocess._column_types import TableColumn
from suanli.data.rows import Cells, text_of

SAMPLED = 20_000  # training rows that are looked at
MANY = 64  # different values of a column
EXPLAINED = 0.98  # of what the mean or the most frequent class leaves open, from which on a column has the target in it
FEWEST = 40  # rows, with fewer nothing is said


def find_suspects(
    columns: Sequence[TableColumn], inputs: Mapping[str, np.ndarray], targets: np.ndarray
) -> Iterator[str]:
    """Columns that alone tell the targets (M,), classes or numbers, nearly exactly; `inputs` (M, …) as cached."""
    if len(targets) < FEWEST or len(np.unique(targets)) < 2:
        return
    numbers = iter(np.asarray(inputs["numbers"], np.float64).T if "numbers" in inputs else ())
    codes = iter(np.asarray(inputs["categories"]).T if "categories" in inputs else ())
    for column in columns:
        parts: list[tuple[str, np.ndarray]] = [(name, next(numbers)) for name in column.number_names]
        if column.type in ("category", "yes/no"):
            parts = [(column.name, next(codes))]
        for name, values in parts:
            share = explained(values, targets, ordered=column.type in ("number", "date"))
            if share >= EXPLAINED:
                yield (
                    f"the column {name} alone tells the target nearly exactly ({share:.1%} of what is open): if it "
                    f"isn't known before the target is, leave it out with --set columns.{column.name}=ignore"
                )


def explained(values: np.ndarray, targets: np.ndarray, *, ordered: bool) -> float:
    """Which share of what the mean, or the most frequent class, leaves open a column (M,) explains on its own: learned
    on one half of the rows and measured on the other. Where there are few different values, each has its own answer,
    else a row has that of the nearest number."""
    learn, test = np.arange(len(values)) % 2 == 0, np.arange(len(values)) % 2 == 1
    known, codes = np.unique(values, return_inverse=True)
    many = ordered and len(known) > MANY
    if targets.dtype.kind in "iu":
        usual = int(np.bincount(targets[learn]).argmax())
        if many:
            answers = targets[learn][_nearest(values[learn], values[test])]
        else:
            table = np.zeros((len(known), int(targets.max()) + 1), np.int64)
            np.add.at(table, (codes[learn], targets[learn]), 1)
            answers = np.where(table.sum(1) > 0, table.argmax(1), usual)[codes[test]]
        right, base = (answers == targets[test]).mean(), (targets[test] == usual).mean()
        return float((right - base) / (1 - base)) if base < 1 else 0.0
    wanted = targets.astype(np.float64)
    mean = wanted[learn].mean()
    if many:
        answers = wanted[learn][_nearest(values[learn], values[test])]
    else:
        sums, counts = np.bincount(codes[learn], wanted[learn], len(known)), np.bincount(codes[learn], None, len(known))
        answers = np.where(counts > 0, sums / np.maximum(counts, 1), mean)[codes[test]]
    spread = ((wanted[test] - mean) ** 2).sum()
    by_value = 1 - ((wanted[test] - answers) ** 2).sum() / spread if spread > 0 else 0.0
    return float(max(by_value, _linear(values, wanted) if ordered else 0.0))


def _nearest(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The position of the known number that is nearest to each; missing ones are the largest numbers."""
    order = np.argsort(known, kind="stable")
    ordered = np.nan_to_num(known[order], nan=np.finfo(np.float64).max)
    numbers = np.nan_to_num(asked, nan=np.finfo(np.float64).max)
    above = np.clip(np.searchsorted(ordered, numbers), 1, len(ordered) - 1)
    below = above - 1
    with np.errstate(over="ignore"):
        nearer = np.where(numbers - ordered[below] <= ordered[above] - numbers, below, above)
    positions: np.ndarray = order[nearer]
    return positions


def _linear(values: np.ndarray, targets: np.ndarray) -> float:
    """The squared correlation over the rows without missing numbers, where these are most."""
    there = np.isfinite(values)
    if there.sum() < 0.5 * len(values) or not np.ptp(values[there]) or not np.ptp(targets[there]):
        return 0.0
    return float(np.corrcoef(values[there], targets[there])[0, 1] ** 2)


def find_separating(columns: Sequence[TableColumn], cells: Mapping[str, Cells], targets: np.ndarray) -> Iterator[str]:
    """Identifiers whose order tells the target: the rows may be sorted by it."""
    if len(targets) < FEWEST:
        return
    for column in columns:
        if column.type != "identifier":
            continue
        texts = [text_of(cells[column.name][i]) for i in range(len(targets))]
        try:
            places = np.array([float(text) for text in texts])
        except ValueError:
            places = np.unique(np.array(texts), return_inverse=True)[1].astype(np.float64)
        if (share := explained(places, targets, ordered=True)) >= EXPLAINED:
            yield (
                f"the identifier {column.name}, which is left out, tells the target by its order ({share:.1%} of what "
                "is open): the rows may come from several sources, one for each target"
            )


def find_future(columns: Sequence[TableColumn]) -> Iterator[str]:
    today = time.time() / 86_400
    for column in columns:
        if column.type == "date" and "days" in column.parts and (latest := column.quantiles[0][-1]) > today + 1:
            yield f"the column {column.name} has dates in the future (up to {np.datetime64(int(latest), 'D')})"


def summarize(column: TableColumn, cells: Cells) -> dict[str, Json]:
    """Of a column with these training cells, for the report."""
    missing = int(cells.find(lambda cell: column.is_missing(text_of(cell))).sum())
    summary: dict[str, Json] = {"name": column.name, "type": column.type, "missing": missing, "rows": len(cells)}
    if column.type == "number" and column.quantiles[0]:
        ends = column.quantiles[0]
        summary |= {"low": ends[0], "middle": ends[len(ends) // 2], "high": ends[-1]}
    if column.values:
        summary |= {"values": len(column.values), "first": list(column.values[:3])}
    return summary | {"note": column.note}


def data_sections(figures: Mapping[str, Json]) -> list[Section]:
    rows = []
    for one in figures.get("columns", []):
        content = ", ".join(one.get("first", ())) + (", …" if one.get("values", 0) > 3 else "")
        if "low" in one:
            content = f"{one['low']:.6g} to {one['high']:.6g}, median {one['middle']:.6g}"
        rows.append((one["name"], one["type"], content, one["note"], one["missing"] / max(one["rows"], 1)))
    if not rows:
        return []
    return [
        Table(
            title="Columns",
            columns=("column", "type", "training values", "note", "missing"),
            formats=("text", "text", "text", "text", "percent"),
            rows=tuple(rows),
            note="Texts, identifiers and constants are left out; another type: --set columns.NAME=TYPE.",
        )
    ]
