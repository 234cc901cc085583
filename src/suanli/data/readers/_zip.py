"""Lists the members of a zip file within the limits of `_archives`, and reads them in any order."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

from suanli.core.errors import BadInput, DataError
from suanli.data.readers._archives import (
    MAX_RATIO,
    RATIO_FROM_BYTES,
    Listing,
    RandomAccessFile,
    bomb_error,
    check_count,
    check_size,
    check_total,
    clean_name,
)
from suanli.data.readers._class_folders import Member, count_and_examples


def _read_member(
    file: RandomAccessFile, name: str, offset: int, packed_bytes: int, size_bytes: int, deflated: bool, crc: int
) -> bytes:
    """The content of one member of a zip file. `offset` is that of its local header."""
    header = file(offset, 30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise BadInput(f"{name} in {file.path} is damaged: no header at its position.")
    # The name and extra field may be longer here than in the central directory.
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    content = file(offset + 30 + name_bytes + extra_bytes, packed_bytes)
    if deflated:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size_bytes + 1)
        except zlib.error as error:
            raise BadInput(f"{name} in {file.path} is damaged: {error}.") from error
    if len(content) != size_bytes or zlib.crc32(content) != crc:
        raise BadInput(f"{name} in {file.path} is damaged: wrong size or checksum.")
    return content


def list_zip(path: Path) -> Listing:
    """The members of a zip file. Raises BadZipFile where it is damaged, DataError where it is encrypted or hostile."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (NotImplementedError, ValueError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from error
    file = RandomAccessFile(path)
    check_count(path, len(infos))
    members: dict[str, Member] = {}
    folders, links, stamps = [], [], []
    total = 0
    for info in infos:
        raw_name = _zip_name(info)
        name = clean_name(path, raw_name)
        if raw_name.endswith("/"):
            folders.append(name)
        elif stat.S_ISLNK(info.external_attr >> 16):
            links.append(name)
        else:
            _check_zip_member(path, name, info)
            if not 0 <= info.header_offset <= file.size_bytes - info.compress_size:
                raise zipfile.BadZipFile(f"{name!r} lies outside of the file")
            total += info.file_size
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            where = info.header_offset, info.compress_size, info.file_size
            members[name] = Member(name, info.file_size, partial(_read_member, file, name, *where, deflated, info.CRC))
            stamps.append(f"{name}\0{info.file_size}\0{info.CRC}")
    check_total(path, total, file.size_bytes)
    notes = [count_and_examples(links, "links in the archive, skipped")] if links else []
    if len(members) < len(stamps):
        notes.append(f"{len(stamps) - len(members)} names occur again in the archive; the last member is used")
    return Listing(list(members.values()), folders, notes, stamps)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name. Some programs write UTF-8 without the flag for it, and zipfile then decodes it as cp437."""
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
    check_size(path, name, max(info.file_size, info.compress_size))
    if info.file_size > RATIO_FROM_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise bomb_error(path, name, info.file_size, info.compress_size)
