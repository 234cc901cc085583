"""Names of files that several packages must know alike: the suffixes of images, and what isn't data."""

from __future__ import annotations

import re

IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "dib", "tif", "tiff", "webp"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "ico", "jp2"),
        *("heic", "heif", "hif"),  # read with the extra `heic`
    }
)
# Of labels and notes that lie beside images.
TEXT_SUFFIXES = frozenset({"txt", "csv", "tsv", "json", "jsonl", "ndjson", "xml", "yaml", "yml", "md", "log"})
# What systems, file managers and network drives leave in folders of people.
_LITTER = re.compile(
    r"__macosx|thumbs\.db|ehthumbs.*\.db|desktop\.ini|icon\r|\$recycle\.bin|recycler|recycled|"
    r"system volume information|found\.\d{3}|lost\+found|[@#]eadir|[@#]recycle|[@#]recently-snapshot|[@#]snapshot|"
    r"network trash folder|temporary items|thevolumesettingsfolder|__pycache__",
    re.IGNORECASE,
)


def is_ignored(part: str) -> bool:
    """Whether this part of a path is a hidden file or folder, or one that a system or file manager left behind."""
    return part.startswith(".") or _LITTER.fullmatch(part) is not None
