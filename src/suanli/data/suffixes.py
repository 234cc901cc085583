"""How the names of images end: what a reader lists as one and what `predict` looks for are the same."""

from __future__ import annotations

IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "dib", "tif", "tiff", "webp"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "ico", "jp2"),
    }
)
