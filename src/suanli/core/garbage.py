"""Python's search for objects that only refer to each other."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_collector() -> Iterator[None]:
    """Collects no garbage while the block runs. For work that makes many objects and no garbage, such as importing
    torch or listing an archive: each collection would look through all of them, and a third of the time went there."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
