"""Decides the split of each example that the data doesn't state.

The content of an input decides its split: the first 8 bytes of its digest, read as a number in [0, 1). So equal inputs
are in the same split, and every class is split in the same expected proportion. Where examples have a group, the digest
of the group decides instead, so that no group is divided. Then as few as possible are moved so that each split has some
of each class: a class of which a split would have less than half or more than twice its share, or none. What was
assigned before stays (`data/kept_splits.py`), so that a new input never moves another one. Where examples have a time,
the latest are the test split and the latest of the others the validation split.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from suanli.core.errors import DataError, UsageError
from suanli.core.types import SPLITS, Example, Raw, Source, Target
from suanli.data.example_columns import ExampleColumns
from suanli.data.examples import rows_of_bytes


def split_of(digest: bytes, val_fraction: float, test_fraction: float) -> str:
    """The split of an input with this content digest (at least 8 bytes)."""
    position = _position(digest)
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def content_digest(raw: Raw) -> bytes:
    if isinstance(raw, str):
        raw = raw.encode(errors="surrogatepass")
    elif isinstance(raw, np.ndarray):
        raw = f"{raw.shape}{raw.dtype}".encode() + np.ascontiguousarray(raw).tobytes()
    elif isinstance(raw, Mapping):
        raw = b"".join(name.encode() + content_digest(_plain(value)) for name, value in sorted(raw.items()))
    return hashlib.blake2b(raw, digest_size=16).digest()


def _plain(value: object) -> Raw:
    return value if isinstance(value, np.ndarray) else repr(value)


Known: TypeAlias = Mapping[bytes, str]  # a unit (8 bytes) -> its split
MANY = 200_000  # rows, from which on they are assigned by arrays
MOST_CLASSES = 10_000  # different targets; of more, no split needs some of each
UNIT_BYTES = 8  # of the digest of what a split never divides: a group, or an input by its content


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Of N examples."""

    splits: list[str]  # each one of SPLITS
    units: Sequence[bytes] | np.ndarray  # b"" where the data or a time decides the split; (N, 8) uint8 of many

    @property
    def units_array(self) -> np.ndarray:
        """(N, 8) uint8, zeros where the data or a time decides the split."""
        return self.units if isinstance(self.units, np.ndarray) else rows_of_bytes(self.units, UNIT_BYTES)


def assign_splits(
    examples: Sequence[Example],
    content_digests: Callable[[Sequence[int]], Iterable[bytes | None] | np.ndarray],
    *,
    val_fraction: float,
    test_fraction: float,
    strata: Callable[[Target], Iterable[str]] | None = None,
    known: Known | None = None,
) -> Assignment:
    """One of SPLITS for each example; what the data states is kept.

    `content_digests` gives the digests of the inputs at these positions, None for one that can't be read: it is in the
    training split, where decoding reports it. `strata` gives the classes of a target, of which each split should have
    some; None: nothing is moved for that. `known` are units whose split was decided before. Raises DataError where
    times leave nothing to train on.
    """
    rows = ExampleColumns.of(examples)
    published = set(rows.splits)
    fractions = {
        "val": 0.0 if "val" in published else val_fraction,
        "test": 0.0 if "test" in published else test_fraction,
    }
    if rows.block is not None and len(rows) > MANY and rows.groups is None and rows.times is None and not known:
        return _assign_many(rows, content_digests, fractions, val_fraction, test_fraction, strata)
    splits, units = [split or "train" for split in rows.splits], [b""] * len(rows)
    undecided = (
        [i for i, split in enumerate(rows.splits) if split not in ("val", "test")] if any(fractions.values()) else []
    )
    groups = rows.groups or [None] * len(rows)
    # A row without a split joins its group where the data states that group's split.
    stated: dict[str | None, str] = {
        g: s for g, s in zip(groups, rows.splits, strict=True) if g is not None and s in ("val", "test")
    }
    joining = {
        i: stated[g] for i, (g, s) in enumerate(zip(groups, rows.splits, strict=True)) if s is None and g in stated
    }
    for i, split in joining.items():
        splits[i] = split
    undecided = [i for i in undecided if i not in joining]
    if rows.times is not None and any(rows.times[i] is not None for i in undecided):
        latest = _latest_times(rows, undecided)
        for i, split in zip(undecided, _split_by_time(latest, fractions["val"], fractions["test"]), strict=True):
            splits[i] = split
        return Assignment(splits=splits, units=units)
    digests: dict[int, bytes | None] = {i: content_digest(g) for i in undecided if (g := groups[i]) is not None}
    others = [i for i in undecided if i not in digests]
    given = content_digests(others)
    found = [row.tobytes() for row in given] if isinstance(given, np.ndarray) else given
    digests.update(zip(others, found, strict=True))
    members: dict[bytes, list[int]] = defaultdict(list)
    for i in undecided:
        if (digest := digests[i]) is not None:
            members[digest[:UNIT_BYTES]].append(i)
    assigned: dict[bytes, str] = {}
    for unit in members:
        # Always with both fractions, so that a published test split doesn't change which inputs are for validation.
        own = (known or {}).get(unit) or split_of(unit, val_fraction, test_fraction)
        assigned[unit] = own if own == "train" or fractions[own] else "train"
    if strata is not None:
        classes = {unit: {name for i in at for name in strata(rows.targets[i])} for unit, at in members.items()}
        assigned |= balance(assigned, classes, fractions, fixed=known or {})
    for unit, at in members.items():
        for i in at:
            splits[i], units[i] = assigned[unit], unit
    return Assignment(splits=splits, units=units)


def _assign_many(
    rows: ExampleColumns,
    content_digests: Callable[[Sequence[int]], Iterable[bytes | None] | np.ndarray],
    fractions: Mapping[str, float],
    val_fraction: float,
    test_fraction: float,
    strata: Callable[[Target], Iterable[str]] | None,
) -> Assignment:
    """As `assign_splits`, by arrays. Only rows of classes that have too few in a split are looked at one by one, so
    what is moved there isn't weighed against the other classes."""
    numbers: dict[str | None, int] = {None: 0} | {name: i for i, name in enumerate(SPLITS)}
    splits = np.fromiter(map(numbers.__getitem__, rows.splits), np.uint8, len(rows))
    units = np.zeros((len(rows), UNIT_BYTES), np.uint8)
    undecided = np.flatnonzero(splits == 0) if any(fractions.values()) else np.zeros(0, np.int64)
    if len(undecided):
        digests = content_digests(undecided)  # type: ignore[arg-type]  # an array is a sequence
        assert isinstance(digests, np.ndarray)
        own = np.ascontiguousarray(digests[:, :UNIT_BYTES])
        position = own.view(">u8").ravel().astype(np.float64) / 2**64
        of_val = (position >= test_fraction) & (position < test_fraction + val_fraction) & bool(fractions["val"])
        of_test = (position < test_fraction) & bool(fractions["test"])
        splits[undecided] = np.select([of_val, of_test], [1, 2], 0)
        units[undecided] = own
        if strata is not None:
            _balance_rare(rows, splits, units, undecided, strata, fractions)
    return Assignment(splits=[SPLITS[number] for number in splits.tolist()], units=units)


def _balance_rare(
    rows: ExampleColumns,
    splits: np.ndarray,
    units: np.ndarray,
    undecided: np.ndarray,
    strata: Callable[[Target], Iterable[str]],
    fractions: Mapping[str, float],
) -> None:
    """Moves units of classes of which a split has too few or too many; changes `splits`."""
    if not tuple(strata(rows.targets[int(undecided[0])])):  # the task has no classes
        return
    shares = {"train": 1 - sum(fractions.values()), **fractions}
    codes, targets = _number_targets([rows.targets[i] for i in undecided.tolist()])
    if len(targets) > MOST_CLASSES:
        return
    names = [tuple(strata(target)) for target in targets]
    counts = {s: np.bincount(codes[splits[undecided] == i], minlength=len(targets)) for i, s in enumerate(SPLITS)}
    rare = np.zeros(len(targets), bool)
    for code in range(len(targets)):
        of_class = {split: int(counts[split][code]) for split in SPLITS}
        bounds = _bounds(sum(of_class.values()), shares)
        rare[code] = bool(names[code]) and _excess(of_class, bounds) > 0
    at = undecided[rare[codes]]
    if not len(at) or len(at) > MANY:
        return
    own = {i: units[i].tobytes() for i in at.tolist()}
    assigned = {unit: SPLITS[splits[i]] for i, unit in own.items()}
    classes = {unit: set(strata(rows.targets[i])) for i, unit in own.items()}
    moved = balance(assigned, classes, fractions, fixed=())
    for i, unit in own.items():
        splits[i] = SPLITS.index(moved.get(unit, assigned[unit]))


def _number_targets(targets: Sequence[Target]) -> tuple[np.ndarray, list[Target]]:
    """A code (N,) for each, and the different ones."""
    known: dict[Target, int] = {}
    codes = np.fromiter((known.setdefault(target, len(known)) for target in targets), np.int64, len(targets))
    return codes, list(known)


def balance(
    assigned: Mapping[bytes, str],
    classes: Mapping[bytes, Collection[str]],
    fractions: Mapping[str, float],
    *,
    fixed: Container[bytes],
) -> dict[bytes, str]:
    """The fewest moves of units, but `fixed` ones, after which each split has its part of each class, and then of all:
    the units that move, with their new splits. Found greedily; of equal moves, the unit nearest to the other split by
    its digest goes."""
    shares = {"train": 1 - sum(fractions.values()), **fractions}
    counts: dict[str | None, Counter[str]] = defaultdict(Counter)  # None: of all classes
    for unit, split in assigned.items():
        for name in (None, *classes[unit]):
            counts[name][split] += 1
    bounds = {name: _bounds(number.total(), shares) for name, number in counts.items()}
    moved: dict[bytes, str] = {}
    for name in sorted(counts, key=lambda name: (name is None, name or "")):
        if not _excess(counts[name], bounds[name]):
            continue
        movable = [unit for unit in assigned if unit not in fixed and (name is None or name in classes[unit])]
        while _excess(counts[name], bounds[name]):
            best = (0, 0, 0.0, b"", "")  # of the classes, of all, nearness
            for unit in movable:
                now = moved.get(unit, assigned[unit])
                for split in shares:
                    if split != now and shares[split]:
                        own = sum(_gain(counts[c], bounds[c], now, split) for c in classes[unit])
                        of_all = _gain(counts[None], bounds[None], now, split)
                        best = max(best, (own, of_all, -_distance(unit, split, fractions), unit, split))
            if best[:2] <= (0, 0):
                break
            *_, unit, split = best
            for c in (None, *classes[unit]):
                counts[c].subtract([moved.get(unit, assigned[unit])])
                counts[c][split] += 1
            moved[unit] = split
    return {unit: split for unit, split in moved.items() if split != assigned[unit]}


def _bounds(count: int, shares: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """The fewest and the most of `count` units that each split may have: half and twice its share, and at least one.
    Of two units one is for training; a single one may be anywhere."""
    if count < len(SPLITS):
        return {"train": (1 if count == 2 else 0, count)}
    slack = 1e-9  # 0.1 * 30 is more than 3
    return {
        split: (max(1, int(share * count / 2 + slack)), max(1, int(2 * share * count + slack)))
        for split, share in shares.items()
        if share
    }


def _excess(counts: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]) -> int:
    """By how many units the splits are beyond their bounds."""
    return sum(_beyond(counts[split], bounds[split]) for split in bounds)


def _beyond(count: int, bounds: tuple[int, int]) -> int:
    return max(0, bounds[0] - count, count - bounds[1])


def _gain(counts: Mapping[str, int], bounds: Mapping[str, tuple[int, int]], now: str, then: str) -> int:
    """How much less the splits of a class are beyond their bounds once a unit has moved."""
    gain = 0
    for split, change in ((now, -1), (then, 1)):
        if split in bounds:
            gain += _beyond(counts[split], bounds[split]) - _beyond(counts[split] + change, bounds[split])
    return gain


def _position(digest: bytes) -> float:
    return int.from_bytes(digest[:UNIT_BYTES], "big") / 2**64


def _distance(unit: bytes, split: str, fractions: Mapping[str, float]) -> float:
    """From the unit's number to those of a split: test is below validation, which is below training."""
    low, high = {
        "test": (0.0, fractions["test"]),
        "val": (fractions["test"], fractions["test"] + fractions["val"]),
        "train": (fractions["test"] + fractions["val"], 1.0),
    }[split]
    position = _position(unit)
    return max(0.0, low - position, position - high)


def _latest_times(rows: ExampleColumns, positions: Sequence[int]) -> np.ndarray:
    """The time of each of these rows, or the latest of its group."""
    assert rows.times is not None
    times = [-np.inf if (t := rows.times[i]) is None else t for i in positions]
    groups = [None if rows.groups is None else rows.groups[i] for i in positions]
    latest: dict[str, float] = {}
    for group, time in zip(groups, times, strict=True):
        if group is not None:
            latest[group] = max(time, latest.get(group, -np.inf))
    return np.array([time if group is None else latest[group] for group, time in zip(groups, times, strict=True)])


def _split_by_time(times: np.ndarray, val: float, test: float) -> list[str]:
    """A split for each of `times` (N,): at least `test` of them, the latest, and at least `val` before those. Equal
    times are never divided. Raises DataError where none is left to train on."""
    splits = np.full(len(times), "train", dtype="<U5")
    for split, fraction in (("test", test), ("val", val)):
        rest = np.sort(times[splits == "train"])
        if fraction and len(rest):
            count = min(len(rest), max(1, round(fraction * len(times))))
            splits[(splits == "train") & (times >= rest[-count])] = split
    if not (splits == "train").any():
        different = len(np.unique(times))
        raise DataError(
            f"A split by time leaves nothing to train on: {len(times):,} examples have {different:,} different times "
            "(or groups with these latest times), and equal times stay together.",
            fix="Give finer times, smaller fractions (--set test_fraction=0.05), or a column named split.",
        )
    result: list[str] = splits.tolist()
    return result


def number_groups(rows: ExampleColumns) -> np.ndarray | None:
    """For each row (N,) int64, the number of its group; a row without one has its own. None: no row has a group."""
    if rows.groups is None:
        return None
    numbers: dict[str | int, int] = {}
    keys = [i if group is None else group for i, group in enumerate(rows.groups)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def group_by_pattern(source: Source, pattern: str) -> Source:
    """`source` with the group of each example: what the one capture group of the regular expression `pattern` matches
    in its name. Raises UsageError for a pattern that can't be used or doesn't match every name."""
    fix = r"Put the part that names the group into parentheses, such as --group-pattern '([^/]+)_\d+\.wav'."
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-pattern {pattern!r} is not a regular expression: {error}.", fix=fix) from error
    if compiled.groups != 1:
        raise UsageError(
            f"--group-pattern {pattern!r} has {compiled.groups} capture groups; one is needed.",
            fix=f"{fix} Parentheses that capture nothing are written (?:…).",
        )
    matches = [compiled.search(row.name) for row in source.examples]
    groups = [match.group(1) if match else None for match in matches]
    missing = [row.name for row, group in zip(source.examples, groups, strict=True) if not group]
    if missing:
        raise UsageError(
            f"--group-pattern {pattern!r} finds no group in {len(missing):,} of {len(groups):,} names: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}.",
            fix=f"{fix} It is looked for anywhere in a name.",
        )
    rows = [replace(row, group=group) for row, group in zip(source.examples, groups, strict=True)]
    return replace(source, examples=rows, fingerprint=f"{source.fingerprint} group_pattern={pattern}")
