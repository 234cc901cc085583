"""Images whose class is a small bright shape at a known place, on noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SHAPE = 32, 12


def write_shapes(root: Path, count: int = 40) -> dict[str, tuple[int, int]]:
    """Class folders `cross` and `ring`; gives the top and left of the shape in each file, by its path below `root`."""
    random = np.random.default_rng(0)
    cross = np.zeros((SHAPE, SHAPE), bool)
    cross[5:7] = cross[:, 5:7] = True
    ring = np.ones((SHAPE, SHAPE), bool)
    ring[2:-2, 2:-2] = False
    places = {}
    for name, shape in (("cross", cross), ("ring", ring)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(60, 120, (SIDE, SIDE, 3)).astype(np.uint8)
            top, left = random.integers(0, SIDE - SHAPE, 2).tolist()
            pixels[top : top + SHAPE, left : left + SHAPE][shape] = 250
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
            places[f"{name}/{i:03d}.png"] = (top, left)
    return places
