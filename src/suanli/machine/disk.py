"""How fast a disk reads, and not the memory that remembers what was read.

The kernel keeps files in memory, so that a file read twice comes from there. It is told to forget this one, and
then asked whether it did; where it won't say, there is no figure.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from suanli.machine.microbenchmarks import Absent

FILE_BYTES = 256 << 20
BLOCK_BYTES = 8 << 20
ROUNDS = 7


def measure_read_rates(folder: Path, budget_s: float) -> list[float]:
    """Bytes per second of reading a file of `folder` from its disk, a few times. Raises Absent where it isn't
    known that the disk was read and not memory, or the file can't be written.

    The file has no name, so that nothing is left behind, whatever ends this process. A disk that is itself
    remote or virtual may have caches of its own, which this doesn't see.
    """
    if sys.platform != "linux":
        raise Absent("only Linux tells whether a file is read from the disk or from memory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 4 * FILE_BYTES:
            raise Absent(f"too little room in {folder}")
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            _fill(stream.fileno(), time.perf_counter() + budget_s / (ROUNDS + 1))
            return _read_rounds(stream.fileno(), budget_s)
    except OSError as error:
        raise Absent(f"{folder} can't be written: {error.strerror or error}") from error


def _fill(file: int, end: float) -> None:
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    for _ in range(FILE_BYTES // BLOCK_BYTES):
        os.write(file, block)
        os.fsync(file)  # only what is on the disk can be dropped from memory
        if time.perf_counter() > end:
            break


def _read_rounds(file: int, budget_s: float) -> list[float]:
    rates: list[float] = []
    block = bytearray(BLOCK_BYTES)
    end = time.perf_counter() + budget_s
    while len(rates) < ROUNDS and (not rates or time.perf_counter() < end):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if _in_memory(file):
            raise Absent("this file system keeps files in memory, or doesn't say whether it does")
        rates.append(_rate(file, block, end))
    return rates


def _rate(file: int, block: bytearray, end: float) -> float:
    """Of one pass over the file, or of what of it can be read until `end`."""
    started, done = time.perf_counter(), 0
    while count := os.preadv(file, [block], done):
        done += count
        if time.perf_counter() > end:
            break
    return done / (time.perf_counter() - started)


def _in_memory(file: int) -> bool:
    """Whether the kernel can answer a read without waiting for the disk, or won't tell."""
    try:
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
