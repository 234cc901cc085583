"""Finds the source that a user named: a built-in data set, or a path that one of the readers can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from suanli.core.errors import DataError, unknown
from suanli.core.registry import load, load_all, names
from suanli.core.types import AnyPath, Columns, Dataset, Source
from suanli.data.download import fetch


def find_source(subject: AnyPath, *, columns: Columns | None = None, data_dir: Path) -> Source:
    """The source for the name of a built-in data set, which is downloaded if necessary, or for a path.

    Raises UsageError for an unknown name, DataError for a path that can't be read.
    """
    columns = columns or Columns()
    path = Path(subject).expanduser()
    if str(subject) in names("datasets"):
        dataset: Dataset = load("datasets", str(subject))
        folder = data_dir / dataset.name
        for download in dataset.downloads:
            fetch(download, folder)
        return dataset.read(folder)
    if not path.exists():
        if path.suffix or os.sep in str(subject):
            raise DataError(
                f"There is nothing at {path}.",
                fix="Check the path, or use a built-in data set: " + ", ".join(names("datasets")) + ".",
            )
        raise unknown("data set", str(subject), names("datasets"))
    reasons = []
    with _report_permission_errors(path):
        for reader in sorted(load_all("readers").values(), key=lambda r: (r.order, r.name)):
            reason = reader.why_not(path)
            if reason is None:
                return reader.read(path, columns)  # type: ignore[no-any-return]
            reasons.append(f"  {reader.name}: {reason}")
    raise DataError(
        f"No reader can read {path}:\n" + "\n".join(reasons) + "\n",
        fix="Give a folder of class folders, a zip or tar of one, a CSV, TSV or JSONL table, or an .npz file.",
    )


@contextmanager
def _report_permission_errors(path: Path) -> Iterator[None]:
    """Raises DataError where a path may not be read: that is bad data, not a storage error."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} may not be read ({error.strerror}).", fix="Ask for permission to read it.") from error
