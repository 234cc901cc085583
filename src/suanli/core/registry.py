"""Finds the file that defines a name, such as the model `resnet18`. This is the only dynamic import.

Some folders hold interchangeable things, one per file. The file is the registration: its module exports one record or
class under the folder's constant, for example `MODEL` in `models/networks/resnet18.py`. A file whose name starts with
an underscore is a helper of its folder and registers nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from suanli.core.errors import unknown

FOLDERS = {  # kind -> its package below suanli, and the constant that each file exports
    "answer_formats": ("engines.answer_formats", "ANSWER_FORMAT"),
    "augments": ("training.augments", "AUGMENT"),
    "datasets": ("data.datasets", "DATASET"),
    "engines": ("engines.backends", "ENGINE"),
    "formats": ("data.formats", "FORMAT"),
    "models": ("models.networks", "MODEL"),
    "optimizers": ("training.optimizers", "OPTIMIZER"),
    "pretrained": ("models.pretrained", "SOURCE"),
    "preprocess": ("data.preprocess", "PREPROCESS"),
    "readers": ("data.readers", "READER"),
    "recipes": ("training.recipes", "RECIPE"),
    "speedups": ("compute.speedups", "SPEEDUP"),
    "tasks": ("tasks", "TASK"),
    "trackers": ("training.trackers", "TRACKER"),
}


@cache
def names(kind: str) -> tuple[str, ...]:
    """The registered names of a kind (a key of `FOLDERS`). Imports none of them."""
    package = importlib.import_module(f"suanli.{FOLDERS[kind][0]}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def load(kind: str, name: str) -> Any:
    """The record or class called `name`. Raises UsageError that suggests the nearest name and lists all."""
    if name not in names(kind):
        what = kind.rstrip("s").replace("preproces", "kind of data").replace("_", " ")
        raise unknown(what, name, names(kind))
    package, constant = FOLDERS[kind]
    return getattr(importlib.import_module(f"suanli.{package}.{name}"), constant)


def load_all(kind: str) -> dict[str, Any]:
    return {name: load(kind, name) for name in names(kind)}
