"""Memory that the server and an engine's process both have, and the few bytes that they send beside it.

The serving side writes rows into a slot, sends `ASK`, and finds probabilities in the same slot when `REPLY` comes back;
nothing else is copied. What this doesn't do: Windows, where descriptors can't be passed.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ASK = struct.Struct("<II")  # slot, rows
REPLY = struct.Struct("<IIdQ")  # slot, length of the reason that follows (0: done), seconds, bytes of main memory


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shared memory: for each slot rows, then probabilities."""

    slots: int
    batch: int
    row_shape: tuple[int, ...]
    row_dtype: str
    classes: int

    def arrays(self, memory: mmap.mmap) -> list[tuple[np.ndarray, np.ndarray]]:
        import numpy as np

        found, at = [], 0
        for _ in range(self.slots):
            rows = np.frombuffer(memory, self.row_dtype, self.batch * math.prod(self.row_shape), at)
            answers = np.frombuffer(memory, np.float32, self.batch * self.classes, at + self._rows_bytes)
            found.append((rows.reshape(self.batch, *self.row_shape), answers.reshape(self.batch, self.classes)))
            at += self._slot_bytes
        return found

    @property
    def _rows_bytes(self) -> int:
        import numpy as np

        return _up(self.batch * math.prod(self.row_shape) * np.dtype(self.row_dtype).itemsize)

    @property
    def _slot_bytes(self) -> int:
        return self._rows_bytes + _up(self.batch * self.classes * 4)

    @property
    def size_bytes(self) -> int:
        return self.slots * self._slot_bytes


def _up(size: int) -> int:
    return -(-size // 64) * 64  # whole cache lines


def new_memory(size_bytes: int) -> int:
    """A descriptor of memory without a name, which is gone with its last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("suanli")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size_bytes)
    return descriptor
