"""What tests of registered files share."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from suanli.core import registry


@contextlib.contextmanager
def register_files(files: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Registers files (their texts by kind and name) in this process and in those that it starts. Yields the
    environment variables with which other processes find them, too."""
    with tempfile.TemporaryDirectory(prefix="registered-") as name, contextlib.ExitStack() as stack:
        place, lines = Path(name), []
        for kind, texts in files.items():
            package = importlib.import_module(f"suanli.{registry.FOLDERS[kind][0]}")
            (place / kind).mkdir()
            for plugin, text in texts.items():
                (place / kind / f"{plugin}.py").write_text(text, encoding="utf-8")
            before, path = package.__path__, [*package.__path__, str(place / kind)]
            lines.append(f"import {package.__name__}\n{package.__name__}.__path__ = {path!r}\n")
            stack.callback(forget, kind, texts)
            stack.callback(setattr, package, "__path__", before)
            package.__path__ = path
        # Every Python process that has this folder on its path reads this file when it starts.
        (place / "sitecustomize.py").write_text("".join(lines))
        sys.path.insert(0, name)
        stack.callback(sys.path.remove, name)
        importlib.invalidate_caches()
        registry.names.cache_clear()
        yield {"PYTHONPATH": os.pathsep.join([name, *filter(None, [os.environ.get("PYTHONPATH")])])}


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
