"""Lists the members of a tar, compressed or not, within the limits of `_archives`, and reads them in any order.

A compressed tar has no random access. Listing is one pass over the decompressed stream that keeps nothing; where the
prepared data is still in the cache, no more is needed. The first read of a member decompresses the whole tar into a
file without a name in the temporary directory (TMPDIR). The page cache keeps it in memory while there is room, and the
system removes it however the process ends.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from suanli.core.errors import BadInput, DataError
from suanli.core.storage import raise_storage_errors
from suanli.data.members import Listing, Member, count_and_examples
from suanli.data.readers._archives import RandomAccessFile, check_count, check_size, check_total, clean_name

MAX_HEADER_BYTES = 16 << 20  # of the names and comments before a member, which are read into memory
OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".tar": open,
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
DAMAGED = (zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile, tarfile.TarError)

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TarMember:
    """Reads one member of a tar file."""

    file: RandomAccessFile | UnpackedFile
    name: str
    offset: int
    size_bytes: int

    def __call__(self) -> bytes:
        content = self.file(self.offset, self.size_bytes)
        if len(content) != self.size_bytes:
            raise BadInput(f"{self.name} in {self.file.path} is cut short.")
        return content


class UnpackedFile:
    """The content of a compressed file, which any number of threads can read at any position. Every process that reads
    decompresses it once. Raises DataError if the file has changed since it was listed."""

    def __init__(self, path: Path, suffix: str, stamp: tuple[int, int]) -> None:
        self.path = path
        self._suffix = suffix
        self._stamp = stamp  # size and time when it was listed
        self._unpacked: RandomAccessFile | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[UnpackedFile], tuple[Path, str, tuple[int, int]]]:
        return UnpackedFile, (self.path, self._suffix, self._stamp)

    def __call__(self, offset: int, count: int) -> bytes:
        if self._unpacked is None:
            with self._lock:
                if self._unpacked is None:
                    self._unpacked = self._unpack()
        return self._unpacked(offset, count)

    def _unpack(self) -> RandomAccessFile:
        with raise_storage_errors(Path(os.environ.get("TMPDIR", "/tmp"))):  # if there is no temporary directory
            temporary = Path(tempfile.gettempdir())
        try:
            with ExitStack() as stack:
                if _stamp(self.path) != self._stamp:
                    raise tarfile.ReadError("it is no longer the same file")
                stream = stack.enter_context(_open(self.path, self._suffix))
                with raise_storage_errors(temporary):
                    unpacked = stack.enter_context(tempfile.TemporaryFile(dir=temporary))
                while chunk := stream.take(_CHUNK_BYTES):
                    with raise_storage_errors(temporary):
                        unpacked.write(chunk)
                with raise_storage_errors(temporary):
                    unpacked.flush()
                return RandomAccessFile(self.path, os.dup(unpacked.fileno()))
        except DAMAGED as error:
            raise DataError(
                f"The archive {self.path} was changed while it was being read ({error}).", fix="Start again."
            ) from error


class _ForwardStream:
    """The stream that `tarfile` reads, from the first byte to the last and never back. It enforces the limits on what
    is read or skipped, and on the size of headers in memory."""

    def __init__(self, path: Path, stream: IO[bytes], *, packed: bool) -> None:
        self.last = b""  # the last bytes that `read` gave
        self._path = path
        self._stream = stream
        self._packed = packed
        self._packed_bytes = path.stat().st_size
        self._position = 0

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count:,} bytes at byte {self._position}")
        self.last = self.take(count)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError(f"the header before byte {self._position} leads back")
        if self._packed:
            while self._position < position and self.take(min(_CHUNK_BYTES, position - self._position)):
                pass
        else:
            self._stream.seek(position)
            self._position = position

    def take(self, count: int) -> bytes:
        try:
            chunk = self._stream.read(count)
        except OSError as error:  # bz2 raises it without a number for damaged data
            if error.errno is not None:
                raise
            raise tarfile.ReadError(f"{self._path.name}: {error}") from error
        self._position += len(chunk)
        check_total(self._path, self._position, self._packed_bytes)
        return chunk


def list_tar(path: Path, suffix: str) -> Listing:
    """The members of a tar. Raises one of DAMAGED where it is damaged, DataError where it is hostile."""
    packed = suffix != ".tar"
    stamp = _stamp(path)
    file = UnpackedFile(path, suffix, stamp) if packed else RandomAccessFile(path)
    members: dict[str, Member] = {}
    folders, others, stamps = [], [], []
    with _open(path, suffix) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
        for count, info in enumerate(_iterate(archive), start=1):
            check_count(path, count)
            if info.size < 0:
                raise tarfile.ReadError(f"{info.name!r} has {info.size:,} bytes")
            name = clean_name(path, info.name)
            if info.isdir():
                folders.append(name)
            elif info.isreg() and not info.issparse():
                check_size(path, name, info.size)
                members[name] = Member(name, info.size, TarMember(file, name, info.offset_data, info.size))
                stamps.append(f"{name}\0{info.size}\0{info.mtime}")
            else:
                others.append(name)
        complete = _has_end_mark(stream)
        while packed and stream.take(_CHUNK_BYTES):  # the checksum is at the end
            pass
    notes = []
    if others:
        notes.append(count_and_examples(others, "links, devices and sparse files in the archive, skipped"))
    if not complete:
        notes.append("the archive has no end mark; it may have been cut short")
    return Listing(list(members.values()), folders, notes, [*stamps, "{} {}".format(*stamp)])


@contextmanager
def _open(path: Path, suffix: str) -> Iterator[_ForwardStream]:
    with OPENERS[suffix](path, "rb") as stream:
        yield _ForwardStream(path, stream, packed=suffix != ".tar")


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _iterate(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member. `tarfile` keeps a list of all members; clearing it bounds the memory."""
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # documented for streams of members
        yield info


def _has_end_mark(stream: _ForwardStream) -> bool:
    """Whether the stream ended with the end mark, a block of zeros. Raises ReadError for a damaged header, which
    `tarfile` takes for the end, so that the rest would be lost silently."""
    if not stream.last:
        return False
    if stream.last.strip(b"\0"):
        raise tarfile.ReadError(f"no valid header before byte {stream.tell()}")
    return True
