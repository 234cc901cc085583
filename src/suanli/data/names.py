"""Many names as two arrays, so that millions need little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from suanli.data.lazy_sequence import LazySequence

_CHUNK = 1 << 16


class Names(LazySequence[str]):
    """N names: name i is `text[ends[i - 1] : ends[i]]` as UTF-8; with `index`, those at these positions."""

    def __init__(self, text: np.ndarray, ends: np.ndarray, index: np.ndarray | None = None) -> None:
        if index is None and int(ends[-1] if len(ends) else 0) != len(text):
            raise ValueError("names are cut short")
        self.text, self.ends, self._index = text, ends, index

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        if isinstance(names, Names) and names._index is None:
            return names
        texts, lengths, rest = [], [], iter(names)
        while chunk := [name.encode(errors="surrogatepass") for name in islice(rest, _CHUNK)]:
            texts.append(np.frombuffer(b"".join(chunk), np.uint8))
            lengths.append(np.fromiter(map(len, chunk), np.int64, len(chunk)))
        ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]), dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.uint8), *texts]), ends)

    def __len__(self) -> int:
        return len(self.ends if self._index is None else self._index)

    def _item(self, position: int) -> str:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        i = position % len(self) if self._index is None else int(self._index[position])
        start = 0 if i == 0 else int(self.ends[i - 1])
        return self.text[start : int(self.ends[i])].tobytes().decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def take(self, positions: np.ndarray) -> Names:
        return Names(self.text, self.ends, positions if self._index is None else self._index[positions])
