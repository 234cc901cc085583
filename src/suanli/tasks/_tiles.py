"""Boxes in tiles of a picture: what a tile has of the objects, and one answer from those of all tiles.

Tiles overlap, so an object that a border cuts is usually whole in a neighbour. The part that a tile has of it is then
no answer: of two boxes of one class that share most of the smaller one, that which ends at a border inside the picture
is left out, unless it is by far the likelier one. All others are decided by non-maximum suppression, as inside of one
picture. Akyon et al., "Slicing Aided Hyper Inference", arXiv:2202.06934, describe training and prediction on tiles; the
rule for borders is suanli's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from suanli.core.schema import Geometry
from suanli.tasks._clean_boxes import DIFFICULT

COUNTS, VISIBLE = 0.5, 0.1  # shares of an object's area in a tile: from which it is to be found, and hardly to be seen
LEAST_PX = 4.0  # the longer side, below which an object isn't to be found
BORDER_PX = 2.0  # a box that ends so near to a border may go on behind it
SAME = 0.5  # the share of the smaller of two boxes from which they are parts of one object
PART = 0.5  # a part is left out for a whole one that has at least this share of its score
COARSE = 0.8  # the same for a box in the smaller picture of the whole, whose place is less exact than in a tile
COARSE_SHARED = 0.4  # of the union, from which a box in a tile and one in the whole are the same object


def cut_boxes(rows: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Rows (n, 6) of left, top, right, bottom, class and flag in the coordinates of a tile of this height and width:
    those that are visible, cut at its borders. Of what is only a small part, or tiny, nothing is learned."""
    height, width = size
    cut = rows.copy()
    cut[:, :4] = rows[:, :4].clip(0, (width, height, width, height))
    before, after = _areas(rows), _areas(cut)
    share = after / np.maximum(before, 1e-9)
    longer = (cut[:, 2:4] - cut[:, :2]).max(1, initial=0)
    unclear = (share < COUNTS) | (longer < LEAST_PX)
    cut[unclear & (cut[:, 5] == 0), 5] = DIFFICULT
    visible: np.ndarray = cut[(after > 0) & (share >= VISIBLE)]
    return visible


def at_border(corners: np.ndarray, geometry: Geometry, size: Sequence[int]) -> np.ndarray:
    """(n,) bool: which boxes (n, 4), in px of the whole picture, end at a border of the tile that lies inside it."""
    low = geometry.to_input(np.zeros(2))[::-1]
    high = geometry.to_input(np.asarray(size, np.float64))[::-1]
    whole = np.asarray(geometry.size, np.float64)[::-1]
    near = BORDER_PX / np.asarray(geometry.scale)[::-1]
    starts = (corners[:, :2] <= low + near) & (low > 0)
    ends = (corners[:, 2:] >= high - near) & (high < whole)
    return np.asarray((starts | ends).any(1))


class Candidates(NamedTuple):
    """The boxes of all tiles of a picture, in its px."""

    corners: np.ndarray  # (n, 4)
    classes: np.ndarray  # (n,)
    scores: np.ndarray  # (n,)
    cut: np.ndarray  # (n,) bool: it ends at a border inside the picture
    tile: np.ndarray  # (n,) int: where it was found
    scale: np.ndarray  # (n,): px of the tile for one of the picture


def choose_boxes(boxes: Candidates, shared: float) -> np.ndarray:
    """The positions of those that are answers, best first. `shared`: of the union of two boxes, from which the worse
    is left out."""
    areas = _areas(boxes.corners)
    longer = (boxes.corners[:, 2:] - boxes.corners[:, :2]).max(1, initial=0) * boxes.scale
    hidden = (longer < LEAST_PX) & (boxes.scale < 1)  # nothing so small was learned
    kept = []
    weights = np.where(boxes.cut, PART, 1.0) * np.where(boxes.scale < 1, COARSE, 1.0)
    order = np.argsort(-boxes.scores * weights, kind="stable")
    for place, i in enumerate(order.tolist()):
        if hidden[i]:
            continue
        kept.append(i)
        rest = order[place + 1 :]
        rest = rest[~hidden[rest] & (boxes.classes[rest] == boxes.classes[i]) & (boxes.tile[rest] != boxes.tile[i])]
        inside = _intersections(boxes.corners[i], boxes.corners[rest])
        union = areas[rest] + areas[i] - inside
        least = np.where(boxes.scale[rest] == boxes.scale[i], shared, min(shared, COARSE_SHARED))
        parts = boxes.cut[rest] & (inside >= SAME * np.minimum(areas[rest], areas[i]))
        hidden[rest] |= parts | (inside > least * union)
    best: np.ndarray = np.array(kept, np.int64)
    return best[np.argsort(-boxes.scores[best], kind="stable")]


def _intersections(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) areas that a box (4,) shares with others (n, 4)."""
    sides = np.minimum(others[:, 2:], one[2:]) - np.maximum(others[:, :2], one[:2])
    areas: np.ndarray = sides.clip(0).prod(1)
    return areas


def _areas(corners: np.ndarray) -> np.ndarray:
    areas: np.ndarray = (corners[:, 2:4] - corners[:, :2]).clip(0).prod(1)
    return areas
