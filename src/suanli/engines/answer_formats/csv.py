"""Comma-separated values: a row for each input, or for each entry of an answer that is a list, such as a box."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from suanli.core.types import Json
from suanli.engines.answer_format import AnswerFormat, Classes
from suanli.engines.predictor import Prediction

Keys: TypeAlias = "tuple[str, ...]"  # that lead to a value


def lines(
    predictions: Iterable[Prediction],
    classes: Classes = (),  # noqa: ARG001
    annotations: Path | None = None,  # noqa: ARG001
) -> Iterator[str]:
    """Columns name, those of the task's answers, and error; quoted where needed. Of rows of a table, their own columns
    in place of the name, and the flags of each. A value with several named entries,
    such as the probabilities of all classes, gets a column for each: "probabilities.cat". Of a list, an input without
    entries has a row with its name alone.

    The entries are those of the first answer, so answers must have all of them (`top`).
    """
    failed: list[Prediction] = []  # before the first answer
    columns: list[Keys] | None = None
    for p in predictions:
        if columns is None and p.answer is None:
            failed.append(p)
            continue
        if columns is None:
            columns = _columns(p)
            yield from _head(columns, failed, p)
        yield from _rows(p, columns)
    if columns is None:
        yield from _head(_columns(failed[0]) if failed else [], failed, failed[0] if failed else None)


def _head(columns: Sequence[Keys], failed: Sequence[Prediction], first: Prediction | None) -> Iterator[str]:
    given = ["name"] if first is None or first.cells is None else list(first.cells)
    answers = [f"predicted {name}" if name in given else name for name in map(".".join, columns)]
    flags = ["flags"] if first is not None and first.flags is not None else []
    yield csv_line([*given, *answers, *flags, "error"])
    for p in failed:
        yield from _rows(p, columns)


def _columns(p: Prediction) -> list[Keys]:
    found: list[Keys] = []
    listed = p.empty.rows() is not None
    for name in p.empty.columns:
        value = None if listed else p.values[name]
        found += [(name, key) for key in sorted(value, key=_natural)] if isinstance(value, Mapping) else [(name,)]
    return found


def _natural(key: str) -> tuple[int, float, str]:
    """Numbers by their value, then the other names."""
    try:
        return 0, float(key), key
    except ValueError:
        return 1, 0.0, key


def _rows(p: Prediction, columns: Sequence[Keys]) -> Iterator[str]:
    entries = (p.answer or p.empty).rows()
    for values in [p.values] if entries is None else entries or [{}]:
        cells = []
        for name, *key in columns:
            value = values.get(name)
            cells.append(_cell(value.get(key[0]) if key and isinstance(value, Mapping) else value))
        given = [p.name] if p.cells is None else ["" if cell is None else cell for cell in p.cells.values()]
        flags = [] if p.flags is None else ["; ".join(p.flags)]
        yield csv_line([*given, *cells, *flags, p.error or ""])


def csv_line(cells: Sequence[object]) -> str:
    """Quoted where needed."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(cells)
    return stream.getvalue()


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if 1e-6 <= value <= 1 else f"{value:.9g}"
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


ANSWER_FORMAT = AnswerFormat(name="csv", title="comma-separated values", lines=lines)
