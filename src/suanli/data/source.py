"""Finds the source that a user named: a built-in data set, or a path that one of the readers can read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from suanli.core.errors import DataError, SuanliError, UsageError, nearest, suggest
from suanli.core.garbage import pause_collector
from suanli.core.registry import load, load_all, names
from suanli.core.types import AnyPath, Columns, Dataset, Source
from suanli.data.download import fetch
from suanli.data.example_columns import ExampleColumns
from suanli.data.overlaps import find_part_of
from suanli.data.splits import group_by_pattern
from suanli.data.suffixes import is_ignored

MAX_LISTED = 10_000  # names that may be meant

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def find_source(
    subject: AnyPath, *, columns: Columns | None = None, group_pattern: str | None = None, data_dir: Path
) -> Source:
    """The source for the name of a built-in data set, which is downloaded if necessary, or for a path.

    `group_pattern`: see `splits.group_by_pattern`. Raises UsageError for an unknown name and for options that the
    data has no use for, DataError for a path that can't be read.
    """
    columns = columns or Columns()
    if columns.group is not None and group_pattern is not None:
        raise UsageError("--group-column and --group-pattern both say what a group is.", fix="Leave one out.")
    with pause_collector():
        source = _read_source(subject, columns, data_dir)
    if columns.group is not None and ExampleColumns.of(source.examples).groups is None:
        raise UsageError(
            f"--group-column is for tables, and {subject} is none.",
            fix="For folders, archives and .npz files, --group-pattern takes the group from each name.",
        )
    if columns.time is not None and ExampleColumns.of(source.examples).times is None:
        raise UsageError(f"--time-column is for tables, and {subject} is none.", fix="Leave it out.")
    place = str(subject) if str(subject) in names("datasets") else str(Path(subject).expanduser().resolve())
    target = () if columns.target is None else (columns.target,)  # older versions had none
    source = replace(source, origin=repr((place, columns, group_pattern, *target)))
    return source if group_pattern is None else group_by_pattern(source, group_pattern)


def _read_source(subject: AnyPath, columns: Columns, data_dir: Path) -> Source:
    path = Path(subject).expanduser()
    if str(subject) in names("datasets"):
        dataset: Dataset = load("datasets", str(subject))
        folder = data_dir / dataset.name
        for download in dataset.downloads:
            fetch(download, folder)
        return replace(dataset.read(folder), part_of=dataset.part_of)
    if not path.exists():
        raise _no_data_error(str(subject))
    with _report_permission_errors(path):
        for reader in sorted(load_all("readers").values(), key=lambda r: (r.order, r.name)):
            if (reader.why_not if columns.target is None else reader.why_no_target)(path) is None:
                source: Source = reader.read(path, columns)
                return replace(source, part_of=find_part_of(source))
    if columns.target is not None:
        raise UsageError(f"--target names a column of a table, and {path} is none.", fix="Leave it out.")
    raise DataError(
        f"{path} is not data that suanli reads.",
        fix="Give a folder of class folders or of images with boxes, a zip or tar of one, a CSV, TSV or JSONL table, "
        "or an .npz file.",
    )


def _no_data_error(subject: str) -> SuanliError:
    """A usage error where `subject` looks like a name, a data error where it looks like a path."""
    if URL.match(subject):
        return DataError("suanli doesn't fetch URLs.", fix="Download the file, then name it.")
    path = Path(subject).expanduser()
    built_in = suggest(subject, names("datasets"), what="Built in")
    beside = nearest(path.name, _list_names(path.parent))
    there = f"The nearest file or folder is {str(path.parent / beside[0])!r}. " if beside else ""
    if not path.parent.is_dir():
        there = f"The folder {path.parent} isn't there either. "
    error = DataError if path.suffix or os.sep in subject else UsageError
    return error(
        f"There is no file or folder {subject}, and no built-in data set of that name.", fix=f"{there}{built_in}"
    )


def _list_names(folder: Path) -> list[str]:
    """What a folder holds, as far as it may be read; not of a huge one."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, MAX_LISTED) if not is_ignored(entry.name)]
    except OSError:
        return []


@contextmanager
def _report_permission_errors(path: Path) -> Iterator[None]:
    """Raises DataError where a path may not be read: that is bad data, not a storage error."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} may not be read ({error.strerror}).", fix="Ask for permission to read it.") from error
