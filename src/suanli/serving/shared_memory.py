"""What the server and an engine's process exchange: messages at the start, then shared memory.

At the start each side sends JSON lines: `EngineOptions`, `EngineInfo`, `Layout` and `Warmup`, in this order. After that
the server writes rows into a slot and sends `REQUEST`; when `REPLY` comes back, the probabilities are in the same slot.
Nothing else is copied. Not supported: Windows, which can't pass file descriptors over a socket.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

if TYPE_CHECKING:
    import numpy as np

REQUEST = struct.Struct("<II")  # slot, number of rows
# Slot, length of the error text that follows (0: no error), seconds of computing, resident bytes of the process.
REPLY = struct.Struct("<IIdQ")


Message = TypeVar("Message")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine of which model to load."""

    subject: str  # path of a run or a model folder
    engine: str
    device: str
    threads: int | None
    trust_code: bool


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine is, once it is loaded."""

    engine: str
    precision: str
    threads: int
    preprocess: Mapping[str, object]  # kind and settings
    classes: tuple[str, ...]
    row_shape: tuple[int, ...]
    row_dtype: str
    torch: bool  # it computes with torch, so that it resizes pictures by torch too
    measured: tuple[tuple[int, float], ...]  # batch sizes and seconds that `suanli optimize` measured; may be empty


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """A warm engine: seconds of a batch by its size (from `suanli optimize` where it measured), and its memory."""

    seconds: Mapping[int, float]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things are in the shared memory: for each slot its rows, then its probabilities."""

    slots: int
    batch: int  # rows of a slot
    row_shape: tuple[int, ...]
    row_dtype: str
    classes: int

    def arrays(self, memory: mmap.mmap) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each slot its rows (batch, *row_shape) and its probabilities (batch, classes), as views of the memory."""
        import numpy as np

        slots, offset = [], 0
        for _ in range(self.slots):
            rows = np.frombuffer(memory, self.row_dtype, self.batch * math.prod(self.row_shape), offset)
            answers = np.frombuffer(memory, np.float32, self.batch * self.classes, offset + self._rows_bytes)
            slots.append((rows.reshape(self.batch, *self.row_shape), answers.reshape(self.batch, self.classes)))
            offset += self._slot_bytes
        return slots

    @property
    def _rows_bytes(self) -> int:
        return _round_up(self.batch * row_bytes(self.row_shape, self.row_dtype))

    @property
    def _slot_bytes(self) -> int:
        return self._rows_bytes + _round_up(self.batch * self.classes * 4)

    @property
    def size_bytes(self) -> int:
        return self.slots * self._slot_bytes


def to_line(message: EngineOptions | EngineInfo | Layout | Warmup) -> bytes:
    return json.dumps(asdict(message)).encode() + b"\n"


def from_line(line: bytes, kind: type[Message]) -> Message:
    """Raises ValueError for a line that is something else."""
    return TypeAdapter(kind).validate_python(json.loads(line))


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    import numpy as np

    return math.prod(shape) * np.dtype(dtype).itemsize


def _round_up(size: int) -> int:
    return -(-size // 64) * 64  # to whole cache lines


def new_memory(size_bytes: int) -> int:
    """A file descriptor of unnamed memory, which is freed when its last user closes it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("suanli")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size_bytes)
    return descriptor
