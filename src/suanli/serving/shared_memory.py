"""What the server and an engine's process exchange: messages at the start, then shared memory.

At the start each side sends JSON lines: `EngineOptions`, `EngineInfo`, `Layout` and `Warmup`, in this order. After that
the server writes inputs into a slot and sends `REQUEST`; when `REPLY` comes back, the outputs are in the same slot.
Nothing else is copied. Not supported: Windows, which can't pass file descriptors over a socket.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from pydantic import TypeAdapter

from suanli.core.schema import Schema

REQUEST = struct.Struct("<II")  # slot, number of examples
# Slot, length of the error text that follows (0: no error), seconds of computing, resident bytes of the process.
REPLY = struct.Struct("<IIdQ")


Message = TypeVar("Message")
Slot: TypeAlias = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # inputs and outputs (batch, …), by name


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
    task: str
    classes: tuple[str, ...]
    task_settings: Mapping[str, object]
    batches: bool  # it answers any number of examples at once; else one
    torch: bool  # it computes with torch, so that it resizes pictures by torch too
    measured: tuple[tuple[int, float], ...]  # batch sizes and seconds that `suanli optimize` measured; may be empty


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """A warm engine: seconds of a batch by its size (from `suanli optimize` where it measured), and its memory."""

    seconds: Mapping[int, float]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things are in the shared memory: for each slot its inputs, then its outputs, each from a new cache line."""

    slots: int
    batch: int  # examples of a slot
    inputs: Schema  # of fixed shapes, as the outputs
    outputs: Schema

    def arrays(self, memory: mmap.mmap) -> list[Slot]:
        """The slots, as views of the memory."""
        slots, offset = [], 0
        for _ in range(self.slots):
            sides: list[dict[str, np.ndarray]] = []
            for schema in (self.inputs, self.outputs):
                views: dict[str, np.ndarray] = {}
                for name, column in schema.items():
                    shape = (self.batch, *column.fixed_shape)
                    views[name] = np.ndarray(shape, column.dtype, memory, offset)
                    offset += _round_up(self.batch * column.size_bytes)
                sides.append(views)
            slots.append((sides[0], sides[1]))
        return slots

    @property
    def size_bytes(self) -> int:
        columns = (*self.inputs.values(), *self.outputs.values())
        return self.slots * sum(_round_up(self.batch * column.size_bytes) for column in columns)


def to_line(message: EngineOptions | EngineInfo | Layout | Warmup) -> bytes:
    return json.dumps(asdict(message)).encode() + b"\n"


def from_line(line: bytes, kind: type[Message]) -> Message:
    """Raises ValueError for a line that is something else."""
    return TypeAdapter(kind).validate_python(json.loads(line))


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
