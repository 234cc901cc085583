"""The average precision of a detector, as COCO defines it, under any weights of the images.

Answers are sorted once; each row of weights then costs a few running sums, so that a bootstrap of a thousand resamples
takes seconds. Precision is read at 101 steps of recall, where it is the best that any recall from there on has. Answers
of equal scores are one step, so that their order changes nothing; where all scores differ, the result is that of the
published evaluation. Source: T.-Y. Lin et al., "Microsoft COCO", ECCV 2014.

N images, M answers of an image, R rows of weights, K classes, A ranges of sizes, T thresholds of the overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from suanli.core.task import Records
from suanli.tasks._matching import OVERLAPS, RANGES

EVERY = (1 << len(OVERLAPS)) - 1  # all bits of `Matches.uncounted`
STEPS = np.linspace(0, 1, 101)  # of recall
LIMITS = (1, 10, 100)  # answers of a class in an image, of which a recall is given; the last holds for all scores


@dataclass(frozen=True, kw_only=True)
class ClassAnswers:
    """All answers of one class, best first: n of them."""

    scores: np.ndarray  # (n,)
    images: np.ndarray  # (n,)
    ranks: np.ndarray  # (n,) among the answers of this class in the image
    hit: np.ndarray  # (n, A), see `Matches`
    uncounted: np.ndarray  # (n, A)
    objects: np.ndarray  # (N, A) in each image

    @classmethod
    def of(cls, records: Records, label: int, limit: int = LIMITS[-1]) -> ClassAnswers:
        """At most `limit` of each image."""
        images, places = np.nonzero(records["class"] == label)
        ranks = np.arange(len(images)) - np.searchsorted(images, images)
        kept = ranks < limit
        images, places, ranks = images[kept], places[kept], ranks[kept]
        scores = records["score"][images, places]
        order = np.argsort(-scores, kind="stable")
        images, places = images[order], places[order]
        return cls(
            scores=scores[order],
            images=images,
            ranks=ranks[order],
            hit=records["hit"][images, places].astype(np.int64),
            uncounted=records["uncounted"][images, places].astype(np.int64),
            objects=records["objects"][:, label].astype(np.float64),
        )

    @cached_property
    def groups(self) -> np.ndarray:
        """(n,): the number of each answer's step: equal scores have one."""
        return (
            np.cumsum(np.concatenate([[0], self.scores[1:] != self.scores[:-1]])) if len(self.scores) else self.images
        )

    def average_precision(self, weights: np.ndarray, range_: int, steps: Sequence[int]) -> np.ndarray:
        """(R, len(steps)) for weights (R, N), at `OVERLAPS[t]` for each of `steps`; NaN where there are no objects."""
        objects = weights @ self.objects[:, range_]
        kept = self.uncounted[:, range_] != EVERY  # of a range of sizes, most answers are outside of it
        uncounted, hits, groups = self.uncounted[kept, range_], self.hit[kept, range_], self.groups[kept]
        own = weights[:, self.images[kept]]
        everything: np.ndarray | None = None  # the running sum of all answers, where all count
        results = []
        for step in steps:
            counts = (uncounted >> step) & 1 == 0
            hit = (hits >> step) & 1 == 1
            if counts.all():
                everything = own.cumsum(1) if everything is None else everything
                results.append(_average_precision(everything, own[:, hit], groups, groups[hit], objects))
            else:
                some = own[:, counts].cumsum(1)
                results.append(_average_precision(some, own[:, hit], groups[counts], groups[hit], objects))
        return np.stack(results, axis=1)

    def recall(self, weights: np.ndarray, range_: int, limit: int) -> np.ndarray:
        """(R,): the mean over all thresholds of the overlap, of at most `limit` answers an image; NaN where there are
        no objects."""
        hits = (self.hit[:, range_, None] >> np.arange(len(OVERLAPS))) & 1
        found = np.bincount(self.images, hits.sum(1) * (self.ranks < limit), minlength=weights.shape[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            recall: np.ndarray = weights @ found / len(OVERLAPS) / (weights @ self.objects[:, range_])
        return recall


def _average_precision(
    answers: np.ndarray, hits: np.ndarray, groups: np.ndarray, hit_groups: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """(R,) from the running sums of the weights of all answers that count (R, n), the weights of those that found an
    object (R, h), and the weight of all objects (R,). The best precision is always that of an answer which found one,
    so only these are looked at."""
    if not hits.shape[1]:
        return np.where(objects > 0, 0.0, np.nan)
    last = np.flatnonzero(np.concatenate([hit_groups[1:] != hit_groups[:-1], [True]]))  # of each step
    found = hits.cumsum(1)[:, last]
    ends = np.searchsorted(groups, hit_groups[last], side="right") - 1
    shown = answers[:, ends]
    precision = np.divide(found, shown, out=np.zeros_like(found), where=shown > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.round(found / objects[:, None], 12)  # sums in another order differ in the last digits
    recall = np.nan_to_num(recall, posinf=0.0)
    place = np.floor(recall * 100 + 1e-9).astype(np.int64).clip(0, 100)
    reached = place + (recall >= STEPS[place])  # how many steps of recall there are up to this one
    reached[:, 1:] -= reached[:, :-1].copy()
    return np.where(objects > 0, (best * reached).sum(1) / len(STEPS), np.nan)


def class_precisions(records: Records, weights: np.ndarray) -> np.ndarray:
    """The average precision (R, K) of each class, the mean over all thresholds of the overlap."""
    steps = range(len(OVERLAPS))
    every = [
        ClassAnswers.of(records, label).average_precision(weights, 0, steps).mean(1)
        for label in range(records["objects"].shape[1])
    ]
    return np.stack(every, axis=1)


def mean_scores(records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
    """COCO's twelve figures (R,); NaN where nothing of the size is there."""
    classes = records["objects"].shape[1]
    all_steps = range(len(OVERLAPS))
    precision: dict[str, list[np.ndarray]] = {name: [] for name in RANGES}
    recall: dict[str, list[np.ndarray]] = {name: [] for name in (*RANGES[1:], *map(str, LIMITS))}
    for label in range(classes):
        one = ClassAnswers.of(records, label)
        for i, name in enumerate(RANGES):
            precision[name].append(one.average_precision(weights, i, all_steps))
            if i:
                recall[name].append(one.recall(weights, i, LIMITS[-1]))
        for limit in LIMITS:
            recall[str(limit)].append(one.recall(weights, 0, limit))
    by_range = {name: np.stack(values, axis=1) for name, values in precision.items()}  # (R, K, T)
    scores = {"map": mean(by_range["all"]), "map_50": mean(by_range["all"][..., :1])}
    scores |= {"map_75": mean(by_range["all"][..., 5:6])}
    scores |= {f"map_{name}": mean(by_range[name]) for name in RANGES[1:]}
    scores |= {f"recall_{name}": mean(np.stack(values, axis=1)) for name, values in recall.items()}
    return scores


def mean(values: np.ndarray) -> np.ndarray:
    """(R,): over all other axes, without NaN; NaN where there is nothing else."""
    rows = values.reshape(len(values), -1)
    defined = ~np.isnan(rows)
    count = defined.sum(1)
    means: np.ndarray = np.divide(
        np.where(defined, rows, 0).sum(1), count, out=np.full(len(rows), np.nan), where=count > 0
    )
    return means
