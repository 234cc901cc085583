"""Lists the files below a folder.

Links are followed, since large data sets often consist of them; a link to a folder above it is skipped. Only names,
sizes and times are read here; a file's bytes are read when it is decoded.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from suanli.core.errors import DataError
from suanli.data.members import Listing, Member, count_and_examples
from suanli.data.readers._files import read_file
from suanli.data.suffixes import is_ignored

MAX_FILES = 20_000_000  # links among folders can multiply files without limit


def list_folder(top: Path) -> Listing:
    """Everything below a folder. Raises DataError."""
    members: list[Member] = []
    folders: list[str] = []
    stamps: list[str] = []
    loops: list[str] = []
    broken: list[str] = []
    waiting: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(top), "", frozenset())]
    while waiting:
        folder, relative, above = waiting.pop()
        inside = above | {_identity(os.stat(folder))}
        for entry in _list_entries(folder):
            if is_ignored(entry.name):
                continue
            path = relative + entry.name
            try:
                about = entry.stat()
            except OSError:  # a broken link, or one to itself
                broken.append(path)
                continue
            if entry.is_dir():
                if entry.is_symlink() and _identity(about) in inside:
                    loops.append(path)
                    continue
                folders.append(path)
                waiting.append((entry.path, f"{relative}{entry.name}/", inside))
            elif entry.is_file():
                members.append(Member(path, about.st_size, partial(read_file, entry.path)))
                stamps.append(f"{path}\0{about.st_size}\0{about.st_mtime_ns}")
            else:
                broken.append(path)
        if len(members) + len(folders) > MAX_FILES:
            raise DataError(f"{top} has more than {MAX_FILES:,} files.", fix="Give a smaller folder.")
    notes = []
    if loops:
        notes.append(count_and_examples(sorted(loops), "links to a folder above them, skipped"))
    if broken:
        notes.append(count_and_examples(sorted(broken), "broken links and special files, skipped"))
    return Listing(members, folders, notes, [*stamps, *folders])


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _list_entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"The folder {folder} can't be read: {error.strerror}.",
            fix="Give yourself the right to read it, or move it away.",
        ) from error
