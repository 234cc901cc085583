"""Reads a table (CSV, TSV or JSON lines) with an input and a label column, or a folder of train, val and test tables.

The input column has texts, or paths of images relative to the table; its values show which. Columns are found by their
usual names, unless `--input-column` and `--label-column` name them; group and time have no usual names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from suanli.core.errors import DataError, unknown
from suanli.core.types import SPLITS, Columns, Example, Raw, Reader, Source
from suanli.data.column_names import LABEL_NAMES, PATH_NAMES, TEXT_NAMES
from suanli.data.members import (
    TABLE_SUFFIXES,
    fingerprint_of,
    format_of,
    order_classes,
    source_name,
    suffix_of,
)
from suanli.data.readers._annotated_sources import is_annotations
from suanli.data.readers._annotations import numbers_error
from suanli.data.readers._features import read_features
from suanli.data.readers._files import read_file
from suanli.data.readers._label_columns import Labels, find_flags, find_labels
from suanli.data.readers._named_images import NamedImages, find_named_images
from suanli.data.readers._times import parse_times
from suanli.data.split_names import parse_splits
from suanli.data.suffixes import IMAGE_SUFFIXES
from suanli.data.tables import MAX_SHOWN, Cells, Table, find_tables, format_columns, read_table

ID_NAMES = ("id", "image_id", "img_id", "image_name", "img_name", "img", "name", "uuid", "photo", "picture")
_NUMBER = re.compile(r"-?[\d.,e+-]+|NA|")  # or a date
MAX_TEXT_BYTES = 512 << 20  # of a table with texts, which is read into memory; larger ones are read as features
_SAMPLED = 100  # values of a column that show whether they are paths of images


@dataclass(frozen=True, slots=True)
class _ColumnChoice:
    """The columns of one table file, by position."""

    input: int
    label: int
    split: int | None
    group: int | None
    time: int | None
    flags: tuple[int, ...] = ()  # in place of a label column: columns of 0 and 1, one for each class
    images: NamedImages | None = None  # that the input column names; None: it has texts, or paths of images

    @property
    def positions(self) -> list[int]:
        return [i for i in (self.input, self.label, self.split, self.group, self.time, *self.flags) if i is not None]


class _HasFeatures(Exception):
    """The table has columns of numbers and words, and none with texts or paths of images."""


def why_not(path: Path) -> str | None:
    if path.is_dir():
        train = find_tables(path).get("train")
        if train is not None:
            return "a folder with tables of annotations" if is_annotations(train) else None
        if "train" in find_tables(path, features=True):
            return None
        return "a folder without a table named train (.csv, .tsv, .jsonl or .ndjson), or with class folders"
    if path.is_file() and suffix_of(path.name) in TABLE_SUFFIXES and is_annotations(path):
        return "a table of annotations"
    if not format_of(path.name):
        return f"not a table: its name doesn't end in {', '.join('.' + s for s in sorted(TABLE_SUFFIXES))}"
    return None


def why_no_features(path: Path) -> str | None:
    if path.is_dir():
        return None if "train" in find_tables(path, features=True) else "a folder without a table named train"
    return None if format_of(path.name) else "not a table"


def read(path: Path, columns: Columns) -> Source:
    """The rows of the table or tables at `path`.

    Raises DataError where they aren't tables with an input and a label column, or a target, UsageError for a column in
    `columns` that they don't have.
    """
    if columns.target is not None or not _may_have_texts(path):
        return read_features(path, columns)
    try:
        return _read_texts(path, columns)
    except _HasFeatures:
        return read_features(path, columns)


def _may_have_texts(path: Path) -> bool:
    """Whether its format may hold texts or paths of images; the others are read as features only."""
    if path.is_dir():
        return "train" in find_tables(path) or "train" not in find_tables(path, features=True)
    return suffix_of(path.name) in TABLE_SUFFIXES and path.stat().st_size <= MAX_TEXT_BYTES


def _read_texts(path: Path, columns: Columns) -> Source:
    """The rows with a text or the path of an image."""
    tables = find_tables(path) if path.is_dir() else {}
    if path.is_dir() and "train" not in tables:
        raise DataError(f"{path} is {why_not(path)}.", fix="Give the table file itself.")
    files: dict[str | None, Path] = {s: tables[s] for s in SPLITS if s in tables} or {None: path}
    rows: list[Example] = []
    times: list[str | None] = []  # of the rows, where there is a time column
    labels = Labels()
    notes: tuple[str, ...] = ()
    kinds: dict[str, Path] = {}
    for split, file in files.items():
        table = read_table(file)
        first = split in (None, "train")
        chosen = _choose(table, columns, first=first)
        if first and chosen is not None:  # the other tables have the same names or the usual ones
            columns = replace(columns, input=table.columns[chosen.input], label=table.columns[chosen.label])
            labels, notes = find_labels(path, table, chosen.label, chosen.flags, columns.annotation)
        if chosen is None:
            notes = (*notes, f"{file.name} has no label column, skipped")
            continue
        kinds[_kind(table, chosen)] = file
        new_rows, new_times, new_notes = _make_examples(table, chosen, split, kind=_kind(table, chosen), labels=labels)
        rows += new_rows
        times += new_times
        notes = (*notes, *new_notes)
    if columns.time is not None:
        rows = _add_times(rows, times, columns.time)
    if len(kinds) > 1:
        names = " and ".join(f"{kind}s ({file.name})" for kind, file in kinds.items())
        raise DataError(f"The tables in {path} differ: {names}.", fix="Make them alike.")
    (kind,) = kinds
    stamps = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files.values()]
    size_bytes = sum(f.stat().st_size for f in files.values())
    if kind == "image":
        size_bytes, image_stamps = _stat_files(path, rows)
        stamps += image_stamps
    return Source(
        name=source_name(path.resolve().name if path.is_dir() else path.stem),
        kind=kind,
        examples=rows,
        annotation=labels.annotation,
        classes=_find_classes(path, rows, labels),
        fingerprint=fingerprint_of([*stamps, columns.input, columns.label, *_extra_stamps(columns)]),
        size_bytes=size_bytes,
        notes=notes,
    )


def _extra_stamps(columns: Columns) -> list[str]:
    """For the fingerprint, which stays the same without them."""
    extra = {"group": columns.group, "time": columns.time}
    return [f"{name} {column}" for name, column in extra.items() if column is not None]


def _choose(table: Table, columns: Columns, *, first: bool) -> _ColumnChoice | None:
    """The columns to read. None: the table isn't the first and has no label column, like many published test sets,
    whose second column is a row number."""
    by_name = {name.casefold(): i for i, name in reversed(list(enumerate(table.columns)))}
    label = _find_named(table, columns.label, "label column", first)
    input_ = _find_named(table, columns.input, "input column", first)
    if label is None:
        label = next((by_name[n] for n in LABEL_NAMES if n in by_name and by_name[n] != input_), None)
    named = input_ is not None
    if input_ is None:
        input_ = _find_input(table, by_name, label)
    if label is None and input_ is not None and len(table.columns) == 2 and first:
        label = 1 - input_
    if label is None and not first:
        return None
    known = (
        input_,
        by_name.get("split"),
        *(_find_named(table, n, "column", False) for n in (columns.group, columns.time)),
    )
    flags = find_flags(table, known) if label is None and input_ is not None else ()
    label = flags[0] if flags else label
    if label is None or input_ is None or label == input_:
        if input_ is None and len(table.columns) > 2 and _has_features(table):
            raise _HasFeatures
        raise _missing_column_error(table, "label" if label is None else "input")
    split = by_name.get("split")
    images = None if _are_image_paths(table, input_, exist=True) else _find_images(table, input_)
    if images is None and first and not named and _are_numbers(table, input_):
        raise _HasFeatures
    chosen = _ColumnChoice(
        images=images,
        input=input_,
        label=label,
        split=None if split in (input_, label) else split,
        group=_find_named(table, columns.group, "group column", True),  # else its groups may be in other tables, too
        time=_find_named(table, columns.time, "time column", first),
        flags=flags,
    )
    for name in (table.columns[i] for i in chosen.positions):
        if table.columns.count(name) > 1:
            raise DataError(f"The table {table.path} has more than one column named {name!r}.", fix="Rename one.")
    return chosen


def _find_named(table: Table, name: str | None, what: str, first: bool) -> int | None:
    """The position of a column that the user named. Val and test tables may have other names."""
    if name is None or (name not in table.columns and not first):
        return None
    if name not in table.columns:
        raise unknown(f"{what} of {table.path.name}", name, table.columns[:MAX_SHOWN])
    return table.columns.index(name)


def _find_input(table: Table, by_name: dict[str, int], label: int | None) -> int | None:
    paths = [by_name[n] for n in PATH_NAMES if n in by_name and by_name[n] != label]
    texts = [by_name[n] for n in TEXT_NAMES if n in by_name and by_name[n] != label]
    ids = [by_name[n] for n in ID_NAMES if n in by_name and by_name[n] != label]
    for position in (*paths, *ids):
        if _are_image_paths(table, position) or _find_images(table, position):
            return position
    if texts:
        return texts[0]
    if label is not None and len(table.columns) == 2:
        return 1 - label
    return None


def _missing_column_error(table: Table, what: str) -> DataError:
    usual = LABEL_NAMES if what == "label" else (*PATH_NAMES[:4], *TEXT_NAMES[:5])
    hint = ""
    if len(table.columns) == 1 and any(c in table.columns[0] for c in "|,"):
        hint = " Its columns must be separated by commas, semicolons or tabs in .csv and tabs in .tsv."
    return DataError(
        f"The table {table.path} has no {what} column with a usual name; "
        f"its columns are: {format_columns(table.columns)}.",
        fix=f"Name it with --{what}-column, or rename it to one of: {', '.join(usual)}.{hint}",
    )


def _are_numbers(table: Table, position: int) -> bool:
    values = [value for _, cells in table.rows[:_SAMPLED] if (value := cells[position].strip())]
    return bool(values) and all(_NUMBER.fullmatch(value) for value in values)


def _find_images(table: Table, position: int) -> NamedImages | None:
    sample = [cells[position].strip() for _, cells in table.rows[:_SAMPLED]]
    return find_named_images(table.path.parent, sample)


def _has_features(table: Table) -> bool:
    """Whether most columns have numbers, or the same few words again and again."""
    sample = [cells for _, cells in table.rows[:_SAMPLED]]
    if len(sample) < 4:  # too few to tell
        return False

    def is_feature(position: int) -> bool:
        values = [cells[position] for cells in sample]
        few = len(sample) >= 10 and len(set(values)) <= len(sample) / 5
        return few or all(_NUMBER.fullmatch(v.strip()) for v in values)

    return sum(map(is_feature, range(len(table.columns)))) > len(table.columns) / 2


def _are_image_paths(table: Table, position: int, *, exist: bool = False) -> bool:
    """Whether nearly all values are; with `exist`, also whether there is one of them."""
    values = [cells[position].strip() for _, cells in table.rows[:_SAMPLED]]
    values = [value for value in values if value]
    paths = sum("\n" not in v and len(v) < 1000 and suffix_of(v) in IMAGE_SUFFIXES for v in values)
    if paths <= 0.9 * len(values):
        return False
    return not exist or any(os.path.exists(os.path.join(table.path.parent, v.replace("\\", "/"))) for v in values)


def _kind(table: Table, chosen: _ColumnChoice) -> str:
    return "image" if chosen.images is not None or _are_image_paths(table, chosen.input) else "text"


def _make_examples(
    table: Table, chosen: _ColumnChoice, split: str | None, *, kind: str, labels: Labels
) -> tuple[list[Example], list[str | None], list[str]]:
    """Rows, their cells of the time column, and notes of one table. An empty text stays a row; preprocessing decides
    about it."""
    rows: list[Example] = []
    times: list[str | None] = []
    bad = list(table.bad)
    no_numbers: list[str] = []
    file = table.path.name
    splits = {} if split or chosen.split is None else parse_splits({c[chosen.split].strip() for _, c in table.rows})
    for line, cells in table.rows:
        label, value = cells[chosen.label].strip(), cells[chosen.input]
        try:
            target = labels.parse(table, label, cells)
        except ValueError:
            no_numbers.append(f"{label[:40]!r} in line {line}")
            continue
        if target is None or (kind == "image" and not value.strip()):
            bad.append(line)
            continue
        name = f"{file}:{line}"
        read: Callable[[], Raw] = partial(str, value)
        if kind == "image":
            name = value.strip() if chosen.images is None else chosen.images.path_of(value.strip())
            read = partial(read_file, _image_path(table, line, name))
        row_split = split or _parse_split_cell(table, chosen, line, cells, splits)
        rows.append(
            Example(name=name, target=target, split=row_split, read=read, group=_group(table, chosen, line, cells))
        )
        times.append(None if chosen.time is None else cells[chosen.time])
    if no_numbers:
        raise numbers_error(f"The label column {table.columns[chosen.label]!r} of {table.path}", no_numbers)
    notes = []
    if chosen.images is not None and rows:
        notes.append(f"the column {table.columns[chosen.input]} of {file} read as names of images: {rows[0].name}, …")
    if not bad:
        return rows, times, notes
    lines = ", ".join(map(str, sorted(bad)[:3])) + (", …" if len(bad) > 3 else "")
    note = f"{len(bad)} lines of {table.path.name} with missing or surplus cells (line {lines})"
    if len(bad) > len(rows):
        raise DataError(f"The table {table.path} is mostly damaged: {note}.", fix="Save it again.")
    return rows, times, [*notes, f"{note}, skipped"]


def _group(table: Table, chosen: _ColumnChoice, line: int, cells: Cells) -> str | None:
    if chosen.group is None:
        return None
    if not (group := cells[chosen.group].strip()):
        raise DataError(
            f"The group column {table.columns[chosen.group]!r} of {table.path} has an empty cell in line {line}.",
            fix="Fill it; a name that no other row has makes a group of one.",
        )
    return group


def _add_times(rows: list[Example], cells: list[str | None], column: str) -> list[Example]:
    """The rows with the times in these cells; None: the table of that split has no time column."""
    timed = [i for i, cell in enumerate(cells) if cell is not None]
    times = parse_times(column, [cell for cell in cells if cell is not None], [rows[i].name for i in timed])
    rows = list(rows)
    for i, time in zip(timed, times, strict=True):
        rows[i] = replace(rows[i], time=time)
    return rows


def _parse_split_cell(
    table: Table, chosen: _ColumnChoice, line: int, cells: Cells, splits: Mapping[str, str]
) -> str | None:
    if chosen.split is None or not cells[chosen.split].strip():
        return None
    split = splits.get(cells[chosen.split].strip())
    if split is None:
        raise DataError(
            f"The column split of {table.path} has {cells[chosen.split]!r} in line {line}.",
            fix=f"Allowed are {', '.join(SPLITS)}; rename the column if it means something else.",
        )
    return split


def _image_path(table: Table, line: int, path: str) -> str:
    """The path of an image. A table may come from anywhere, so a relative path must stay below its folder."""
    if "\\" in path and os.sep == "/":
        path = path.replace("\\", "/")
    if ".." in PurePosixPath(path).parts and not os.path.isabs(path):
        raise DataError(
            f"The path {path!r} in line {line} of {table.path} leads out of the table's folder.",
            fix="Move the table above its images, or write absolute paths.",
        )
    return os.path.join(table.path.parent, path)


def _stat_files(path: Path, rows: list[Example]) -> tuple[int, list[str]]:
    """The size of all images, and stamps that change when they do. Raises DataError where the first are missing."""
    total = 0
    stamps = []
    missing = 0
    for position, row in enumerate(rows):
        assert isinstance(row.read, partial)
        try:
            about = os.stat(row.read.args[0])
        except OSError:
            missing += 1
            stamps.append(f"{row.name} missing")
            if missing == position + 1 == min(20, len(rows)):
                raise DataError(
                    f"None of the first {missing} files named in {path} exists; the first is {rows[0].read.args[0]}.",  # type: ignore[attr-defined]
                    fix="Paths are relative to the folder of the table: put it there, or correct them.",
                ) from None
            continue
        total += about.st_size
        stamps.append(f"{row.name} {about.st_size} {about.st_mtime_ns}")
    return total, stamps


def _find_classes(path: Path, rows: list[Example], labels: Labels) -> tuple[str, ...]:
    """None where targets are numbers. Raises DataError for what are no classes."""
    if labels.annotation == "value":
        return ()
    if labels.flags:
        return labels.flags
    if labels.annotation == "class":
        classes = order_classes(row.target for row in rows)
    else:
        classes = order_classes(name for row in rows for name in row.target)
    if len(classes) < 2:
        raise DataError(
            f"{path} has only one class, {classes[0]!r}; at least two are needed.",
            fix="Add rows of another class, or name the right column with --label-column.",
        )
    if len(classes) > 20 and len(classes) > len(rows) / 2:
        raise DataError(
            f"The label column of {path} has {len(classes):,} different values in {len(rows):,} rows: "
            f"{', '.join(classes[:3])}, …; these are not classes.",
            fix="Name the right column with --label-column.",
        )
    return classes


READER = Reader(name="table", why_not=why_not, read=read, order=30, why_no_target=why_no_features)
