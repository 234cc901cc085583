"""The examples of a source as columns, for what looks at all of them: splits, the cache and the data check.

A source of a table has them from the start, with its inputs as a `RawBlock`; no row is an object before somebody looks
at it. Those of other sources are made of their list.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from suanli.core.types import Example, Raw, RawBlock, Target
from suanli.data.lazy_sequence import LazySequence


class ExampleColumns(LazySequence[Example]):
    """N examples. `groups` and `times` are None where no example has one."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        targets: Sequence[Target],
        splits: Sequence[str | None],
        groups: Sequence[str | None] | None = None,
        times: Sequence[float | None] | None = None,
        inputs: RawBlock | Sequence[Example],
    ) -> None:
        self.names, self.targets, self.splits = names, targets, splits
        self.groups, self.times, self._inputs = groups, times, inputs

    @classmethod
    def of(cls, examples: Sequence[Example]) -> ExampleColumns:
        if isinstance(examples, ExampleColumns):
            return examples
        groups, times = [one.group for one in examples], [one.time for one in examples]
        return cls(
            names=[one.name for one in examples],
            targets=[one.target for one in examples],
            splits=[one.split for one in examples],
            groups=groups if any(group is not None for group in groups) else None,
            times=times if any(time is not None for time in times) else None,
            inputs=examples,
        )

    @property
    def block(self) -> RawBlock | None:
        """The raw inputs, where they are stored by column."""
        return self._inputs if isinstance(self._inputs, RawBlock) else None

    def read(self, position: int) -> Raw:
        """Raises OSError or BadInput."""
        one = self._inputs[position]
        return one.read() if isinstance(one, Example) else one

    def take(self, positions: np.ndarray, splits: Sequence[str | None]) -> ExampleColumns:
        """The examples at these positions, with these splits."""
        at: list[int] = positions.tolist()
        block = self.block
        return ExampleColumns(
            names=[self.names[i] for i in at],
            targets=[self.targets[i] for i in at],
            splits=splits,
            groups=None if self.groups is None else [self.groups[i] for i in at],
            times=None if self.times is None else [self.times[i] for i in at],
            inputs=[self[i] for i in at] if block is None else block.take(positions),
        )

    def __len__(self) -> int:
        return len(self._inputs)

    def _item(self, position: int) -> Example:
        return Example(
            name=self.names[position],
            target=self.targets[position],
            split=self.splits[position],
            read=partial(self.read, position),
            group=None if self.groups is None else self.groups[position],
            time=None if self.times is None else self.times[position],
        )


class LineNames(LazySequence[str]):
    """Names of rows by the file and the line that each is in: "train.csv:17"."""

    def __init__(self, parts: Sequence[tuple[str, np.ndarray]]) -> None:
        self._files = [file for file, _ in parts]
        self._starts = np.cumsum([0, *(len(lines) for _, lines in parts)])
        self._lines = np.concatenate([lines for _, lines in parts])

    def __len__(self) -> int:
        return len(self._lines)

    def _item(self, position: int) -> str:
        line = int(self._lines[position])  # raises IndexError at the end
        part = 0 if len(self._files) == 1 else int(np.searchsorted(self._starts, position, side="right")) - 1
        return f"{self._files[part]}:{line}"
