"""Reads a zip or tar without unpacking it: of class folders, or of images with files of annotations."""

from __future__ import annotations

import zipfile
from pathlib import Path

from suanli.core.errors import DataError
from suanli.core.types import Columns, Reader, Source
from suanli.data.file_kinds import name_file
from suanli.data.members import Listing
from suanli.data.readers import _tar
from suanli.data.readers._class_folders import make_source
from suanli.data.readers._zip import list_zip

SUFFIXES = (".zip", *_tar.OPENERS)


def why_not(path: Path) -> str | None:
    if path.is_dir():
        return "a folder, not an archive"
    if _suffix(path) is None:
        return f"not an archive: its name doesn't end in {', '.join(SUFFIXES)}"
    return None


def read(path: Path, columns: Columns) -> Source:
    """The images in the archive `path`.

    Raises DataError for an archive that is damaged, encrypted or above the limits of `_archives`, that has names that
    lead out of it, or that has no class folders.
    """
    suffix = _suffix(path)
    if suffix is None or path.is_dir():
        raise DataError(f"{path} is {why_not(path)}.", fix="Give a zip or tar of class folders.")
    listing = _list_archive(path, suffix)
    name, where = path.name[: -len(suffix)], f"The archive {path}"
    return make_source(listing, name=name, where=where, columns=columns)


def _suffix(path: Path) -> str | None:
    """The one of SUFFIXES in which the name ends."""
    name = path.name.casefold()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _list_archive(path: Path, suffix: str) -> Listing:
    """Everything in the archive. Raises DataError."""
    try:
        return list_zip(path) if suffix == ".zip" else _tar.list_tar(path, suffix)
    except (*_tar.DAMAGED, zipfile.BadZipFile) as error:
        kind = f": it is {words}" if (words := name_file(path)) else ""
        raise DataError(
            f"The archive {path} is damaged, cut short, or not what its name says{kind} ({error}).",
            fix="Get it again, and compare its size or checksum with its publisher's.",
        ) from error
    except OSError as error:
        raise DataError(
            f"The archive {path} can't be read: {error.strerror or error}.",
            fix="Give a file that you may read.",
        ) from error


READER = Reader(name="archive", why_not=why_not, read=read, order=20)
