"""Says in words what the bytes of a file are, for errors: "a PDF", "an HTML page: was the download refused?".

By the first bytes, as the formats define them; nothing is decoded. Not here: what suanli can read.
"""

from __future__ import annotations

import re
from pathlib import Path

from suanli.core.errors import pip_install

SHOWN_CHARACTERS = 24
_LOOKED_AT = 4096  # bytes, from either end
START_BYTES = 2 * _LOOKED_AT  # of a file, that say what it is
# The brands of files in the ISO base media format ("ftyp"), at byte 8.
_HEIC_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1 heif".split())
_BRANDS = {
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"qt  ": "a QuickTime video",
    b"M4A ": "an M4A recording",
    b"crx ": "a camera's raw photo (CR3)",
}
_TEXTS = (  # that stand in place of a file
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: git lfs pull fetches it"),
    (rb"(?i:\s*<!doctype html|\s*<html)", "an HTML page: was the download refused?"),
)
_MAGIC = (  # the first bytes, and what they begin
    (rb"%PDF", "a PDF"),
    (rb"\{\\rtf", "an RTF document"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (Word, Excel or PowerPoint)"),
    *_TEXTS,
    (rb"(?is:\s*(<\?xml.{,1000}?)?(<!--.{,1000}?-->\s*)*(<!DOCTYPE svg.{,1000}?)?<svg)", "an SVG drawing"),
    (rb"\s*<\?xml", "an XML file"),
    (rb"\x89PNG", "a PNG image that is damaged or cut short"),
    (rb"\xff\xd8\xff", "a JPEG image that is damaged or cut short"),
    (rb"GIF8", "a GIF image that is damaged or cut short"),
    (rb"(?s:RIFF....WEBP)", "a WebP image that is damaged or cut short"),
    (rb"II\*\0|MM\0\*", "a TIFF image, or a camera's raw photo, that can't be read"),
    (rb"(?s:RIFF....AVI )", "an AVI video"),
    (rb"(?s:RIFF....WAVE)", "a WAV recording"),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (rb"\0\0\x01[\xb3\xba]", "an MPEG video"),
    (rb"FLV\x01", "a Flash video"),
    (rb"ID3|\xff[\xfb\xf3\xf2]", "an MP3 recording"),
    (rb"OggS", "an Ogg recording"),
    (rb"fLaC", "a FLAC recording"),
    (rb"\x1f\x8b", "a file packed with gzip"),
    (rb"BZh", "a file packed with bzip2"),
    (rb"\xfd7zXZ", "a file packed with xz"),
    (rb"7z\xbc\xaf", "a 7-Zip archive"),
    (rb"Rar!", "a RAR archive"),
    (rb"(?s:.{257}ustar)", "a tar archive"),
    (rb"\x93NUMPY", "a NumPy array (.npy)"),
    (rb"(?s:.{128}DICM)", "a DICOM image"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"PAR1", "a Parquet table"),
    (rb"SQLite format 3", "an SQLite database"),
    (rb"8BPS", "a Photoshop file"),
    (rb"gimp xcf", "a GIMP file"),
    (rb"v/1\x01", "an OpenEXR image"),
    (rb"\xff\x0a|(?s:....JXL )", "a JPEG XL image"),
    (rb"FUJIFILMCCD-RAW", "a camera's raw photo"),
    (rb"\0\x05\x16[\0\x07]", "metadata that macOS keeps beside a file, not the file itself"),
    (rb"\x7fELF|MZ", "a program"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
    (rb"\0+\Z", "nothing but zero bytes: its copy or download was cut short"),
)
_IMAGE = re.compile(
    rb"(?s:\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|P[1-7]\s|\0\0\x01\0|....jP  |\xff\x4f\xff\x51|"
    rb"....ftypavi[fs])"
)
_OFFICE = {b"word/": "a Word document", b"xl/": "an Excel workbook", b"ppt/": "a PowerPoint presentation"}
_KINDS = tuple((re.compile(magic), words) for magic, words in _MAGIC)


def is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS


def may_be_image(start: bytes) -> bool:
    """Whether a file that starts like this may be an image of a format that suanli reads."""
    return is_heic(start) or _IMAGE.match(start) is not None


def describe_bytes(data: bytes) -> str:
    """What the content of a file is, as the end of a sentence: "a PDF.", "an HTML page: was the download refused?"."""
    words = name_kind(data) or _describe_text(data) or "of no kind that suanli knows, or damaged"
    return words if words.endswith("?") else f"{words}."


def name_kind(data: bytes) -> str:
    """ "a PDF", "empty"; an empty text for plain text and what isn't known."""
    if not data:
        return "empty (0 bytes)"
    if is_heic(data):
        return f"a HEIC photo; to read it: {pip_install('suanli[heic]')}"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an MP4 video")
    if data.startswith(b"PK\x03\x04"):
        return _describe_zip(data)
    return next((words for magic, words in _KINDS if magic.match(data[:_LOOKED_AT])), "")


def name_text(data: bytes) -> str:
    """What a text is that stands in place of a file, such as "an HTML page: was the download refused?"; else empty."""
    return next((words for magic, words in _TEXTS if re.match(magic, data[:_LOOKED_AT])), "")


def name_file(path: Path) -> str:
    """As `name_kind`; empty for a file that can't be read, too."""
    try:
        with path.open("rb") as stream:
            return name_kind(stream.read(START_BYTES))
    except OSError:
        return ""


def _describe_zip(data: bytes) -> str:
    ends = data[:_LOOKED_AT] + data[-_LOOKED_AT:]
    for folder, words in _OFFICE.items():
        if folder in ends:
            return words
    if b"application/vnd.oasis.opendocument" in ends:
        return "an OpenDocument file"
    return "an archive of NumPy arrays (.npz)" if b".npy" in ends else "a ZIP archive"


def _describe_text(data: bytes) -> str:
    start = data[: 4 * SHOWN_CHARACTERS]
    text = start.decode("utf-8", errors="ignore")
    valid = len(text.encode()) >= len(start) - 3  # the last character may be cut in two
    text = text[:SHOWN_CHARACTERS]
    return f"text that starts with {text!r}" if valid and "".join(text.split()).isprintable() else ""
