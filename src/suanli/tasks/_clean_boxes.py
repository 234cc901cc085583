"""The boxes of one image as they are learned: inside of the image, with an area, each once; and what was wrong."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from suanli.core.boxes import Boxes, place
from suanli.core.schema import Geometry

CROWD, DIFFICULT = 1, 2  # flags of boxes that don't count
LEAST_SIDE = 1e-3  # px: less is no area
SLACK = 1.0  # px that a box may be outside of the image without a remark: tools round


class CleanBoxes(NamedTuple):
    corners: np.ndarray  # (n, 4) float64: left, top, right, bottom in pixels of the image
    labels: list[str]
    flags: np.ndarray  # (n,) uint8: 0, CROWD or DIFFICULT
    problems: Counter[str]  # boxes by "no area", "outside", "clipped", "exchanged", "repeated"; and what `place` found


def clean(target: Boxes, geometry: Geometry) -> CleanBoxes:
    """For an image with this geometry."""
    height, width = geometry.size
    placed = place(target, geometry)
    problems: Counter[str] = Counter()
    if placed.how and target.boxes:
        problems[placed.how] = len(target.boxes)
    corners = placed.corners
    ordered = np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1
    )
    inside = ordered.clip(0, np.array([width, height, width, height], np.float64))
    kept: dict[tuple[object, ...], int] = {}
    for i, box in enumerate(target.boxes):
        if (ordered[i, 2:] - ordered[i, :2]).min() < LEAST_SIDE:
            problems["no area"] += 1
        elif (inside[i, 2:] - inside[i, :2]).min() < LEAST_SIDE:
            problems["outside"] += 1
        elif (key := (*inside[i].round(3).tolist(), box.label)) in kept:
            problems["repeated"] += 1
        else:
            problems["clipped"] += bool(np.abs(inside[i] - ordered[i]).max() > SLACK)
            problems["exchanged"] += bool((corners[i] != ordered[i]).any())
            kept[key] = i
    rows = list(kept.values())
    boxes = [target.boxes[i] for i in rows]
    flags = np.array([CROWD if box.crowd else DIFFICULT if box.difficult else 0 for box in boxes], np.uint8)
    return CleanBoxes(inside[rows], [box.label for box in boxes], flags, +problems)
