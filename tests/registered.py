"""What tests of registered files share."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from suanli.core import registry


def forget(kind: str, names: Iterable[str]) -> None:
    """Later tests don't find what one registered."""
    path = f"suanli.{registry.FOLDERS[kind][0]}"
    package = importlib.import_module(path)
    for name in names:
        sys.modules.pop(f"{path}.{name}", None)
        vars(package).pop(name, None)
    registry.names.cache_clear()


def find_table_rows(document: str) -> set[str]:
    """The names in backticks that begin a row of a table in this file of `docs/`."""
    text = (Path(__file__).parents[1] / "docs" / document).read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
