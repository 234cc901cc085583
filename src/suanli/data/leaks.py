"""Data leakage: which examples of a split are also in training, as exact copies or near-duplicates.

Equal content is found by digest. Near-duplicates are found by the keys of `Preprocess.similarity_key`: two examples are
near-duplicates where their keys differ in at most `Preprocess.similar_bits` bits.

A key can't find an image that is mirrored or cut to its middle. Once there is a trained model, its embeddings may:
two examples are taken for one where they are nearer than chance allows (`closeness`). That is evidence, not proof, so
it is listed apart, and changes no score.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TypedDict

import numpy as np

from suanli.core.console import Progress, plural
from suanli.core.storage import atomic_file
from suanli.core.types import SPLITS
from suanli.data.examples import ExampleTable

FILE = "leaks.csv"
EXACT, NEAR = 1, 2  # of an example: how it is also in training; 0: it is new
SIMILAR = "similar by embedding"
VALIDATION = 4  # added where it is in validation only, which takes part in choices
KINDS = {EXACT: "exact", NEAR: "near"}
SEEN = {"val": ("train",), "test": ("train", "val")}  # splits that a model has seen before it answers for this one
MOST_ENTRIES = 20_000  # of a list; counts are complete
LISTED = 20  # copies that are listed of one example, at most
NEXT = 5  # examples after the nearest, by which it is judged how near that is
FALSE_ALARMS = 0.01  # pairs of different examples that are expected among the similar ones, by chance
LEAST_FOUND = 0.5  # of copies made for the purpose: where fewer are found, the embeddings can't tell copies
LEAST_EXAMPLES = 50  # with fewer, nothing is known of chance
WIDTH, HEIGHT = 8192, 32  # keys that are compared at a time: their differences stay in a core's cache


class LeakCounts(TypedDict):
    """How many examples of a split are also in training, or in validation."""

    examples: int  # of the split
    exact: int
    near: int
    only_validation: int  # of these


class Copy(TypedDict):
    name: str
    split: str
    distance: float  # bits in which the keys differ; of embeddings, 1 less the cosine


class LeakEntry(TypedDict):
    """An example of a split that is also in training."""

    example: str
    split: str
    kind: str  # "exact", "near", or SIMILAR
    copies: list[Copy]  # the nearest first, at most `LISTED`


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Of N examples."""

    kinds: np.ndarray  # (N,) uint8: 0, EXACT or NEAR, and VALIDATION
    entries: Sequence[LeakEntry]  # those that aren't new: of the test split first, and exact ones first


def find_leaks(examples: ExampleTable, seen: ExampleTable, similar_bits: int) -> Leaks:
    """Which of the val and test `examples` are also among those that a model has `seen`. Those of a split are compared
    with `SEEN`."""
    kinds = np.zeros(len(examples), np.uint8)
    entries: list[LeakEntry] = []
    for split in ("test", "val"):
        at = np.flatnonzero(examples.splits == SPLITS.index(split))
        before = np.flatnonzero(np.isin(seen.splits, [SPLITS.index(name) for name in SEEN[split]]))
        found = {at[i]: pairs for i, pairs in _find_equal(examples.digests[at], seen.digests[before])}
        kinds[list(found)] = EXACT
        if examples.keys.shape[1] == seen.keys.shape[1]:
            at = at[kinds[at] == 0]
            search = _Near(similar_bits) if similar_bits else _find_equal
            near = {at[i]: pairs for i, pairs in search(examples.keys[at], seen.keys[before])}
            kinds[list(near)] = NEAR
            found |= near
        for i in sorted(found, key=lambda i: (kinds[i], i)):
            if len(entries) < MOST_ENTRIES:
                nearest = [(distance, int(before[j])) for distance, j in sorted(found[i])[:LISTED]]
                copies = [Copy(name=seen.names[j], split=SPLITS[seen.splits[j]], distance=d) for d, j in nearest]
                entries.append(
                    LeakEntry(example=examples.names[i], split=split, kind=KINDS[int(kinds[i])], copies=copies)
                )
            if all(seen.splits[before[j]] for _, j in found[i]):
                kinds[i] |= VALIDATION
    return Leaks(kinds=kinds, entries=entries)


def closeness(distances: np.ndarray) -> np.ndarray:
    """How near an example is to the nearest of other ones (N,), the lower the nearer, from its distances to the nearest
    and the next few of them (N, K), ascending: the logarithm of the distance to the nearest, plus that of its ratio to
    the mean of the next. So a pair must be near, and nearer than others are where examples lie dense."""
    logs = np.log(np.maximum(distances, 1e-7))
    near: np.ndarray = 2 * logs[:, 0] - logs[:, 1:].mean(1)
    return near


def closeness_limit(examples: np.ndarray, copies: np.ndarray) -> float | None:
    """The closeness from which on two examples are taken for one. None: the embeddings can't say.

    No labels are needed. The `examples` (N,) are nearly all different from their nearest, so their closeness is about
    normal; its median and lower quartile, which a few copies don't move, give the value below which chance leaves
    hardly a pair. The `copies` (C, kinds) were made for the purpose: of one kind at least, half must be found.
    """
    if len(examples) < LEAST_EXAMPLES or not copies.size:
        return None
    quarter, middle = np.quantile(examples, [0.25, 0.5])
    spread = (middle - quarter) / -NormalDist().inv_cdf(0.25)
    limit = float(middle + spread * NormalDist().inv_cdf(FALSE_ALARMS / len(examples)))
    return limit if (copies <= limit).mean(0).max() >= LEAST_FOUND else None


def count_leaks(kinds: np.ndarray) -> LeakCounts:
    how = kinds & (EXACT | NEAR)
    return LeakCounts(
        examples=len(kinds),
        exact=int((how == EXACT).sum()),
        near=int((how == NEAR).sum()),
        only_validation=int((kinds >= VALIDATION).sum()),
    )


def describe_leaks(split: str, *, examples: int, exact: int, near: int, only_validation: int) -> str:
    """ "251 of 394 test examples (63.7 %, 11 of them near-duplicates) are also training examples"."""
    leaked, name = exact + near, "validation" if split == "val" else split
    share = f"{100 * leaked / max(1, examples):.1f} %"
    nearly = f", {near:,} of them near-duplicates" if near else ""
    what = "training or validation example" if only_validation else "training example"
    are = f"is also a {what}" if leaked == 1 else f"are also {what}s"
    return f"{leaked:,} of {plural(examples, f'{name} example')} ({share}{nearly}) {are}"


def write_leaks(path: Path, entries: Iterable[LeakEntry]) -> None:
    """The list as CSV, one pair of an example and its copy a line."""
    _write_rows(path, _rows(entries))


def replace_similar(path: Path, entries: Sequence[LeakEntry]) -> None:
    """The same list with these entries of the kind SIMILAR in place of those of before."""
    others: list[list[str]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as stream:
            others = [row for row in list(csv.reader(stream))[1:] if row[2:3] != [SIMILAR]]
    if entries or path.exists():
        _write_rows(path, [*others, *_rows(entries)])


def _rows(entries: Iterable[LeakEntry]) -> Iterator[Sequence[object]]:
    for one in entries:
        for copy in one["copies"]:
            yield one["split"], one["example"], one["kind"], copy["split"], copy["name"], f"{copy['distance']:.4g}"


def _write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with atomic_file(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="")
        table = csv.writer(text)
        table.writerow(["split", "example", "kind", "copy_split", "copy", "distance"])
        table.writerows(rows)
        text.flush()
        text.detach()


Pairs = Iterator[tuple[int, list[tuple[int, int]]]]  # a row of the first array, and (distance, row of the second one)


def _find_equal(rows: np.ndarray, others: np.ndarray) -> Pairs:
    """Rows (N, bytes) that are equal to others (M, bytes), but zeros."""
    if not rows.size or not others.size:
        return
    starts, other_starts = _words(rows)[:, 0], _words(others)[:, 0]
    positions: Mapping[bytes, list[int]] = defaultdict(list)
    for i in np.flatnonzero(np.isin(other_starts, starts) & others.any(1)):
        positions[others[i].tobytes()].append(int(i))
    for i in np.flatnonzero(np.isin(starts, other_starts) & rows.any(1)):
        if (same := positions.get(rows[i].tobytes())) is not None:
            yield int(i), [(0, j) for j in same[:LISTED]]


class _Near:
    """Rows of bits (N, bytes) that differ from others (M, bytes) in at most so many bits; zeros are no rows. A pair
    of which 64 bits differ in more needs no closer look."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, rows: np.ndarray, others: np.ndarray) -> Pairs:
        mine, theirs = np.flatnonzero(rows.any(1)), np.flatnonzero(others.any(1))
        own, other = _words(rows[mine]), _words(others[theirs])
        middle = own.shape[1] // 2
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        with Progress("Comparing", max(1, len(mine) * len(theirs))) as progress:
            for left in range(0, len(theirs), WIDTH):
                for top in range(0, len(mine), HEIGHT):
                    words = own[top : top + HEIGHT, None, middle] ^ other[None, left : left + WIDTH, middle]
                    near = np.flatnonzero(_count_bits(words) <= self.bits)
                    i, j = np.divmod(near, words.shape[1])
                    self._compare(own, other, i + top, j + left, found)
                done = min(left + WIDTH, len(theirs))
                progress.update(done * len(mine))
        for row, pairs in found.items():
            yield int(mine[row]), [(distance, int(theirs[at])) for distance, at in pairs]

    def _compare(
        self,
        own: np.ndarray,
        other: np.ndarray,
        i: np.ndarray,
        j: np.ndarray,
        found: dict[int, list[tuple[int, int]]],
    ) -> None:
        """Add the near pairs of rows `i` and others `j` to `found`."""
        distances = _count_bits(own[i] ^ other[j]).sum(1, dtype=np.int64)
        for k in np.flatnonzero(distances <= self.bits):
            nearest = found[int(i[k])]
            nearest.append((int(distances[k]), int(j[k])))
            if len(nearest) > 2 * LISTED:  # where thousands are alike
                nearest[:] = sorted(nearest)[:LISTED]


def _words(rows: np.ndarray) -> np.ndarray:
    """(N, words) uint64 of bytes (N, bytes), filled with zeros."""
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
    return np.ascontiguousarray(filled).view(np.uint64)


def _count_bits(words: np.ndarray) -> np.ndarray:
    """How many bits of each word are 1."""
    counts: np.ndarray
    if hasattr(np, "bitwise_count"):
        counts = np.bitwise_count(words)
    else:  # NumPy 1
        ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
        counts = ones[np.ascontiguousarray(words).view(np.uint8)].reshape(*words.shape, 8).sum(-1)
    return counts
