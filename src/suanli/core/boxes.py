"""Targets of the annotation "boxes": what formats of annotation files give, and tasks learn from.

Coordinates are continuous, in pixels of the image after its EXIF rotation: x to the right and y down from the outer
corner of the first pixel, so a box around all of an image of 640x480 is 0, 0, 640, 480. What a file of annotations
states may be of another size, of the pixels before the rotation, or shares of the sides; `place` finds out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from suanli.core.schema import Geometry


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    label: str
    crowd: bool = False  # a group whose members aren't labelled one by one: neither learned nor counted as missed
    difficult: bool = False  # its publisher doesn't count it, such as an object that is hardly visible


class Boxes(NamedTuple):
    """All boxes of one image, as its annotation states them."""

    boxes: Sequence[Box] = ()
    size: tuple[float, float] | None = None  # height and width that the annotation states; None: it doesn't
    relative: bool = False  # coordinates are shares of the image's width and height; else pixels


class Placed(NamedTuple):
    """Boxes in pixels of the image after its EXIF rotation."""

    corners: np.ndarray  # (n, 4) float64: left, top, right, bottom, neither clipped nor ordered
    # "turned" (they were of the pixels before the rotation), "scaled" (to the size that the image has), "unlike" (the
    # stated size isn't that of the image, and they were taken as they are), "unsure" (the image is rotated and nothing
    # says whether they are), or empty: as stated
    how: str = ""


def place(target: Boxes, geometry: Geometry) -> Placed:
    """The boxes of an image with this geometry, whatever its annotation says of the image's size."""
    corners = np.array([box[:4] for box in target.boxes], np.float64).reshape(-1, 4)
    height, width = map(float, geometry.size)
    if target.relative:
        return Placed(corners * (width, height, width, height), "unsure" if geometry.orientation > 4 else "")
    turned = geometry.orientation > 4  # the sides were exchanged
    stored = (width, height) if turned else (height, width)
    size = target.size
    if size is None or min(size) <= 0:
        if turned and len(corners):
            if not _fits(corners, (height, width)) and _fits(corners, stored):
                return Placed(_turn_upright(corners, geometry), "turned")
            return Placed(corners, "unsure")
        return Placed(corners)
    if size == (height, width):
        return Placed(corners)
    if turned and size == stored:
        return Placed(_turn_upright(corners, geometry), "turned")
    down, right = height / size[0], width / size[1]
    if math.isclose(down * size[1], width, abs_tol=1.01) or math.isclose(right * size[0], height, abs_tol=1.01):
        return Placed(corners * (right, down, right, down), "scaled")
    return Placed(corners, "unlike")


def _fits(corners: np.ndarray, size: tuple[float, float]) -> bool:
    """Whether all lie in an image of this height and width, up to a pixel."""
    return bool((corners.max(0) <= (size[1] + 1, size[0] + 1) * 2).all())


def _turn_upright(corners: np.ndarray, geometry: Geometry) -> np.ndarray:
    """From the pixels as they are stored to those after the EXIF rotation."""
    (height, width), orientation = geometry.size, geometry.orientation
    points = corners.reshape(-1, 2, 2)
    if orientation > 4:
        points = points[..., ::-1]
    x, y = points[..., 0], points[..., 1]
    if orientation in (2, 3, 6, 7):
        x = width - x
    if orientation in (3, 4, 7, 8):
        y = height - y
    ends = np.stack([x, y], axis=-1)
    return np.concatenate([ends.min(1), ends.max(1)], axis=1)
