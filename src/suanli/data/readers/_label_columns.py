"""How the labels of a table are read: one class, several, or a number in a column, or columns of 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suanli.core.errors import DataError
from suanli.data.file_names import normalise_name
from suanli.data.readers._annotations import choose_annotation, parse_label
from suanli.data.readers._label_lists import describe_separator, find_separator, parse_flag, split_labels
from suanli.data.tables import Cells, Table, format_columns


@dataclass(frozen=True, slots=True)
class Labels:
    """How labels are read, alike in all tables of a data set."""

    annotation: str = "class"
    separator: str | None = None  # of several labels in one cell
    flags: tuple[str, ...] = ()  # the columns of 0 and 1

    def parse(self, table: Table, label: str, cells: Cells) -> str | float | tuple[str, ...] | None:
        """The target of a row; None: it says that there is none. Raises ValueError for what is no number or flag, where
        these are needed."""
        if self.flags:
            if missing := [name for name in self.flags if name not in table.columns]:
                raise DataError(
                    f"The table {table.path} has no column {missing[0]!r}, which the training table has.",
                    fix="Give all tables the same columns of 0 and 1.",
                )
            values = [parse_flag(cells[table.columns.index(name)]) for name in self.flags]
            names = tuple(name for name, value in zip(self.flags, values, strict=True) if value)
            if None in values or (self.annotation == "class" and len(names) != 1):
                return None
            return names if self.annotation == "labels" else names[0]
        if self.annotation == "labels":
            return split_labels(normalise_name(label), self.separator) if label else None
        return parse_label(label, self.annotation)


def find_labels(
    path: Path, table: Table, label: int, flags: tuple[int, ...], wanted: str | None
) -> tuple[Labels, tuple[str, ...]]:
    """How the labels of the first table are read, and notes. Raises DataError for labels that the task that the user
    `wanted` can't learn from."""
    if flags:
        names = tuple(table.columns[i] for i in flags)
        counts = {sum(parse_flag(cells[i]) or 0 for i in flags) for _, cells in table.rows}
        if wanted == "class" and counts != {1}:
            raise DataError(
                f"{path} has no label column, and rows with {max(counts)} of the {len(names)} columns of 0 and 1 set.",
                fix="Name the label column with --label-column, or leave --set task out to learn several labels.",
            )
        annotation = "class" if counts == {1} and wanted != "labels" else "labels"
        how = "each row has one label" if annotation == "class" else "read as several labels"
        note = f"{len(names)} columns of 0 and 1 instead of a label column ({format_columns(names[:3])}, …), {how}"
        return Labels(annotation=annotation, flags=names), (note.replace("(, …)", ""),)
    labels = [cells[label].strip() for _, cells in table.rows]
    if wanted in (None, "labels"):
        separator = find_separator(labels, wanted=wanted is not None)
        if separator is not None or wanted is not None:
            return Labels(annotation="labels", separator=separator), (describe_separator(separator),)
    annotation, notes = choose_annotation(f"The label column of {path}", labels, wanted)
    return Labels(annotation=annotation), notes


def find_flags(table: Table, known: Sequence[int | None]) -> tuple[int, ...]:
    """The positions of columns that hold 0 and 1 alone, both; empty where it is one, which may mean anything."""
    found = []
    for position in range(len(table.columns)):
        values = {} if position in known else {parse_flag(cells[position]) for _, cells in table.rows}
        if values == {0, 1}:
            found.append(position)
    return tuple(found) if len(found) > 1 else ()
