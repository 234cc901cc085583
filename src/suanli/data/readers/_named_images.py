"""Finds the images that a column of a table names without their folder or suffix: `17` for `images/17.png`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from suanli.data.suffixes import IMAGE_SUFFIXES, is_ignored

MAX_DEPTH = 2  # of folders below the table's
MAX_FOLDERS = 200
MAX_FILES = 2_000_000
MATCHED = 0.9  # of the values in a sample have a file
MAX_CHARACTERS = 255  # of the name of a file


class NamedImages(NamedTuple):
    """The image files of one folder by the names that a table may use for them."""

    folder: str  # relative to the table's, "" for that one
    files: Mapping[str, str]  # by their names with and without suffix

    def path_of(self, value: str) -> str:
        """Relative to the table's folder; the value itself where no file has its name."""
        return os.path.join(self.folder, self.files.get(value, value))


def find_named_images(top: Path, sample: Sequence[str]) -> NamedImages | None:
    """The first folder, from `top` downwards, with images of nearly all names in `sample`. None: there is none."""
    names = {value for value in sample if value}
    if not names or any("\n" in name or "/" in name or len(name) > MAX_CHARACTERS for name in names):
        return None
    for folder, files in _list_folders(top):
        if sum(name in files for name in names) >= MATCHED * len(names):
            return NamedImages(folder, files)
    return None


def _list_folders(top: Path) -> Iterator[tuple[str, dict[str, str]]]:
    waiting = [("", 0)]
    listed = files_seen = 0
    while waiting and listed < MAX_FOLDERS and files_seen < MAX_FILES:
        folder, depth = waiting.pop(0)
        files: dict[str, str] = {}
        try:
            with os.scandir(top / folder) as entries:
                found = sorted((e for e in entries if not is_ignored(e.name)), key=lambda e: e.name)
        except OSError:
            continue
        for entry in found:
            stem, _, suffix = entry.name.rpartition(".")
            if suffix.casefold() in IMAGE_SUFFIXES and stem:
                files[entry.name] = entry.name
                files.setdefault(stem, entry.name)
            elif depth < MAX_DEPTH and entry.is_dir():
                waiting.append((os.path.join(folder, entry.name), depth + 1))
        listed += 1
        files_seen += len(found)
        yield folder, files
