"""Reads images that one file of annotations names (`instances.json`, `data.yaml`, `boxes.csv`), in its folder or below.

A folder whose train, val and test tables are such files is read as they say, too.
"""

from __future__ import annotations

from pathlib import Path

from suanli.core.errors import DataError
from suanli.core.types import Columns, Reader, Source
from suanli.data.members import suffix_of
from suanli.data.readers._annotated_sources import is_annotations
from suanli.data.readers._class_folders import make_source
from suanli.data.readers._walk import list_folder
from suanli.data.tables import find_tables

SUFFIXES = ("json", "xml", "yaml", "yml")
TABLES = ("csv", "tsv")


def why_not(path: Path) -> str | None:
    if path.is_dir():
        train = find_tables(path).get("train")
        holds = train is not None and suffix_of(train.name) in TABLES and is_annotations(train)
        return None if holds else "a folder without tables of annotations"
    suffix = suffix_of(path.name)
    if suffix in SUFFIXES or (suffix in TABLES and is_annotations(path)):
        return None
    return f"not a file of annotations: its name doesn't end in {', '.join('.' + s for s in SUFFIXES)}"


def read(path: Path, columns: Columns) -> Source:
    """Raises DataError for a file of no known format, and where its images aren't there."""
    if (reason := why_not(path)) is not None:
        raise DataError(f"{path} is {reason}.", fix="Give a file of annotations, or the folder that it is in.")
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    named = None if path.is_dir() else path.name
    return make_source(
        list_folder(folder), name=folder.name, where=f"The folder {folder}", columns=columns, named=named
    )


READER = Reader(name="annotation_file", why_not=why_not, read=read, order=25)
