"""Text: from strings to token ids, with a vocabulary of the training texts.

A token is a word, a punctuation mark or symbol, or one character of a script that is written without spaces (Han, Kana,
Thai, Lao, Khmer, Burmese), so Chinese needs no segmenter. English contractions are split as in the Penn Treebank
("don't" is "do" and "n't", "it's" is "it" and "'s"), so that raw text matches a corpus that was tokenised before. Texts
are normalised to Unicode NFKC first: full-width and half-width forms, ligatures and composed accents are equal.

A row is the first `length` token ids, then zeros. Only the first 100,000 characters of a text are read. Not supported:
subword tokens, stemming, and segmentation by a language's own rules.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from suanli.core.errors import BadInput, DataError, UsageError, unknown
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.types import EncodedInput, Json, Marked, Preprocess, Preview, Raw
from suanli.data.column_names import TEXT_NAMES
from suanli.data.file_kinds import name_kind

PADDING, UNKNOWN = 0, 1
MAX_CHARACTERS = 100_000
MAX_LENGTH = 4096  # tokens that a user may set
MAX_FITTED_LENGTH = 256  # tokens that `fit` may choose: each one costs time
FITTED_PERCENTILE = 99.5  # of the lengths of training texts; texts to predict are often longer
DEFAULTS: Mapping[str, Json] = {"vocabulary_size": 20_000, "length": None, "min_count": 2, "lowercase": True}
TABLES = {".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx"}

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
# Vowel signs and accents belong to their word, but `\w` leaves them out.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
_LETTER = rf"(?:(?![{_UNSPACED}])[\w{_MARKS}])"
_INVISIBLE = "\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff"
_TOKEN = re.compile(
    rf"[{_UNSPACED}]"
    rf"|n't\b|'(?:s|m|d|re|ve|ll)\b|{_LETTER}{{1,64}}?(?=n't\b)"
    rf"|{_LETTER}{{1,64}}"  # longer ones aren't words and are split
    rf"|[^\s{_INVISIBLE}]",
    re.IGNORECASE,
)
_NO_LETTERS = re.compile(rf"[^\w{_MARKS}]+")
_ONE_UNSPACED = re.compile(rf"[{_UNSPACED}]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def normalise(raw: Raw) -> str:
    """NFKC with plain quotes and single spaces, from UTF-8 bytes or a string. Raises BadInput."""
    if isinstance(raw, bytes):
        content = raw
        try:
            raw = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            kind = f": it is {words}" if (words := name_kind(content)) else f" (byte {error.start})"
            raise BadInput(f"Not UTF-8 text{kind}.", fix="Save it as UTF-8, or remove it.") from error
    if not isinstance(raw, str):
        raise BadInput(f"Text or UTF-8 bytes expected, not {type(raw).__name__}.", fix="Remove it.")
    text = raw[:MAX_CHARACTERS]
    if not text.isascii():
        # Half a surrogate pair can't be stored as UTF-8. NFKC takes quadratic time for a long run of accents, hence the
        # pieces; a cut inside a composed letter changes that letter only.
        text = _SURROGATE.sub("\ufffd", text)
        pieces = (text[i : i + 250] for i in range(0, len(text), 250))
        text = "".join(unicodedata.normalize("NFKC", piece) for piece in pieces).translate(_QUOTES)
    return " ".join(text.split())


def tokenize(text: str, *, lowercase: bool = True) -> Iterator[str]:
    """The tokens of a normalised text, lazily, so that only the start of a long text is read."""
    for match in _TOKEN.finditer(text):
        yield match[0].lower() if lowercase else match[0]


@dataclass(frozen=True, kw_only=True)
class TextPreprocess(Preprocess):
    """Id 0 is padding, 1 any unknown token, and `vocabulary[i]` has id i + 2."""

    kind: ClassVar[str] = "text"
    roles: ClassVar[tuple[str, ...]] = ("tokens",)
    media_types: ClassVar[tuple[str, ...]] = ("text/",)
    takes_strings: ClassVar[bool] = True
    trait_names: ClassVar[Mapping[str, str]] = {"truncated": "truncated text", "no known word": "unknown-word text"}
    column_names: ClassVar[tuple[str, ...]] = TEXT_NAMES
    features_name: ClassVar[str] = "the words"

    vocabulary: tuple[str, ...]  # the most frequent token first
    length: int
    lowercase: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))  # a list when read from JSON

    @classmethod
    def fit(cls, raws: Callable[[], Iterable[Raw]], settings: Mapping[str, Json]) -> Self:
        """Chooses the vocabulary, and a length that holds 99.5 % of the texts (at most 256).

        Settings: `vocabulary_size` (with padding and unknown), `length`, `min_count` (rarer tokens are unknown),
        `lowercase`. Equal counts are ordered by the token, so the order of the texts doesn't matter. Raises UsageError
        for a bad setting, DataError where no text has a token.
        """
        checked = _check_settings(settings)
        counts: Counter[str] = Counter()
        lengths: list[int] = []
        for raw in raws():
            try:
                text = normalise(raw)
            except BadInput:
                continue  # counted where the inputs are encoded
            tokens = tokenize(text, lowercase=checked["lowercase"])
            row = list(islice(tokens, checked["length"] or MAX_FITTED_LENGTH))
            if row:
                counts.update(row)
                lengths.append(len(row))
        if not lengths:
            raise DataError("No training text has any words.", fix="Check which column holds the text.")
        length = checked["length"] or int(np.percentile(lengths, FITTED_PERCENTILE, method="higher"))
        frequent = [token for token, count in counts.items() if count >= checked["min_count"]]
        frequent.sort(key=lambda token: (-counts[token], token))
        size = checked["vocabulary_size"] - 2
        return cls(vocabulary=tuple(frequent[:size]), length=length, lowercase=checked["lowercase"])

    def encode(self, raw: Raw) -> EncodedInput:
        """A row (L,) int32. Traits: "truncated", "no known word". Raises BadInput for what isn't text and for a text
        without tokens."""
        text = normalise(raw)
        tokens = list(islice(tokenize(text, lowercase=self.lowercase), self.length + 1))
        if not tokens:
            raise BadInput("The text is empty.", fix="Remove it.")
        ids = [self._ids.get(token, UNKNOWN) for token in tokens[: self.length]]
        row = np.zeros(self.length, np.int32)
        row[: len(ids)] = ids
        traits = ["truncated"] if len(tokens) > self.length else []
        if max(ids) == UNKNOWN:
            traits.append("no known word")
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        geometry = Geometry.unchanged((len(ids),))
        return EncodedInput(arrays={"tokens": row}, digest=digest, geometry=geometry, traits=tuple(traits))

    def similarity_key(self, raw: Raw, encoded: EncodedInput) -> bytes:  # noqa: ARG002
        """Of the letters and digits: equal whatever the case, punctuation and white space. None for a text without."""
        letters = _NO_LETTERS.sub("", normalise(raw).casefold())
        return hashlib.blake2b(letters.encode(), digest_size=16).digest() if letters else b""

    def measure(self, inputs: Mapping[str, Stored]) -> Self:  # noqa: ARG002  # ids have no mean or spread
        return self

    def to_model(self, inputs: Tensors) -> Tensors:
        """Ids (B, L) int64 from int32."""
        return {"tokens": inputs["tokens"].long()}

    @property
    def inputs(self) -> Schema:
        limit = len(self.vocabulary) + 2
        return {"tokens": Column(shape=(self.length,), dtype="int32", role="tokens", limit=limit)}

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def model_args(self) -> dict[str, Json]:
        return {"vocabulary_size": len(self.vocabulary) + 2, "length": self.length}

    def features(self, inputs: Mapping[str, Stored], positions: np.ndarray) -> Any:
        """Which words each text has, as a sparse matrix (N, vocabulary) whose rows have the length 1."""
        from scipy.sparse import csr_matrix

        tokens = inputs["tokens"]
        assert isinstance(tokens, np.ndarray)
        words = [np.unique(row[row > UNKNOWN]) for row in tokens[positions]]
        counts = [len(row) for row in words]
        values = np.repeat([1 / np.sqrt(max(count, 1)) for count in counts], counts)
        shape = (len(positions), len(self.vocabulary) + 2)
        return csr_matrix((values, np.concatenate(words), np.cumsum([0, *counts])), shape=shape)

    def preview(self, inputs: Arrays) -> Preview:
        """The words that the model reads, with unknown tokens as <unk>."""
        words = [self._word(int(token)) for token in inputs["tokens"] if token != PADDING]
        text = "".join(words[:1])
        for before, word in pairwise(words):
            joined = _ONE_UNSPACED.fullmatch(before) and _ONE_UNSPACED.fullmatch(word)
            text += word if joined else f" {word}"
        return Preview(media_type="text/plain", content=text.encode())

    def mark(self, inputs: Arrays, weights: np.ndarray) -> Marked:
        """The words that the model reads, with their weights (L,)."""
        pairs = zip(inputs["tokens"], weights, strict=True)
        return Marked(words=tuple((self._word(int(t)), float(weight)) for t, weight in pairs if t != PADDING))

    @classmethod
    def find_inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """In a text file or standard input, each line that isn't blank is one input; in a folder, each `.txt` file
        below it. Raises DataError where there are none, UsageError for a table."""
        if path == Path("-"):
            return _lines(sys.stdin.buffer, "stdin")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not files:
                raise DataError(f"No .txt files in {path}.", fix="Give a text file or a folder of them.")
            return ((str(file.relative_to(path)), file.read_bytes) for file in files)
        if not path.is_file():
            raise DataError(f"{path} doesn't exist.", fix="Give a text file, a folder, or - for lines.")
        if path.suffix.lower() in TABLES:
            raise UsageError(
                f"{path.name} is a table, and predict reads plain text.",
                fix="Save its text column as a .txt file, one text a line.",
            )
        return _file_lines(path)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocabulary, start=2)}

    def _word(self, token: int) -> str:
        return self.vocabulary[token - 2] if 2 <= token < len(self.vocabulary) + 2 else "<unk>"


def _file_lines(path: Path) -> Iterator[tuple[str, Callable[[], Raw]]]:
    with path.open("rb") as stream:
        yield from _lines(stream, path.name)


def _lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[str, Callable[[], Raw]]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"{name}:{number}", partial(bytes, line.rstrip(b"\r\n"))


def _check_settings(settings: Mapping[str, Json]) -> dict[str, Json]:
    for name in settings:
        if name not in DEFAULTS:
            raise unknown("text setting", name, DEFAULTS)
    checked = {**DEFAULTS, **settings}
    if not isinstance(checked["lowercase"], bool):
        raise UsageError(f"lowercase is {checked['lowercase']!r}.", fix="Give true or false.")
    _check_count("vocabulary_size", checked["vocabulary_size"], 3, 10_000_000)
    _check_count("min_count", checked["min_count"], 1, sys.maxsize)
    if checked["length"] is not None:
        _check_count("length", checked["length"], 1, MAX_LENGTH)
    return checked


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}.", fix=f"Give a whole number from {low:,} to {high:,}.")


PREPROCESS = TextPreprocess
