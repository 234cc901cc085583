"""Keeps splits that were assigned in a file below the cache directory, so that a new example never moves another one.

There is a file for each data set (its place and the options that choose columns and groups) and pair of fractions. It
holds digests only. A run keeps the same of its own data (`examples.py`), so the file can be deleted: splits are then
assigned anew by content, and differ only where examples were added since to a class with few.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from suanli.core.console import warn
from suanli.core.storage import atomic_file, raise_storage_errors
from suanli.core.task import Task
from suanli.core.types import SPLITS, Recipe, Source
from suanli.data.examples import rows_of_bytes
from suanli.data.splits import MANY, UNIT_BYTES, Assignment, Known, assign_splits

FOLDER = "splits"


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How splits are made."""

    stratified: bool = True  # False: by content alone, as in older versions
    known: Known | None = None  # decided before, by a run; None: what the cache directory keeps
    cache: Path = Path()

    def key(self) -> list[str]:
        """Equal where the splits are, of equal data; empty for those of older versions."""
        if not self.stratified:
            return []
        known = b"" if self.known is None else b"".join(u + s.encode() for u, s in sorted(self.known.items()))
        return ["stratified", hashlib.blake2b(known, digest_size=10).hexdigest()]


class SplitDecision:
    """Decides the splits of all examples; once the data is prepared, `keep` says that they hold from now on."""

    def __init__(self, source: Source, task: Task, recipe: Recipe, options: SplitOptions) -> None:
        self.source, self.options = source, options
        self.strata = task.strata if options.stratified else None
        self.fractions = {"val_fraction": recipe.val_fraction, "test_fraction": recipe.test_fraction}
        self.file: Path | None = None  # None: nothing is kept
        few = len(source.examples) <= MANY  # of many, what is moved is a few of rare classes
        if options.known is None and options.stratified and source.origin and few:
            decided_by = repr((source.origin, task.annotation, self.fractions)).encode(errors="surrogatepass")
            digest = hashlib.blake2b(decided_by, digest_size=10).hexdigest()
            self.file = options.cache / FOLDER / f"{source.name}-{digest}.npz"

    def decide(self, content_digests: Callable[[Sequence[int]], Iterable[bytes | None] | np.ndarray]) -> Assignment:
        """See `assign_splits`."""
        known = (self.options.known or {}) if self.file is None else _read(self.file)
        return assign_splits(self.source.examples, content_digests, **self.fractions, strata=self.strata, known=known)

    def keep(self, assignment: Assignment) -> None:
        """Add what was assigned to the file. What another process has written meanwhile stays."""
        if self.file is None:
            return
        new = {bytes(unit): split for unit, split in zip(assignment.units, assignment.splits, strict=True) if len(unit)}
        if new.keys() <= _read(self.file).keys():
            return
        with raise_storage_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.parent / f".{self.file.name}.lock"):
            _write(self.file, new | _read(self.file))


def _read(file: Path) -> dict[bytes, str]:
    if not file.exists():
        return {}
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            units, splits = arrays["units"], arrays["splits"]
        return {row.tobytes(): SPLITS[split] for row, split in zip(units, splits.tolist(), strict=True)}
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        warn(f"{file} is damaged ({error}), so examples are assigned to splits anew.")
        return {}


def _write(file: Path, known: Known) -> None:
    with atomic_file(file) as stream:
        splits = np.array([SPLITS.index(split) for split in known.values()], np.uint8)
        np.savez(stream, units=rows_of_bytes(list(known), UNIT_BYTES), splits=splits)
