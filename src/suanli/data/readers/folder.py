"""Reads a folder: class folders (`cat/1.jpg` or `train/cat/1.jpg`, at any depth inside a class), or images with files
of annotations."""

from __future__ import annotations

from pathlib import Path

from suanli.core.types import Columns, Reader, Source
from suanli.data.readers._class_folders import make_source
from suanli.data.readers._walk import list_folder
from suanli.data.tables import find_tables


def why_not(path: Path) -> str | None:
    if not path.is_dir():
        return "not a folder"
    tables = find_tables(path, features=True)
    if "train" in tables:
        return f"holds tables ({tables['train'].name}) and no class folders"
    return None


def read(path: Path, columns: Columns) -> Source:
    """The images at `path`. Raises DataError where it has neither class folders nor annotations that suanli reads."""
    return make_source(list_folder(path), name=path.resolve().name, where=f"The folder {path}", columns=columns)


READER = Reader(name="folder", why_not=why_not, read=read, order=50)
