"""The suffixes of image files, for the readers and for `predict`."""

from __future__ import annotations

IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "dib", "tif", "tiff", "webp"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "ico", "jp2"),
    }
)
