"""What an evaluation keeps of each example, so that two models can be compared on the same examples later.

It is a safetensors file beside the scores: the task's records, and for each example a digest of its name and target and
one of its input. Reading it needs neither the data nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suanli.core.console import plural
from suanli.core.errors import DamagedFile
from suanli.core.schema import Ragged, Stored, example_of
from suanli.core.storage import atomic_file
from suanli.core.task import Records
from suanli.core.types import Json, Preprocess, Split

RECORD = "record."  # before the name of a column, so that it differs from ours
FIX = "Evaluate the run again."


@dataclass(frozen=True, kw_only=True)
class ScoredExamples:
    """Of N examples."""

    records: Records
    keys: np.ndarray  # (N,) uint64, equal for the same name and target
    inputs: np.ndarray  # (N,) uint64, equal for the same encoded input
    groups: np.ndarray | None  # (N,) int64, equal for examples that belong together
    preprocess: str  # digest of how inputs were encoded
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(
        cls, records: Records, split: Split, rows: np.ndarray, preprocess: Preprocess, classes: tuple[str, ...]
    ) -> ScoredExamples:
        """Records of the examples at these positions of the split."""
        keys = [_digest(split.names[i], example_of(split.targets, i)) for i in rows.tolist()]
        inputs = [_digest("", split.input_rows(position)) for position in rows.tolist()]
        settings = json.dumps(preprocess.settings(), sort_keys=True, default=str)
        return cls(
            records=records,
            keys=np.array(keys, np.uint64),
            inputs=np.array(inputs, np.uint64),
            groups=None if split.groups is None else split.groups[rows],
            preprocess=hashlib.blake2b(settings.encode(errors="backslashreplace"), digest_size=8).hexdigest(),
            classes=tuple(classes),
        )

    def write(self, path: Path) -> None:
        from safetensors.numpy import save

        arrays = {f"{RECORD}{name}": _shrink(column) for name, column in self.records.items()}
        arrays |= {"keys": self.keys, "inputs": self.inputs}
        if self.groups is not None:
            arrays["groups"] = _shrink(self.groups)
        classes = json.dumps(self.classes)  # ASCII: a name may be no UTF-8
        with atomic_file(path) as stream:
            stream.write(save(arrays, metadata={"preprocess": self.preprocess, "classes": classes}))

    @classmethod
    def read(cls, path: Path) -> ScoredExamples | None:
        """None where there is no such file: an older version evaluated. Raises DamagedFile."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(path, "np") as file:
                about: Mapping[str, Json] = file.metadata() or {}
                arrays = {name: _widen(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # no mapping
            scored = cls(
                records={name.removeprefix(RECORD): a for name, a in arrays.items() if name.startswith(RECORD)},
                keys=arrays["keys"],
                inputs=arrays["inputs"],
                groups=arrays.get("groups"),
                preprocess=about["preprocess"],
                classes=tuple(json.loads(about["classes"])),
            )
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise DamagedFile(f"{path} can't be used ({error}).", fix=FIX) from error
        if not scored.records or any(len(a) != len(scored) or not a.ndim for a in arrays.values()):
            raise DamagedFile(f"{path} can't be used: its columns differ in length.", fix=FIX)
        return scored

    def take(self, order: np.ndarray) -> ScoredExamples:
        """The examples at these positions, in this order."""
        return ScoredExamples(
            records={name: column[order] for name, column in self.records.items()},
            keys=self.keys[order],
            inputs=self.inputs[order],
            groups=None if self.groups is None else self.groups[order],
            preprocess=self.preprocess,
            classes=self.classes,
        )


def pair(first: ScoredExamples, second: ScoredExamples) -> tuple[ScoredExamples, ScoredExamples] | str:
    """Both in the same order, or why their examples aren't the same ones.

    Examples are the same where name and target are; and the inputs, where both models read them in the same way.
    """
    if first.classes != second.classes:
        return "their classes differ"
    one, other = (side.take(np.lexsort((side.inputs, side.keys))) for side in (first, second))
    if not np.array_equal(one.keys, other.keys):
        shared = len(np.intersect1d(one.keys, other.keys))
        return f"{shared:,} of their {len(one):,} and {len(other):,} examples are in both"
    same_reading = one.preprocess == other.preprocess
    if same_reading and (changed := int(np.count_nonzero(one.inputs != other.inputs))):
        return f"{changed:,} of {plural(len(one), 'example')} differ in content under the same name"
    return one, other


def _digest(name: str, arrays: Mapping[str, Stored]) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8)
    for array in arrays.values():
        values = array.values if isinstance(array, Ragged) else array
        digest.update(b"\0" + np.ascontiguousarray(values).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _shrink(column: np.ndarray) -> np.ndarray:
    """Whole numbers in as few bytes as hold them."""
    if column.dtype.kind not in "iu" or not column.size:
        return np.ascontiguousarray(column)
    kind = np.promote_types(np.min_scalar_type(column.min()), np.min_scalar_type(column.max()))
    return np.ascontiguousarray(column.astype(kind if kind.kind in "iu" else column.dtype))


def _widen(column: np.ndarray) -> np.ndarray:
    """Tasks compute with whole numbers of 64 bits."""
    return column.astype(np.int64) if column.dtype.kind in "iu" and column.dtype != np.uint64 else column
