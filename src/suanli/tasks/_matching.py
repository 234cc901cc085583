"""Which answers of a detector are right: answers are matched with the boxes of one image, as COCO does it.

The best answer goes first, and takes the box of its class that it overlaps most, if that is enough and the box is free.
Boxes that don't count (crowds, difficult ones, and of a range of sizes those outside) come last; an answer that takes
one of them, or takes none and is outside of the range itself, doesn't count either. A crowd can be taken again and
again. Source: T.-Y. Lin et al., "Microsoft COCO", ECCV 2014, and the published evaluation. The area of an object is
that of its box.

D answers, G boxes, A ranges of sizes, T thresholds of the overlap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

OVERLAPS = np.linspace(0.5, 0.95, 10)  # intersection over union, from which an answer is right
RANGES = ("all", "small", "medium", "large")
AREAS = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)], np.float64)  # px², of each range
NEAR = 0.1  # an answer that overlaps an object less has found none
# Kinds of answers, at an overlap of 0.5. Source: D. Bolya et al., "TIDE: A General Toolbox for Identifying Object
# Detection Errors", ECCV 2020.
RIGHT, CLASS, PLACE, BOTH, DUPLICATE, BACKGROUND, UNCOUNTED = range(7)
_BITS = (1 << np.arange(len(OVERLAPS))).astype(np.uint16)


class Objects(NamedTuple):
    """The boxes of one image."""

    corners: np.ndarray  # (G, 4) float64: left, top, right, bottom in pixels of the image
    classes: np.ndarray  # (G,) int
    crowd: np.ndarray  # (G,) bool
    ignored: np.ndarray  # (G,) bool: crowds and difficult ones


class Matches(NamedTuple):
    """Of D answers, best first. Bit t of a number is for `OVERLAPS[t]`."""

    hit: np.ndarray  # (D, A) uint16: it found an object
    uncounted: np.ndarray  # (D, A) uint16: it counts neither as right nor as wrong
    kind: np.ndarray  # (D,) uint8
    object: np.ndarray  # (D,) int32: the object that it overlaps most, where `kind` is about one; else -1


def area(corners: np.ndarray) -> np.ndarray:
    """(…, 4) → (…,)"""
    areas: np.ndarray = (corners[..., 2] - corners[..., 0]) * (corners[..., 3] - corners[..., 1])
    return areas


def overlap(answers: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(D, G): intersection over union; with a crowd, over the area of the answer."""
    ends = np.minimum(answers[:, None, 2:], objects[None, :, 2:]) - np.maximum(
        answers[:, None, :2], objects[None, :, :2]
    )
    shared = ends.clip(0).prod(2)
    own = area(answers)[:, None]
    union = np.where(crowd, own, own + area(objects) - shared)
    shares: np.ndarray = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return shares


def outside_ranges(areas: np.ndarray) -> np.ndarray:
    """(A, n) bool"""
    outside: np.ndarray = (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])
    return outside


def count_objects(objects: Objects, classes: int) -> np.ndarray:
    """(classes, A): how many there are to find."""
    counted = ~(outside_ranges(area(objects.corners)) | objects.ignored)
    return np.stack([np.bincount(objects.classes[row], minlength=classes) for row in counted], axis=1)


def match(corners: np.ndarray, classes: np.ndarray, objects: Objects) -> Matches:
    """Of the answers (D, 4) of these classes (D,), the best first, in pixels of the image."""
    shares = overlap(corners, objects.corners, objects.crowd)
    same = classes[:, None] == objects.classes
    taken, uncounted = _match_greedily(np.where(same, shares, -1.0), objects)
    hit = (taken >= 0) & ~uncounted
    outside = outside_ranges(area(corners)).T[:, :, None]
    uncounted |= (taken < 0) & outside
    kind, about = _name_kinds(shares, same, uncounted[:, 0, 0], objects)
    kind[hit[:, 0, 0]] = RIGHT
    about = np.where(hit[:, 0, 0], taken[:, 0, 0], about)
    return Matches((hit * _BITS).sum(2, dtype=np.uint16), (uncounted * _BITS).sum(2, dtype=np.uint16), kind, about)


def _match_greedily(shares: np.ndarray, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """The object that each answer took (D, A, T), or -1, and whether it is one that doesn't count."""
    ignored = objects.ignored | outside_ranges(area(objects.corners))  # (A, G)
    least = np.minimum(OVERLAPS, 1 - 1e-10)
    free = np.ones((len(RANGES), len(OVERLAPS), shares.shape[1]), bool)
    free_or_crowd = free | objects.crowd
    taken = np.full((len(shares), len(RANGES), len(OVERLAPS)), -1, np.int32)
    uncounted = np.zeros(taken.shape, bool)
    rows, columns = np.indices(taken.shape[1:])
    all_near = shares >= least[0]
    count = all_near.sum(1)
    alone = (count == 1) & ~(all_near & (all_near.sum(0) > 1)).any(1)  # nobody else wants its only object
    if alone.any():
        objects_of = all_near[alone].argmax(1)
        found = (shares[alone, objects_of, None] >= least)[:, None]  # (n, 1, T)
        taken[alone] = np.where(found, objects_of[:, None, None], -1)
        uncounted[alone] = found & ignored[:, objects_of].T[:, :, None]
    for answer in np.flatnonzero((count > 0) & ~alone):
        near = np.flatnonzero(all_near[answer])
        own = shares[answer, near]
        possible = free_or_crowd[:, :, near] & (own >= least[:, None])
        counted = possible & ~ignored[:, None, near]
        possible = np.where(counted.any(2, keepdims=True), counted, possible)
        found = possible.any(2)
        # Of equal ones the last, as in the published evaluation.
        best = near[len(near) - 1 - np.where(possible, own, -1.0)[:, :, ::-1].argmax(2)]
        free_or_crowd[rows[found], columns[found], best[found]] = objects.crowd[best[found]]
        taken[answer], uncounted[answer] = np.where(found, best, -1), found & ignored[rows, best]
    return taken, uncounted


def _name_kinds(
    shares: np.ndarray, same: np.ndarray, uncounted: np.ndarray, objects: Objects
) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each answer (D,) that isn't right, and the object that it is about."""
    kind = np.full(len(shares), BACKGROUND, np.uint8)
    about = np.full(len(shares), -1, np.int32)
    if shares.shape[1]:
        shares = np.where(objects.ignored, 0.0, shares)  # what is wrong isn't blamed on an object that doesn't count
        own, other = np.where(same, shares, 0.0), np.where(same, 0.0, shares)
        best_own, best_other = own.max(1), other.max(1)
        kind[best_other >= NEAR] = BOTH
        kind[best_own >= NEAR] = PLACE
        kind[best_other >= OVERLAPS[0]] = CLASS
        kind[best_own >= OVERLAPS[0]] = DUPLICATE
        about = np.where(np.isin(kind, (CLASS, BOTH)), other.argmax(1), own.argmax(1)).astype(np.int32)
        about[kind == BACKGROUND] = -1
    kind[uncounted] = UNCOUNTED
    return kind, about
