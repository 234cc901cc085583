"""Folders of tiny images, of noise whose brightness tells the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_pictures(root: Path, *, classes: int = 2, each: int = 30, size: tuple[int, int] = (12, 12)) -> Path:
    """A folder of class folders: noise around a brightness that depends on the class."""
    random = np.random.default_rng(len(root.name))
    for c in range(classes):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(each):
            level = 40 + 170 * c / max(classes - 1, 1)
            pixels = np.clip(random.normal(level, 25, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root
