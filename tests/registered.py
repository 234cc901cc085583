"""What fixtures share that register something for a test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

from suanli.core import registry


def forget(kind: str, names: Iterable[str]) -> None:
    """Later tests don't find what one registered."""
    path = f"suanli.{registry.FOLDERS[kind][0]}"
    package = importlib.import_module(path)
    for name in names:
        sys.modules.pop(f"{path}.{name}", None)
        vars(package).pop(name, None)
    registry.names.cache_clear()
