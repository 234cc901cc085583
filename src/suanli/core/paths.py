"""Where downloads and prepared data are kept. All of it may be deleted: suanli makes it again."""

from __future__ import annotations

import os
import re
from pathlib import Path

from suanli.core.types import AnyPath


def data_dir(path: AnyPath | None = None) -> Path:
    """The directory of downloaded data sets: `path`, else $SUANLI_DATA, else below `cache_dir()`."""
    if path is not None:
        return Path(path).expanduser()
    if os.environ.get("SUANLI_DATA"):
        return Path(os.environ["SUANLI_DATA"]).expanduser()
    return cache_dir() / "datasets"


def cache_dir(path: AnyPath | None = None) -> Path:
    """The directory of prepared data: `path`, else $SUANLI_CACHE, else below the user's cache directory."""
    if path is not None:
        return Path(path).expanduser()
    if os.environ.get("SUANLI_CACHE"):
        return Path(os.environ["SUANLI_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "suanli"


def safe_name(text: str, default: str, longest: int | None = None) -> str:
    """The text as a name of a file or folder that is valid on any system; `default` where nothing of it is left."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:longest] or default
