"""A zip or tar of class folders, read without unpacking it by hand."""

from __future__ import annotations

from pathlib import Path

from suanli.readers._archives import SUFFIXES, archive_suffix, list_archive
from suanli.readers._class_folders import fingerprint_of, source_of
from suanli.types import Columns, Reader, Source


def why_not(path: Path) -> str | None:
    if path.is_dir():
        return "a folder, not an archive"
    if archive_suffix(path) is None:
        return f"not an archive: its name doesn't end in {', '.join(SUFFIXES)}"
    return None


def read(path: Path, columns: Columns) -> Source:  # noqa: ARG001  # an archive has no columns
    """The images in the archive `path`.

    Raises DataError for an archive that is damaged, encrypted, beyond the limits of `_archives`, has
    names that lead out of it, or isn't one of class folders.
    """
    listing = list_archive(path)
    suffix = archive_suffix(path) or ""
    return source_of(
        listing.members,
        listing.folders,
        name=path.name[: len(path.name) - len(suffix)],
        where=f"The archive {path}",
        fingerprint=fingerprint_of(sorted(listing.stamps)),
        notes=listing.notes,
    )


READER = Reader(name="archive", why_not=why_not, read=read, order=20)
