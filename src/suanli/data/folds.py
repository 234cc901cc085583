"""Folds of a cross-validation: each example is in the test split of one of them.

A group, or a set of equal inputs, is never divided: it is one unit, in one fold. The units of each class are spread
evenly over the folds, those of rare classes first, in an order that a digest with the number of the repetition decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from suanli.core.errors import DataError, UsageError
from suanli.core.types import Source, Target
from suanli.data.example_columns import ExampleColumns
from suanli.data.examples import LEFT_OUT, ExampleTable


def deal_folds(
    source: Source, table: ExampleTable, strata: Callable[[Target], Iterable[str]], count: int, repetition: int = 0
) -> list[int | None]:
    """The fold of each example of `source`, from 0; None: the data states that it is a test example, or it can't be
    decoded. `table` has the same examples. Raises UsageError for times, which folds don't respect, and DataError where
    there are fewer units than folds."""
    rows = ExampleColumns.of(source.examples)
    if rows.times is not None:
        raise UsageError(
            "--folds would train on examples that are later than those it is tested on.",
            fix="Leave out --folds, or train without --time-column.",
        )
    members: dict[bytes, list[int]] = defaultdict(list)
    for i, split in enumerate(rows.splits):
        if split != "test" and table.splits[i] != LEFT_OUT:
            group = None if rows.groups is None else rows.groups[i]
            members[table.digests[i].tobytes() if group is None else group.encode()].append(i)
    if len(members) < count:
        raise DataError(
            f"{count} folds need as many different examples, or groups, and there are {len(members)}.",
            fix="Choose fewer folds.",
        )
    classes = {
        unit: tuple(sorted({name for i in at for name in strata(rows.targets[i])})) for unit, at in members.items()
    }
    frequency = Counter(classes.values())
    seed = repetition.to_bytes(4, "big")
    order = sorted(
        members,
        key=lambda unit: (frequency[classes[unit]], classes[unit], hashlib.blake2b(seed + unit).digest()),
    )
    of_class: dict[tuple[str, ...], Counter[int]] = defaultdict(Counter)
    of_all: Counter[int] = Counter()
    folds: list[int | None] = [None] * len(rows)
    for unit in order:
        fold = min(range(count), key=lambda f: (of_class[classes[unit]][f], of_all[f], f))
        of_class[classes[unit]][fold] += 1
        of_all[fold] += len(members[unit])
        for i in members[unit]:
            folds[i] = fold
    return folds


def fold_source(source: Source, folds: Sequence[int | None], fold: int) -> Source:
    """The data of one fold: its examples are the test split, and the validation split is taken from the others."""
    at = np.flatnonzero([own is not None for own in folds])
    rows = ExampleColumns.of(source.examples).take(at, ["test" if folds[i] == fold else None for i in at.tolist()])
    digest = hashlib.blake2b(repr(folds).encode(), digest_size=8).hexdigest()
    fingerprint = f"{source.fingerprint} fold {fold} of {digest}"
    return replace(source, examples=rows, origin="", size_bytes=None, fingerprint=fingerprint)
