"""Boxes of COCO's run-length masks: lengths of runs, of 0 first, down the columns of an image, also as a packed text.

Source: T.-Y. Lin et al., "Microsoft COCO", ECCV 2014, and its published format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from suanli.core.types import Json
from suanli.data.formats._boxes import Corners, parse_numbers

MAX_RUNS = 10_000_000


def enclose_mask(mask: Mapping[str, Json]) -> Corners:
    """Left, top, right, bottom of the pixels of a mask {"size": [height, width], "counts": …}; all 0 for a mask without
    pixels. Raises ValueError."""
    height, width = (int(side) for side in parse_numbers(mask.get("size"), 2))
    counts = mask.get("counts")
    runs = _unpack(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, Sequence) or len(runs) > MAX_RUNS:
        raise ValueError("has a mask without counts")
    lengths = np.array(parse_numbers(runs, len(runs)))
    if height < 1 or width < 1 or (lengths < 0).any() or lengths.sum() > height * width:
        raise ValueError(f"has a mask whose counts don't fit its size {height} x {width}")
    ends = lengths.cumsum()
    spans = [(int(start), int(end)) for start, end in list(pairwise([0, *ends.tolist()]))[1::2] if end > start]
    if not spans:
        return 0.0, 0.0, 0.0, 0.0
    tops, bottoms = [], []
    for start, end in spans:
        whole = start // height != (end - 1) // height  # it goes on in another column
        tops.append(0 if whole else start % height)
        bottoms.append(height if whole else (end - 1) % height + 1)
    return float(spans[0][0] // height), float(min(tops)), float((spans[-1][1] - 1) // height + 1), float(max(bottoms))


def _unpack(text: str) -> list[int]:
    """The runs in a packed text: numbers of 5 bits a character from "0" on, the lowest first, of which a sixth says
    that more follow; from the third on, differences from the number two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            raise ValueError("has a mask whose packed counts are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("has a mask whose packed counts are cut short")
    return runs
