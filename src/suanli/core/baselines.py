"""Baselines: the scores of predictions that need no network.

There are up to three: always the same answer; a linear model on a few features of each input, where that takes a second
or two; and gradient-boosted trees on the columns of a table. All are scored on the same resamples as the model, so the
paired difference says whether the model is better beyond chance. The task and the kind of data define them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from suanli.core.compare import difference
from suanli.core.schema import Stored, example_bytes, select
from suanli.core.task import Metric, Records, Task, format_number
from suanli.core.types import Difference, Preprocess, Split

FITTED_EXAMPLES = 3_000  # that a linear model learns from, at most
TREE_EXAMPLES = 100_000  # that trees learn from, and answer for, at most
MOST_EXAMPLES, MOST_BYTES = 20_000, 512 << 20  # that it answers for: more would take seconds


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline on one split."""

    name: str  # "constant", "linear", "trees"
    description: str  # 'always answering "dog"'
    scores: Mapping[str, float | None]
    gain: Difference  # of the model over it, in the primary metric

    def describe(self, metric: Metric) -> str:
        """A sentence that says whether the model is better than it, beyond the interval."""
        value, unit = self.scores.get(metric.name), metric.unit
        percent = unit == "fraction"
        score = "n/a" if value is None else f"{_format(value, unit)} {'%' if percent else unit}".rstrip()
        than = f"{self.description} ({metric.name.replace('_', ' ')} {score})"
        if self.gain.low > 0:
            amounts = f"{_format(self.gain.low, unit)} to {_format(self.gain.high, unit)}"
            return f"The model is better than {than} by {amounts} {'points' if percent else unit}".rstrip() + "."
        return f"The model is {'worse' if self.gain.high < 0 else 'not better'} than {than}."


def compare_with_baselines(
    task: Task,
    preprocess: Preprocess,
    records: Records,
    split: Split,
    training: Split | None,
    rows: np.ndarray | None = None,
) -> list[Baseline]:
    """The baselines of a model with these records on `split`, or on its examples at `rows`. Without the training split
    there is only the constant one, from what the task learned of it."""
    rows = np.arange(len(split)) if rows is None else rows
    names = task.scores(records).keys()
    groups = None if split.groups is None else split.groups[rows]
    baselines = []
    for name, description, answered in _answer(task, preprocess, split, training):
        others = {key: column[rows] for key, column in answered.items()}
        scores = {key: value for key, value in task.defined_scores(others).items() if key in names}
        gain = difference(task, others, records, groups)
        baselines.append(Baseline(name=name, description=description, scores=scores, gain=gain))
    return baselines


def _answer(
    task: Task, preprocess: Preprocess, split: Split, training: Split | None
) -> Iterator[tuple[str, str, Records]]:
    constant = task.constant_baseline(split.targets)
    if constant is None and training is not None:  # older versions didn't keep what it needs
        constant = task.fit(training.targets).constant_baseline(split.targets)
    if constant is not None:
        yield "constant", *constant
    if training is None:
        return
    if len(split) <= MOST_EXAMPLES and len(split) * example_bytes(split.inputs) <= MOST_BYTES:
        linear = _fit(task.linear_baseline, preprocess.features, training, split, FITTED_EXAMPLES)
        if linear is not None:
            yield "linear", f"{linear[0]} on {preprocess.features_name}", linear[1]
    if len(split) <= TREE_EXAMPLES:
        trees = _fit(task.tree_baseline, preprocess.columns_for_trees, training, split, TREE_EXAMPLES)
        if trees is not None:
            yield "trees", f"{trees[0]} on {preprocess.features_name}", trees[1]


def _fit(
    baseline: Callable[..., tuple[str, Records] | None],
    features: Callable[[Mapping[str, Stored], np.ndarray], Any],
    training: Split,
    split: Split,
    most: int,
) -> tuple[str, Records] | None:
    """A baseline that learns from at most so many training examples; None: there is none."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(training))[:most])
    known, asked = (features(s.inputs, i) for s, i in ((training, training.index[chosen]), (split, split.index)))
    if known is None:
        return None
    learned = {name: select(column, chosen) for name, column in training.targets.items()}
    return baseline(known, learned, asked, split.targets)


def _format(value: float, unit: str) -> str:
    return f"{100 * value:.1f}" if unit == "fraction" else format_number(value)
