"""Where suanli keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path

from suanli.core.types import AnyPath


def data_dir(given: AnyPath | None = None) -> Path:
    """Where downloaded data sets live: `given`, else $SUANLI_DATA, else below the user's cache."""
    if given is not None:
        return Path(given).expanduser()
    if os.environ.get("SUANLI_DATA"):
        return Path(os.environ["SUANLI_DATA"]).expanduser()
    return cache_dir() / "datasets"


def cache_dir(given: AnyPath | None = None) -> Path:
    """Where prepared data lives: `given`, else $SUANLI_CACHE, else the platform's cache directory."""
    if given is not None:
        return Path(given).expanduser()
    if os.environ.get("SUANLI_CACHE"):
        return Path(os.environ["SUANLI_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "suanli"
