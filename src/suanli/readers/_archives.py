"""The members of a zip or tar: listed within limits, read at their place in the file.

An archive comes from anywhere, so nothing it says is believed: names may not leave the archive,
counts and sizes have limits, and no more than the declared size is ever decompressed.

Members are read with `pread` on one open file instead of `zipfile`: that needs no lock between
threads and read 60,000 small members in 0.27 s, `zipfile` in 0.75 s (one thread). In a compressed
tar a member has no place of its own, so the whole is decompressed once into a file without a name
in the temporary directory (TMPDIR): one mechanism for small and large, the page cache keeps it in
memory while there is room, and the system removes it whatever happens to the process.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from suanli.console import size
from suanli.errors import BadInput, DataError
from suanli.readers._class_folders import Member, count_and_examples
from suanli.storage import writing

MAX_MEMBERS = 10_000_000
MAX_MEMBER_BYTES = 1 << 30
MAX_TOTAL_BYTES = 1 << 40
MAX_RATIO = 200  # of what comes out to what is in the file; photographs reach 1, drawings about 100
RATIO_FROM_BYTES = 16 << 20  # below this nobody is harmed

_CHUNK_BYTES = 1 << 20
_DAMAGED = (zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile)
_OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
SUFFIXES = (".zip", ".tar", *_OPENERS)


@dataclass(frozen=True, slots=True)
class Listing:
    members: list[Member]
    folders: list[str]
    notes: list[str]
    stamps: list[str]  # what changes when the content changes


class BytesAt:
    """A file, read at any place by any number of threads. Sent to another process, it opens (and
    for a compressed tar decompresses) the file there again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        suffix = archive_suffix(path)
        if suffix in _OPENERS:
            self._descriptor = _unpacked(path, suffix)
        else:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def __reduce__(self) -> tuple[type[BytesAt], tuple[Path]]:
        return BytesAt, (self.path,)

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


@dataclass(frozen=True, slots=True)
class ZipMember:
    """Reads one member of a zip file."""

    file: BytesAt
    name: str
    offset: int  # of the local header
    packed_bytes: int
    size_bytes: int
    deflated: bool
    crc: int

    def __call__(self) -> bytes:
        header = self.file(self.offset, 30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise BadInput(f"{self.name} in {self.file.path} is damaged: no header where it should be.")
        # The local name and extra field may be longer than those of the directory.
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        content = self.file(self.offset + 30 + name_bytes + extra_bytes, self.packed_bytes)
        if self.deflated:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.size_bytes + 1)
            except zlib.error as error:
                raise BadInput(f"{self.name} in {self.file.path} is damaged: {error}.") from error
        if len(content) != self.size_bytes or zlib.crc32(content) != self.crc:
            raise BadInput(f"{self.name} in {self.file.path} is damaged: wrong size or checksum.")
        return content


@dataclass(frozen=True, slots=True)
class TarMember:
    """Reads one member of a tar file."""

    file: BytesAt
    name: str
    offset: int
    size_bytes: int

    def __call__(self) -> bytes:
        content = self.file(self.offset, self.size_bytes)
        if len(content) != self.size_bytes:
            raise BadInput(f"{self.name} in {self.file.path} is cut short.")
        return content


def archive_suffix(path: Path) -> str | None:
    """Which of SUFFIXES the name ends in."""
    name = path.name.casefold()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def list_archive(path: Path) -> Listing:
    """Everything in the archive. Raises DataError where it is damaged, encrypted or hostile."""
    try:
        if archive_suffix(path) == ".zip":
            return _list_zip(path)
        return _list_tar(path)
    except _DAMAGED as error:
        raise DataError(
            f"The archive {path} is damaged, cut short, or not what its name says ({error}).",
            fix="Get it again, and compare its size or checksum with its publisher's.",
        ) from error
    except OSError as error:
        raise DataError(
            f"The archive {path} can't be read: {error.strerror or error}.",
            fix="Give a file that you may read.",
        ) from error


def _list_zip(path: Path) -> Listing:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (NotImplementedError, ValueError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from error
    file = BytesAt(path)
    _check_count(path, len(infos))
    members: dict[str, Member] = {}
    folders, links, stamps = [], [], []
    total = 0
    for info in infos:
        stated = _zip_name(info)
        name = _checked_name(path, stated)
        if stated.endswith("/"):
            folders.append(name)
        elif stat.S_ISLNK(info.external_attr >> 16):
            links.append(name)
        else:
            _check_zip_member(path, name, info)
            if not 0 <= info.header_offset <= file.size_bytes - info.compress_size:
                raise zipfile.BadZipFile(f"{name!r} lies outside of the file")
            total += info.file_size
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            reader = ZipMember(file, name, info.header_offset, info.compress_size, info.file_size, deflated, info.CRC)
            members[name] = Member(name, info.file_size, reader)
            stamps.append(f"{name}\0{info.file_size}\0{info.CRC}")
    _check_total(path, total, file.size_bytes)
    notes = [count_and_examples(links, "links in the archive, passed over")] if links else []
    if len(members) < len(stamps):
        notes.append(f"{len(stamps) - len(members)} names occur again in the archive; the last one counts")
    return Listing(list(members.values()), folders, notes, stamps)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name. Some programs write UTF-8 without saying so; zipfile then takes it as cp437."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")


def _check_zip_member(path: Path, name: str, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & 0x1:
        raise DataError(f"{name} in {path} is encrypted.", fix="Unpack it and give the folder.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{name} in {path} is compressed with method {info.compress_type}; 0 (stored) and 8 (deflate) can be read.",
            fix="Unpack it and give the folder, or pack it again.",
        )
    _check_size(path, name, info.file_size)
    if info.file_size > RATIO_FROM_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise _bomb(path, name, info.file_size, info.compress_size)


def _list_tar(path: Path) -> Listing:
    file = BytesAt(path)
    members: dict[str, Member] = {}
    folders, others, stamps = [], [], []
    total = count = 0
    with file.stream() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for count, info in enumerate(_each(archive), start=1):
            _check_count(path, count)
            name = _checked_name(path, info.name)
            if info.isdir():
                folders.append(name)
            elif info.isreg() and not info.issparse():
                _check_size(path, name, info.size)
                total += info.size
                members[name] = Member(name, info.size, TarMember(file, name, info.offset_data, info.size))
                stamps.append(f"{name}\0{info.size}\0{info.mtime}")
            else:
                others.append(name)
        whole = _ends_well(file, archive.offset)
    _check_total(path, total, file.size_bytes)
    notes = []
    if others:
        notes.append(count_and_examples(others, "links, devices and sparse files in the archive, passed over"))
    if not whole:
        notes.append("the archive has no end mark; it may have been cut short")
    about = path.stat()
    return Listing(list(members.values()), folders, notes, [*stamps, f"{about.st_size} {about.st_mtime_ns}"])


def _each(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member. `tarfile` keeps all it has seen; dropping them bounds the memory."""
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # documented for streams of members
        yield info


def _ends_well(file: BytesAt, offset: int) -> bool:
    """True at the end mark (a block of zeros), False where the file just ends. `tarfile` takes a
    damaged header in the middle for the end, which would lose the rest in silence."""
    block = file(offset, tarfile.BLOCKSIZE)
    if not block:
        return False
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no valid header at byte {offset}")
    return True


def _unpacked(path: Path, suffix: str) -> int:
    """Descriptor of a file without a name that holds the decompressed `path`."""
    packed_bytes = path.stat().st_size
    temporary = Path(tempfile.gettempdir())
    with _OPENERS[suffix](path, "rb") as stream, tempfile.TemporaryFile(dir=temporary) as unpacked:
        total = 0
        while chunk := _chunk_of(path, stream):
            total += len(chunk)
            _check_total(path, total, packed_bytes)
            with writing(temporary):
                unpacked.write(chunk)
        with writing(temporary):
            unpacked.flush()
        return os.dup(unpacked.fileno())


def _chunk_of(path: Path, stream: IO[bytes]) -> bytes:
    try:
        return stream.read(_CHUNK_BYTES)
    except OSError as error:  # bz2 says 'Invalid data stream' this way
        if error.errno is not None:
            raise
        raise tarfile.ReadError(f"{path.name}: {error}") from error


def _checked_name(path: Path, name: str) -> str:
    """`name` without leading './'. Raises DataError for one that would lead out of the archive."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise DataError(
            f"The archive {path} has a member named {name!r}, which leads out of it.",
            fix="Such an archive may be an attack; get it from a source that you trust.",
        )
    return "/".join(part for part in parts if part not in ("", "."))


def _check_count(path: Path, count: int) -> None:
    if count > MAX_MEMBERS:
        raise DataError(
            f"The archive {path} has more than {MAX_MEMBERS:,} members ({count:,}).",
            fix="Unpack it and give the folder.",
        )


def _check_size(path: Path, name: str, size_bytes: int) -> None:
    if size_bytes > MAX_MEMBER_BYTES:
        raise DataError(
            f"{name} in {path} unpacks to {size(size_bytes)}; the limit for one file is {size(MAX_MEMBER_BYTES)}.",
            fix="Remove it from the archive.",
        )


def _check_total(path: Path, total_bytes: int, packed_bytes: int) -> None:
    if total_bytes > MAX_TOTAL_BYTES:
        raise DataError(
            f"The archive {path} unpacks to more than {size(MAX_TOTAL_BYTES)}.",
            fix="Unpack it and give the folder.",
        )
    if total_bytes > RATIO_FROM_BYTES and total_bytes > MAX_RATIO * packed_bytes:
        raise _bomb(path, path.name, total_bytes, packed_bytes)


def _bomb(path: Path, name: str, size_bytes: int, packed_bytes: int) -> DataError:
    return DataError(
        f"{name} in {path} unpacks from {size(packed_bytes)} to at least {size(size_bytes)}, "
        f"more than {MAX_RATIO} times as much: it looks like a decompression bomb.",
        fix="If you trust it, unpack it and give the folder.",
    )
