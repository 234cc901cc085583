"""Sequences whose items are made when somebody looks at them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A subclass has `__len__` and `_item`; a slice is a list of items."""

    @abstractmethod
    def _item(self, position: int) -> T:
        """The item at this position. Raises IndexError beyond the end, so that iterating ends."""

    @overload
    def __getitem__(self, position: int) -> T: ...
    @overload
    def __getitem__(self, position: slice) -> list[T]: ...
    def __getitem__(self, position: int | slice) -> T | list[T]:
        if isinstance(position, slice):
            return [self._item(i) for i in range(len(self))[position]]
        return self._item(position)
