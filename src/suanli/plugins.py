"""From a name to the file in a room that defines it: the only dynamic import.

A room is a folder of interchangeable things, one a file. The file is the registration: its module
exports one record or class under the room's word, for example `MODEL` in `models/resnet18.py`.
A file whose name starts with an underscore is shared between files of its room and is no thing.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from suanli.errors import unknown

ROOMS = {
    "augments": "AUGMENT",
    "datasets": "DATASET",
    "engines": "ENGINE",
    "models": "MODEL",
    "optimizers": "OPTIMIZER",
    "preprocess": "PREPROCESS",
    "readers": "READER",
    "recipes": "RECIPE",
    "speedups": "SPEEDUP",
    "tasks": "TASK",
    "trackers": "TRACKER",
}


@cache
def names(room: str) -> tuple[str, ...]:
    """Names of the things in a room, without importing any of them."""
    package = importlib.import_module(f"suanli.{room}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def load(room: str, name: str) -> Any:
    """The thing called `name`. Raises UsageError that lists what there is, nearest first."""
    if name not in names(room):
        raise unknown(room.rstrip("s").replace("preproces", "kind of data"), name, names(room))
    return getattr(importlib.import_module(f"suanli.{room}.{name}"), ROOMS[room])


def load_all(room: str) -> dict[str, Any]:
    return {name: load(room, name) for name in names(room)}
