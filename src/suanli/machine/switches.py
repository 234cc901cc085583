"""Flags of torch's libraries, which hold for the whole process, set for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def set_attributes(objects: Iterable[object], name: str, value: object) -> Iterator[None]:
    """Gives the attribute `name` of all objects this value while the block runs."""
    before = [(each, getattr(each, name)) for each in objects]
    try:
        for each, _ in before:
            setattr(each, name, value)
        yield
    finally:
        for each, old in before:
            setattr(each, name, old)
