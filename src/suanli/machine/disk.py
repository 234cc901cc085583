"""How fast a disk is read, without the page cache.

The kernel keeps files in memory, so a second read doesn't touch the disk. It is asked to drop the file from memory, and
then whether it did; where it doesn't tell, there is no figure.
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
    """Bytes per second of reading a file in `folder` from its disk, for each of a few rounds. Raises Absent where the
    read may have come from memory, or the file can't be written.

    The file has no name, so nothing is left behind, whatever ends this process. A remote or virtual disk may have
    caches of its own, which this doesn't see.
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
    """Bytes per second of one pass over the file, which is cut short at `end`."""
    started, done = time.perf_counter(), 0
    while count := os.preadv(file, [block], done):
        done += count
        if time.perf_counter() > end:
            break
    return done / (time.perf_counter() - started)


def _in_memory(file: int) -> bool:
    """Whether the kernel answers a read without waiting for the disk, or doesn't tell."""
    try:
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
