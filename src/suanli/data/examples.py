"""What a run keeps of each example of its data (`examples.npz`): name, split, and digests that find its copies.

The prepared cache has the file, and a run has a copy: so `evaluate --data` can tell which examples the model was
trained on, and a run finds its splits again, without the data or the cache of that time.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from suanli.core.errors import DamagedFile
from suanli.core.storage import atomic_file
from suanli.core.types import SPLITS
from suanli.data.names import Names

FILE = "examples.npz"
LEFT_OUT = 255  # in place of a split: it can't be decoded
DIGEST_BYTES = 8  # of a digest that are kept


@dataclass(frozen=True, kw_only=True)
class ExampleTable:
    """Of N examples, in the order of the data."""

    names: Sequence[str]
    splits: np.ndarray  # (N,) uint8: a position in SPLITS, or LEFT_OUT
    digests: np.ndarray  # (N, 8) uint8: equal for equal content; zeros: unknown
    keys: np.ndarray  # (N, bytes) uint8: `Preprocess.similarity_key`; zeros: none
    units: np.ndarray  # (N, 8) uint8: equal for what splits never divide; zeros: the data states the split

    def __len__(self) -> int:
        return len(self.names)

    @property
    def known(self) -> dict[bytes, str]:
        """The split of each unit that suanli assigned."""
        return {
            unit.tobytes(): SPLITS[split]
            for unit, split in zip(self.units, self.splits.tolist(), strict=True)
            if split != LEFT_OUT and unit.any()
        }

    def of(self, *splits: str) -> Self:
        """The examples of some splits."""
        at = np.flatnonzero(np.isin(self.splits, [SPLITS.index(split) for split in splits]))
        return type(self)(
            names=Names.of(self.names).take(at),
            splits=self.splits[at],
            digests=self.digests[at],
            keys=self.keys[at],
            units=self.units[at],
        )

    def save(self, path: Path) -> None:
        names = Names.of(self.names)
        arrays: dict[str, Any] = {
            "names": names.text,
            "ends": names.ends,
            "splits": self.splits,
            "digests": self.digests,
            "keys": self.keys,
            "units": self.units,
        }
        with atomic_file(path) as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises FileNotFoundError, and DamagedFile."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            names = Names(arrays.pop("names"), arrays.pop("ends"))
            if any(len(column) != len(names) for column in arrays.values()):
                raise ValueError("columns differ in length")
            return cls(names=names, **arrays)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DamagedFile(f"{path} is damaged ({error}).", fix="Restore it or make it again.") from error


def rows_of_bytes(values: Sequence[bytes], length: int | None = None) -> np.ndarray:
    """(N, length) uint8 of byte strings, cut or filled with zeros; the longest decides where no length is given."""
    length = max(map(len, values), default=0) if length is None else length
    joined = b"".join(value[:length].ljust(length, b"\0") for value in values)
    return np.frombuffer(joined, np.uint8).reshape(len(values), length)
