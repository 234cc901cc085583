"""Settings of torch's libraries that hold for the whole process, on for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def set_attributes(places: Iterable[Any], name: str, value: object) -> Iterator[None]:
    """The attribute `name` of each place has `value` while the block runs."""
    before = [(place, getattr(place, name)) for place in places]
    try:
        for place, _ in before:
            setattr(place, name, value)
        yield
    finally:
        for place, old in before:
            setattr(place, name, old)
