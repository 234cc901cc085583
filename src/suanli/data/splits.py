"""Decides the split of each example that the data doesn't state.

The content of an input decides its split: the first 8 bytes of its digest, read as a number in [0, 1). So a new input
never moves another one, equal inputs are in the same split, and every class is split in the same expected proportion.
Where examples have a group, the digest of the group decides instead, so that no group is divided. Where they have a
time, the latest examples are the test split and the latest of the others the validation split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from suanli.core.errors import DataError, UsageError
from suanli.core.types import Example, Raw, Source


def split_of(digest: bytes, val_fraction: float, test_fraction: float) -> str:
    """The split of an input with this content digest (at least 8 bytes)."""
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def content_digest(raw: Raw) -> bytes:
    if isinstance(raw, str):
        raw = raw.encode(errors="surrogatepass")
    elif isinstance(raw, np.ndarray):
        raw = f"{raw.shape}{raw.dtype}".encode() + np.ascontiguousarray(raw).tobytes()
    elif isinstance(raw, Mapping):
        raw = b"".join(name.encode() + content_digest(array) for name, array in sorted(raw.items()))
    return hashlib.blake2b(raw, digest_size=16).digest()


def assign_splits(
    rows: Sequence[Example],
    content_digests: Callable[[Sequence[int]], Iterable[bytes | None]],
    *,
    val_fraction: float,
    test_fraction: float,
) -> list[str]:
    """One of SPLITS for each row; what the data states is kept.

    `content_digests` gives the digests of the inputs at these positions, None for one that can't be read: it is in the
    training split, where decoding reports it. Raises DataError where times leave nothing to train on.
    """
    published = {r.split for r in rows}
    val = 0.0 if "val" in published else val_fraction
    test = 0.0 if "test" in published else test_fraction
    splits = [r.split or "train" for r in rows]
    undecided = [] if val == test == 0 else [i for i, r in enumerate(rows) if r.split not in ("val", "test")]
    # A row without a split joins its group where the data states that group's split.
    stated = {r.group: r.split for r in rows if r.group is not None and r.split in ("val", "test")}
    joining = {i: stated[r.group] for i, r in enumerate(rows) if r.split is None and r.group in stated}
    for i, split in joining.items():
        splits[i] = split
    undecided = [i for i in undecided if i not in joining]
    if any(rows[i].time is not None for i in undecided):
        latest = _latest_times(rows, undecided)
        for i, split in zip(undecided, _split_by_time(latest, val, test), strict=True):
            splits[i] = split
        return splits
    digests: dict[int, bytes | None] = {i: content_digest(g) for i in undecided if (g := rows[i].group) is not None}
    others = [i for i in undecided if i not in digests]
    digests.update(zip(others, content_digests(others), strict=True))
    for i in undecided:
        # Always with both fractions, so that a published test split doesn't change which inputs are for validation.
        digest = digests[i]
        own = "train" if digest is None else split_of(digest, val_fraction, test_fraction)
        splits[i] = own if (own == "val" and val) or (own == "test" and test) else "train"
    return splits


def _latest_times(rows: Sequence[Example], positions: Sequence[int]) -> np.ndarray:
    """The time of each of these rows, or the latest of its group."""
    times = [-np.inf if (t := rows[i].time) is None else t for i in positions]
    latest: dict[str, float] = {}
    for i, time in zip(positions, times, strict=True):
        if (group := rows[i].group) is not None:
            latest[group] = max(time, latest.get(group, -np.inf))
    return np.array(
        [time if (g := rows[i].group) is None else latest[g] for i, time in zip(positions, times, strict=True)]
    )


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
            f"Split by time, nothing is left to train on: {len(times):,} examples have {different:,} different times "
            "(or groups with these latest times), and equal times stay together.",
            fix="Give finer times, smaller fractions (--set test_fraction=0.05), or a column named split.",
        )
    result: list[str] = splits.tolist()
    return result


def number_groups(rows: Sequence[Example]) -> np.ndarray | None:
    """For each row (N,) int64, the number of its group; a row without one has its own. None: no row has a group."""
    if all(r.group is None for r in rows):
        return None
    numbers: dict[str | int, int] = {}
    keys = [i if r.group is None else r.group for i, r in enumerate(rows)]
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
