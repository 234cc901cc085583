"""Lists the members of a zip file within the limits of `_archives`, and reads them in any order."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from suanli.core.errors import BadInput, DataError
from suanli.data.file_names import NameDecoder, choose_decoder, is_utf8
from suanli.data.members import Listing, Member, count_and_examples
from suanli.data.readers._archives import (
    MAX_RATIO,
    RATIO_FROM_BYTES,
    RandomAccessFile,
    bomb_error,
    check_count,
    check_size,
    check_total,
    clean_name,
)

UTF8_FLAG = 0x800
UNICODE_PATH = 0x7075


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
    names, notes = _read_names(infos)
    for info, raw_name in zip(infos, names, strict=True):
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
    if links:
        notes.append(count_and_examples(links, "links in the archive, skipped"))
    if len(members) < len(stamps):
        notes.append(f"{len(stamps) - len(members)} names occur again in the archive; the last member is used")
    return Listing(list(members.values()), folders, notes, stamps)


def _read_names(infos: Sequence[zipfile.ZipInfo]) -> tuple[list[str], list[str]]:
    """The members' names, and notes. A name is UTF-8 where the archive says so or where it can be; else all have the
    encoding that suits them best, or that of old PCs, which the format prescribes."""
    stated = [_stated_name(info) for info in infos]
    raws = [b"" if name is not None else _raw_name(info) for name, info in zip(stated, infos, strict=True)]
    parts = {part for raw in raws for part in raw.split(b"/")}
    decoder = choose_decoder(parts, western="cp437") or NameDecoder("utf-8")
    names = [decoder(raw) if name is None else name for name, raw in zip(stated, raws, strict=True)]
    unusual = [part for part in parts if not is_utf8(part)]
    notes = [decoder.describe(unusual)] if unusual and decoder.encoding != "cp437" else []
    return [name.partition("\0")[0].replace("\\", "/") for name in names], notes


def _stated_name(info: zipfile.ZipInfo) -> str | None:
    """The name as Unicode, where the archive states it. None: it is bytes."""
    if info.flag_bits & UTF8_FLAG or info.orig_filename.isascii():
        return info.orig_filename
    extra = info.extra
    while len(extra) >= 4:  # Info-ZIP's "Unicode path" holds the name in UTF-8, and a checksum of the other
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == UNICODE_PATH and field[:5] == struct.pack("<BI", 1, zlib.crc32(_raw_name(info))):
            with suppress(UnicodeDecodeError):
                return field[5:].decode()
    return None


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("cp437")  # as which zipfile has decoded it


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
