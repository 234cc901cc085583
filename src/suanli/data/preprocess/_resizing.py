"""Pictures of another size, and how a place in them is found again."""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np
from PIL import Image

from suanli.core.schema import Geometry

Resize = Literal["crop", "squash", "pad"]
PAD_LEVEL = 128


def resize(pixels: np.ndarray, height: int, width: int, how: Resize) -> tuple[np.ndarray, Geometry]:
    """(height, width, C) from (H, W, C), and how. Crops before scaling, so a strip of 1 by 100,000 px costs no more
    than a square."""
    h, w, channels = pixels.shape
    if (h, w) == (height, width):
        return pixels, Geometry.unchanged((h, w))
    top = left = 0
    ch, cw = h, w
    if how == "crop":
        scale = min(h / height, w / width)
        ch, cw = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (h - ch) // 2, (w - cw) // 2
        pixels = pixels[top : top + ch, left : left + cw]
    elif how == "pad":
        scale = min(height / h, width / w)
        fitted = _scale(pixels, max(1, round(h * scale)), max(1, round(w * scale)))
        top, left = (height - fitted.shape[0]) // 2, (width - fitted.shape[1]) // 2
        canvas = np.full((height, width, channels), PAD_LEVEL, np.uint8)
        canvas[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
        scales = fitted.shape[0] / h, fitted.shape[1] / w
        return canvas, Geometry(size=(h, w), scale=scales, shift=(float(top), float(left)))
    scales = height / ch, width / cw
    geometry = Geometry(size=(h, w), scale=scales, shift=(-top * scales[0], -left * scales[1]))
    return _scale(pixels, height, width), geometry


def _scale(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    if "torch" not in sys.modules:  # an engine may run without torch, and importing it costs seconds and 200 MB
        return _scale_by_pillow(pixels, height, width)
    import torch
    from torch.nn import functional as F

    with torch.inference_mode():
        image = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
        scaled = F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    # Not torch's contiguous(), which starts a pool of threads even for one small picture.
    return np.ascontiguousarray(scaled[0].numpy().transpose(1, 2, 0))


def _scale_by_pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same up to one level, two to ten times as slow."""
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    scaled = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    return scaled.reshape(height, width, pixels.shape[2])
