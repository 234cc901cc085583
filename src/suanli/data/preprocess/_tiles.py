"""Large pictures as overlapping tiles of their own size, in which small objects keep their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from suanli.core.schema import Geometry
from suanli.data.preprocess._resizing import PAD_LEVEL, resize

TILE_OVERLAP, MOST_OVERLAP = 0.2, 0.8  # shares of a tile


def cut_tiles(pixels: np.ndarray, side: int, overlap: float) -> tuple[np.ndarray, tuple[Geometry, ...]]:
    """(T, side, side, C) of a picture (H, W, C): tiles that overlap by at least this share, spread evenly, and, where
    there is more than one, the whole picture, made smaller. What lies outside of a small picture is grey."""
    height, width, channels = pixels.shape
    rows, geometries = [], []
    for top in _starts(height, side, overlap):
        for left in _starts(width, side, overlap):
            part = pixels[max(top, 0) : top + side, max(left, 0) : left + side]
            tile = np.full((side, side, channels), PAD_LEVEL, np.uint8)
            tile[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]] = part
            rows.append(tile)
            geometries.append(Geometry(size=(height, width), scale=(1.0, 1.0), shift=(float(-top), float(-left))))
    if len(rows) > 1:
        whole, geometry = resize(pixels, side, side, "pad")
        rows.append(whole)
        geometries.append(geometry)
    return np.stack(rows), tuple(geometries)


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Where tiles start along an axis of the picture; before its start where the picture is smaller than a tile."""
    if length <= side:
        return [-((side - length) // 2)]
    count = 1 + math.ceil((length - side) / (side * (1 - overlap)))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def join_tiles(tiles: np.ndarray, geometries: Sequence[Geometry]) -> np.ndarray:
    """The picture (H, W, C) that these tiles (T, side, side, C) were cut from."""
    height, width = geometries[0].size
    picture = np.full((height, width, tiles.shape[3]), PAD_LEVEL, np.uint8)
    for tile, geometry in zip(tiles, geometries, strict=True):
        if len(tiles) > 1 and geometry is geometries[-1]:
            break  # the whole, made smaller
        top, left = (round(-shift) for shift in geometry.shift)
        part = tile[max(-top, 0) :, max(-left, 0) :]
        room = picture[max(top, 0) : top + tile.shape[0], max(left, 0) : left + tile.shape[1]]
        room[:] = part[: room.shape[0], : room.shape[1]]
    return picture
