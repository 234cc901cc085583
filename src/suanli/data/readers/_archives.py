"""What the readers of zip and tar share: limits, names, and bytes at any place of a file.

An archive comes from anywhere, so nothing it says is believed: names may not leave the archive,
counts and sizes have limits, and no more than the declared size is ever decompressed.

Members are read with `pread` on one open file instead of `zipfile`: that needs no lock between
threads and read 60,000 small members in 0.27 s, `zipfile` in 0.75 s (one thread).
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from suanli.core.console import size
from suanli.core.errors import DataError
from suanli.data.readers._class_folders import Member
from suanli.data.readers._files import MAX_FILE_BYTES

MAX_MEMBERS = 10_000_000
MAX_MEMBER_BYTES = MAX_FILE_BYTES
MAX_TOTAL_BYTES = 1 << 40
MAX_RATIO = 200  # of what comes out to what is in the file; photographs reach 1, drawings about 100
RATIO_FROM_BYTES = 16 << 20  # below this nobody is harmed


@dataclass(frozen=True, slots=True)
class Listing:
    members: list[Member]
    folders: list[str]
    notes: list[str]
    stamps: list[str]  # what changes when the content changes


class RandomAccessFile:
    """A file, read at any place by any number of threads. Sent to another process, it opens the
    file there again."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """`descriptor` is that of an open file, owned from now on; None: `path` is opened."""
        self.path = path
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._descriptor = descriptor
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def __reduce__(self) -> tuple[type[RandomAccessFile], tuple[Path]]:
        return RandomAccessFile, (self.path,)

    def __call__(self, offset: int, count: int) -> bytes:
        """Fewer than `count` bytes only where the file ends."""
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, count, offset)
        with self._lock:  # Windows has no pread
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, count)

    def stream(self) -> IO[bytes]:
        duplicate = os.dup(self._descriptor)
        os.lseek(duplicate, 0, os.SEEK_SET)
        return os.fdopen(duplicate, "rb")


def clean_name(path: Path, name: str) -> str:
    """`name` without leading './'. Raises DataError for one that would lead out of the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise DataError(
            f"The archive {path} has a member named {name!r}, which leads out of it.",
            fix="Such an archive may be an attack; get it from a source that you trust.",
        )
    return "/".join(part for part in parts if part not in ("", "."))


def check_count(path: Path, count: int) -> None:
    if count > MAX_MEMBERS:
        raise DataError(
            f"The archive {path} has more than {MAX_MEMBERS:,} members ({count:,}).",
            fix="Unpack it and give the folder.",
        )


def check_size(path: Path, name: str, size_bytes: int) -> None:
    if size_bytes > MAX_MEMBER_BYTES:
        raise DataError(
            f"{name} in {path} unpacks to {size(size_bytes)}; the limit for one file is {size(MAX_MEMBER_BYTES)}.",
            fix="Remove it from the archive.",
        )


def check_total(path: Path, total_bytes: int, packed_bytes: int) -> None:
    if total_bytes > MAX_TOTAL_BYTES:
        raise DataError(
            f"The archive {path} unpacks to more than {size(MAX_TOTAL_BYTES)}.",
            fix="Unpack it and give the folder.",
        )
    if total_bytes > RATIO_FROM_BYTES and total_bytes > MAX_RATIO * packed_bytes:
        raise bomb_error(path, path.name, total_bytes, packed_bytes)


def bomb_error(path: Path, name: str, size_bytes: int, packed_bytes: int) -> DataError:
    return DataError(
        f"{name} in {path} unpacks from {size(packed_bytes)} to at least {size(size_bytes)}, "
        f"more than {MAX_RATIO} times as much: it looks like a decompression bomb_error.",
        fix="If you trust it, unpack it and give the folder.",
    )
