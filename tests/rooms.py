"""What fixtures share that put things into a room."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

from suanli import plugins


def forget(room: str, names: Iterable[str]) -> None:
    """Things that were planted are gone for whoever looks next."""
    package = importlib.import_module(f"suanli.{room}")
    for name in names:
        sys.modules.pop(f"suanli.{room}.{name}", None)
        vars(package).pop(name, None)
    plugins.names.cache_clear()
