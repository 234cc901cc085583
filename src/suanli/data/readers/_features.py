"""Tables of features: one column is the target, all others are read, by `data/preprocess/table.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from suanli.core.errors import DataError, UsageError, unknown
from suanli.core.types import SPLITS, Columns, Source, Target
from suanli.data.column_names import LABEL_NAMES
from suanli.data.column_store import join_rows
from suanli.data.example_columns import ExampleColumns, LineNames
from suanli.data.members import fingerprint_of, order_classes, source_name, table_stem
from suanli.data.readers._annotations import LEARNED_AS_NUMBERS, MANY, numbers_error, parse_value
from suanli.data.readers._times import parse_times
from suanli.data.rows import Cell, Cells, Rows, text_of
from suanli.data.split_names import parse_splits
from suanli.data.table_files import TableRows, read_rows
from suanli.data.tables import MAX_SHOWN, find_tables, format_columns

_MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "?", "-"}  # of a target
_TARGET_WORD = re.compile(r"(?:^|[_.\s-])(?:target|label)(?:[_.\s-]|$)", re.IGNORECASE)


def read_features(path: Path, columns: Columns) -> Source:
    """The rows of the table or tables at `path`, with the column `columns.target`, or the one whose name leaves no
    doubt, as the target. Raises DataError and UsageError."""
    for option, given in (("--input-column", columns.input), ("--label-column", columns.label)):
        if columns.target is not None and given is not None:
            raise UsageError(
                f"--target reads all other columns as features, and {option} reads one.", fix="Leave one out."
            )
    files: Mapping[str | None, Path] = find_tables(path, features=True) if path.is_dir() else {None: path}  # type: ignore[assignment]
    if path.is_dir() and "train" not in files:
        raise DataError(f"{path} has no table named train.", fix="Give the table file itself.")
    notes: list[str] = []
    tables: dict[str | None, TableRows] = {}
    target = ""
    for split in sorted(files, key=lambda split: SPLITS.index(split) if split else 0):
        table = read_rows(files[split])
        notes += table.notes
        if not target:
            target, said = find_target(table, columns)
            notes += said
        elif target not in table.names:
            notes.append(f"{table.path.name} has no column {target}, skipped")
            continue
        tables[split] = table
    first = next(iter(tables.values()))
    _refuse_other_columns(first, [*tables.values()])
    return _make_source(path, tables, target, columns, notes)


def find_target(table: TableRows, columns: Columns) -> tuple[str, list[str]]:
    """The column to learn, and a note where its name says that. Raises DataError where no name does, and UsageError."""
    if columns.target is not None:
        if columns.target not in table.names:
            raise unknown(f"target column of {table.path.name}", columns.target, table.names[:MAX_SHOWN])
        return columns.target, []
    usual = [name for name in table.names if name.casefold() in LABEL_NAMES]
    named = usual or [name for name in table.names if _TARGET_WORD.search(name)]
    if len(named) == 1:
        return named[0], [f"the target is the column {named[0]}, by its name; another one: --target NAME"]
    found = (
        f"more than one of its columns may be the target: {format_columns(named)}"
        if named
        else (f"no column of it is named like a target; they are: {format_columns(table.names)}")
    )
    raise DataError(f"The table {table.path} has columns of features, and {found}.", fix="Name it: --target COLUMN.")


def _refuse_other_columns(first: TableRows, tables: Sequence[TableRows]) -> None:
    for table in tables:
        if missing := [name for name in first.names if name not in table.names]:
            raise DataError(
                f"The table {table.path} has no column {format_columns(missing)}, which {first.path.name} has.",
                fix="Give all tables the same columns.",
            )


def _make_source(
    path: Path, tables: Mapping[str | None, TableRows], target: str, columns: Columns, notes: list[str]
) -> Source:
    parts = [_Part(table, split, target, columns, notes) for split, table in tables.items()]
    annotation, classes, said = _find_annotation(path, [part.target for part in parts], columns)
    targets = [part.targets(annotation) for part in parts]
    kept = [np.flatnonzero([one is not None for one in own]) for own in targets]
    notes += said
    if (unlabelled := sum(map(len, targets)) - sum(map(len, kept))) > 0:
        notes.append(f"{unlabelled:,} rows without a target, left out")
    if not sum(map(len, kept)):
        raise DataError(f"The target column {target!r} of {path} is empty.", fix="Name another one: --target COLUMN.")
    examples = _join(parts, targets, kept)
    files = [table.path for table in tables.values()]
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return Source(
        name=source_name(path.resolve().name if path.is_dir() else table_stem(path.name)),
        kind="table",
        examples=examples,
        annotation=annotation,
        classes=classes,
        fingerprint=fingerprint_of([*stamps, "features", target, annotation, columns.group, columns.time]),
        size_bytes=sum(file.stat().st_size for file in files),
        notes=tuple(notes),
    )


class _Part:
    """The rows of one file."""

    def __init__(self, table: TableRows, split: str | None, target: str, columns: Columns, notes: list[str]) -> None:
        self.table, self.split = table, split
        cells = dict(table.rows.columns)
        self.target = cells.pop(target)
        self.path, self.target_name = table.path, target
        self.splits = self._find_splits(cells, notes)
        self.groups = self._take(cells, columns.group, "group")
        self.times = self._take(cells, columns.time, "time")
        self.time_name = columns.time
        self.rows = Rows(cells, len(table.rows))

    def _take(self, cells: dict[str, Cells], name: str | None, what: str) -> Cells | None:
        """A column that is no feature."""
        if name is None:
            return None
        if name not in cells:
            raise unknown(f"{what} column of {self.path.name}", name, [*cells][:MAX_SHOWN])
        return cells.pop(name)

    def _find_splits(self, cells: dict[str, Cells], notes: list[str]) -> Cells | None:
        """A column named split, whose cells are all splits."""
        name = next((name for name in cells if name.casefold() == "split"), None)
        if self.split is not None or name is None:
            return None
        values = {text_of(value) for value in cells[name].count()[0]}
        if values - {""} <= parse_splits(values).keys() and values - {""}:
            return cells.pop(name)
        notes.append(f"the column {name} of {self.path.name} has other words than train, val and test: a feature")
        return None

    def targets(self, annotation: str) -> list[Target]:
        """None where a row has none. Raises DataError for what is no number, where targets are numbers."""
        if annotation == "class":
            if self.target.codes is None:
                names = [text_of(self.target[i]) for i in range(len(self.target))]
                return [None if name.casefold() in _MISSING else name for name in names]
            table = [None if (t := text_of(value)).casefold() in _MISSING else t for value in self.target.values]
            return [table[code] for code in self.target.codes.tolist()]
        wrong: list[str] = []

        def parse(cell: Cell) -> float:
            text = text_of(cell)
            if text.casefold() in _MISSING:
                return math.nan
            try:
                return parse_value(text)
            except ValueError:
                wrong.append(repr(text[:40]))
                return math.nan

        numbers = self.target.numbers_or(parse)
        if wrong:
            raise numbers_error(f"The target column {self.target_name!r} of {self.path}", wrong)
        return [None if number != number else number for number in numbers.tolist()]


def _find_annotation(path: Path, targets: Sequence[Cells], columns: Columns) -> tuple[str, tuple[str, ...], list[str]]:
    """ "class" with the classes, or "value"; and notes."""
    notes: list[str] = []
    wanted = columns.annotation
    if wanted is None and all(cells.numbers is not None for cells in targets):
        wanted = "value"
        notes.append(f"the target has very many different numbers, {LEARNED_AS_NUMBERS}")
    texts: set[str] = set()
    if wanted != "value":
        texts = {text_of(value) for cells in targets for value in cells.count()[0]}
        texts = {text for text in texts if text.casefold() not in _MISSING}
    numbers = []
    for text in texts:
        try:
            numbers.append(parse_value(text))
        except ValueError:
            break
    if wanted not in ("class", "value") and wanted is not None:
        raise UsageError(
            f"A column of a table is a class or a number, and the task learns from {wanted!r} targets.",
            fix="Choose --set task=classification or --set task=regression.",
        )
    if wanted is None and len(texts) > MANY and len(numbers) == len(texts):
        notes.append(
            f"the target has {len(texts):,} different numbers, from {min(numbers):g} to {max(numbers):g}, "
            f"{LEARNED_AS_NUMBERS}"
        )
        wanted = "value"
    if wanted == "value":
        return "value", (), notes
    classes = order_classes(texts)
    if len(classes) == 1:
        raise DataError(
            f"The target of {path} is always {classes[0]!r}: there is nothing to learn.",
            fix="Name another column: --target COLUMN.",
        )
    rows = sum(map(len, targets))
    if len(classes) > MANY and len(classes) > rows / 2:
        raise DataError(
            f"The target of {path} has {len(classes):,} different values in {rows:,} rows, such as "
            f"{', '.join(classes[:3])}; these are not classes.",
            fix="Name another column: --target COLUMN.",
        )
    return "class", classes, notes


def _join(parts: Sequence[_Part], targets: Sequence[list[Target]], kept: Sequence[np.ndarray]) -> ExampleColumns:
    """The rows with a target of all files."""
    names = LineNames([(part.path.name, part.table.lines[at]) for part, at in zip(parts, kept, strict=True)])
    splits: list[str | None] = []
    groups: list[str] = []
    times: list[float] = []
    start = 0
    for part, at in zip(parts, kept, strict=True):
        own = _Window(names, start, len(at))
        start += len(at)
        if part.splits is None:
            splits += [part.split] * len(at)
        else:
            meant = parse_splits({text_of(value) for value in part.splits.count()[0]})
            splits += [meant.get(text_of(part.splits[i])) for i in at.tolist()]
        if part.groups is not None:
            groups += _group_names(part.groups, at, own)
        if part.times is not None and part.time_name is not None:
            times += parse_times(part.time_name, [text_of(part.times[i]) for i in at.tolist()], own)
    whole = [len(at) == len(part.rows) for part, at in zip(parts, kept, strict=True)]
    return ExampleColumns(
        names=names,
        targets=[own[i] for own, at in zip(targets, kept, strict=True) for i in at.tolist()],
        splits=splits,
        groups=groups or None,
        times=times or None,
        inputs=join_rows([p.rows if full else p.rows.take(at) for p, at, full in zip(parts, kept, whole, strict=True)]),
    )


class _Window(Sequence[str]):
    """Some names after another."""

    def __init__(self, names: Sequence[str], start: int, count: int) -> None:
        self._names, self._start, self._count = names, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position):  # type: ignore[no-untyped-def]  # only whole numbers are asked for
        if position >= self._count:
            raise IndexError(position)
        return self._names[self._start + position]


def _group_names(cells: Cells, at: np.ndarray, names: Sequence[str]) -> list[str]:
    groups = [text_of(cells[i]) for i in at.tolist()]
    if "" in groups:
        raise DataError(
            f"The group column has an empty cell in {names[groups.index('')]}.",
            fix="Fill it; a name that no other row has makes a group of one.",
        )
    return groups
