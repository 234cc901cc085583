"""Names of files that aren't UTF-8, as text.

A name is bytes that don't say their encoding: a zip packed on a Chinese Windows has GBK, an old disk Latin-1. All such
names of a data set are taken to have one encoding: that in which they are made of characters in common use. Where
there is none, the bytes are written out (`caf\\xe9`), so that different names stay different.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from suanli.data.suffixes import is_ignored

_COMMON = 0.5  # of the characters that aren't ASCII, at least


class _Encoding(NamedTuple):
    title: str
    is_common: Callable[[str, bytes], bool]  # a character and its bytes


# Korean isn't among them: each common syllable in EUC-KR is a common Chinese character in GB 2312. Each test takes what
# the standard put first because it is used most. Of equally good ones, the first counts.
_ENCODINGS = {
    "gb18030": _Encoding("GBK", lambda _, b: len(b) == 2 and 0xB0 <= b[0] <= 0xD7 and b[1] >= 0xA1),
    "cp1252": _Encoding("Windows-1252", lambda c, _: c.isalpha()),
    "big5": _Encoding("Big5", lambda _, b: len(b) == 2 and 0xA4 <= b[0] <= 0xC6),
    "cp932": _Encoding("Shift JIS", lambda _, b: len(b) == 2 and (0x82 <= b[0] <= 0x83 or 0x88 <= b[0] <= 0x97)),
}


@dataclass(frozen=True, slots=True)
class NameDecoder:
    """How the names of one data set are read that aren't UTF-8."""

    encoding: str | None  # None: the bytes are written out
    for_all: bool = False  # it is that of all names: by chance, some are UTF-8 as well (猫 in GBK is è)

    def __call__(self, raw: bytes) -> str:
        for one in (self.encoding, "utf-8") if self.for_all else ("utf-8", self.encoding):
            try:
                if one is not None:
                    return raw.decode(one)
            except UnicodeDecodeError:
                continue
        return raw.decode(errors="backslashreplace")

    def describe(self, raws: Iterable[bytes]) -> str:
        """A note on names that aren't UTF-8, as they are read."""
        how = f"read as {_ENCODINGS[self.encoding].title}" if self.encoding in _ENCODINGS else "written as bytes"
        words = sorted(map(self, raws))
        return f"names that aren't UTF-8, {how}: {', '.join(words[:3])}{', …' if len(words) > 3 else ''}"


def choose_decoder(raws: Iterable[bytes], *, western: str = "cp1252") -> NameDecoder | None:
    """For these names; None: all are UTF-8. `western` is the encoding where no other suits them better."""
    special = {raw for raw in raws if not raw.isascii()}
    unknown = {raw for raw in special if not is_utf8(raw)}
    if not unknown:
        return None
    candidates = [encoding for encoding in _ENCODINGS if encoding in ("gb18030", "big5", "cp932", western)]
    if (encoding := _best_encoding(special, candidates)) is not None:
        return NameDecoder(encoding, for_all=True)
    encoding = _best_encoding(unknown, candidates)
    return NameDecoder(encoding if encoding or western in _ENCODINGS else western)


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _best_encoding(raws: Iterable[bytes], candidates: Sequence[str]) -> str | None:
    raws = sorted(raws)
    shares = {encoding: _common_share(raws, encoding) for encoding in candidates}
    best = max(shares, key=lambda encoding: shares[encoding])
    return best if shares[best] >= _COMMON else None


def _common_share(names: Sequence[bytes], encoding: str) -> float:
    """Of the characters that aren't ASCII; 0 for names that can't be in this encoding."""
    try:
        texts = [name.decode(encoding) for name in names]
    except UnicodeDecodeError:
        return 0.0
    special = [c for text in texts for c in text if not c.isascii()]
    if encoding == "cp1252" and 2 * len(special) > sum(map(len, texts)):  # words of nothing but accents
        return 0.0
    is_common = _ENCODINGS[encoding].is_common
    return sum(is_common(c, c.encode(encoding)) for c in special) / max(1, len(special))


def make_readable(names: Iterable[str]) -> tuple[Callable[[str], str], list[str]]:
    """A function that gives a path without bytes that are no text, and notes. All of `names` decide the encoding."""
    parts = {
        p for n in names if not n.isascii() for p in _to_bytes(n).split(b"/") if not is_ignored(p.decode("latin-1"))
    }
    decoder = choose_decoder(parts)
    if decoder is None:
        return str, []

    def readable(name: str) -> str:
        return name if name.isascii() else "/".join(map(decoder, _to_bytes(name).split(b"/")))

    return readable, [decoder.describe(raw for raw in parts if not is_utf8(raw))]


def write_out_bytes(text: str) -> str:
    """The text with bytes that are no text written out."""
    return _to_bytes(text).decode(errors="backslashreplace")


def _to_bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # as Python has names (PEP 383)


def normalise_name(name: str) -> str:
    """The name in one form of Unicode (NFC): macOS writes é as two characters, and both look the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
