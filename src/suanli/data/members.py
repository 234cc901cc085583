"""The files of a folder or archive, and small functions that everything that lists them shares."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from suanli.core.console import plural
from suanli.core.paths import safe_name
from suanli.core.types import Raw

TABLE_SUFFIXES = frozenset({"csv", "tsv", "jsonl", "ndjson"})
FEATURE_SUFFIXES = TABLE_SUFFIXES | {"parquet", "arrow", "feather", "xlsx"}  # of tables of features, also with .gz


class Member(NamedTuple):
    """One file of a folder or archive. A tuple, since there may be a million: a frozen dataclass takes three times
    as long to make."""

    path: str  # relative, with "/"
    size_bytes: int
    read: Callable[[], Raw]


@dataclass(frozen=True, slots=True)
class Listing:
    """What is in a folder or archive."""

    members: list[Member]
    folders: list[str]
    notes: list[str]
    stamps: list[str]  # that change when the content does


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].casefold() if "." in name else ""


def format_of(name: str) -> str:
    """The one of FEATURE_SUFFIXES that a file's name ends in, or empty."""
    suffix = suffix_of(name.removesuffix(".gz"))
    return suffix if suffix in FEATURE_SUFFIXES else ""


def table_stem(name: str) -> str:
    """The name of a table's file without its suffixes: "train" of train.csv.gz."""
    return name.removesuffix(".gz").rpartition(".")[0] if format_of(name) else name.rpartition(".")[0]


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels in order: by value where all are whole numbers, so that 2 precedes 10, else by name."""
    unique = set(labels)
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in unique):
        return tuple(sorted(unique, key=lambda label: (int(label), label)))
    return tuple(sorted(unique))


def source_name(name: str) -> str:
    """`name` as a valid directory name on any system."""
    return safe_name(name, "data", longest=80)


def count_and_examples(names: Sequence[str], what: str, one: str = "") -> str:
    """A note with at most three names: '3 <what>: a, b, c', '1 <one>: a'."""
    more = ", …" if len(names) > 3 else ""
    return f"{plural(len(names), one or what, what)}: {', '.join(names[:3])}{more}"


def fingerprint_of(parts: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
