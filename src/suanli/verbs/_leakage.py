"""Leaves examples that are also in training out of the scores of an evaluation, where enough others remain, and gives
the scores of the whole split beside them."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from suanli.core.compare import intervals
from suanli.core.console import plural, say, warn
from suanli.core.run import Run
from suanli.core.task import Records, Task
from suanli.core.types import Split
from suanli.data.cache import PreparedData
from suanli.data.examples import FILE as EXAMPLES
from suanli.data.examples import ExampleTable
from suanli.data.leaks import LeakCounts, count_leaks, describe_leaks, find_leaks, write_leaks

FEW_NEW = 10  # with fewer examples that are new to the model, all are scored


class PartScores(TypedDict):
    """The scores of some examples of a split."""

    count: int
    scores: dict[str, float | None]  # None: not defined for these examples
    intervals: dict[str, tuple[float, float]]


class Leakage(LeakCounts):
    """Examples of the split that are also in training."""

    excluded: bool  # all other figures of the evaluation are of the new examples alone
    whole: PartScores  # all examples of the split
    new: PartScores | None  # those that aren't in training; None: there are none


def compare_with_training(run: Run, prepared: PreparedData) -> np.ndarray | None:
    """Which examples the run has seen (N,); None: it doesn't say. Writes their list beside the prepared data."""
    if prepared.examples is None or not (run.path / EXAMPLES).exists():
        warn("The data isn't compared with the training examples: this run, or the cache, is of an older version.")
        return None
    seen = ExampleTable.load(run.path / EXAMPLES)
    leaks = find_leaks(prepared.examples.of("test"), seen, prepared.preprocess.similar_bits)
    if leaks.entries:
        file = prepared.path / f"leaks-{run.data['digest']}.csv"
        write_leaks(file, leaks.entries)
        say(f"The list of examples that are also in training: {file}")
    return leaks.kinds


def find_rows(task: Task, split: Split, name: str, records: Records) -> tuple[np.ndarray, Leakage | None]:
    """The positions of the examples whose scores count: those that the model hasn't seen, where there are enough."""
    rows = np.arange(len(split))
    if split.leaks is None or not split.leaks.any():
        return rows, None
    counts, new = count_leaks(split.leaks), np.flatnonzero(split.leaks == 0)
    excluded = len(new) >= FEW_NEW
    leakage: Leakage = {
        **counts,
        "excluded": excluded,
        "whole": score_part(task, split, records, rows),
        "new": score_part(task, split, records, new) if len(new) else None,
    }
    warn(f"data leakage: {describe_leaks(name, **counts)}. {_say_what_counts(leakage)}")
    return (new if excluded else rows), leakage


def select_rows(records: Records, rows: np.ndarray) -> Records:
    return {name: column[rows] for name, column in records.items()}


def score_part(task: Task, split: Split, records: Records, rows: np.ndarray) -> PartScores:
    """Of the examples at these positions."""
    chosen = select_rows(records, rows)
    scores = task.defined_scores(chosen)
    bounds = intervals(task, chosen, None if split.groups is None else split.groups[rows])
    return {
        "count": len(rows),
        "scores": scores,
        "intervals": {name: ends for name, ends in bounds.items() if scores.get(name) is not None},
    }


def _say_what_counts(leakage: Leakage) -> str:
    new = leakage["new"]
    if new is None:
        return "No example is new to the model, so these scores say nothing about new data."
    if not leakage["excluded"]:
        return f"Too few examples are new ({new['count']:,}) for a score of their own, so these scores are too high."
    return f"The scores are those of the other {plural(new['count'], 'example')}."
