"""How many threads compute a step on a CPU: measured, because guessing is expensive both ways.

A small network gains little from a second thread; and where another program uses the machine, the
threads of one operation wait for each other at every turn, so that two can be many times slower
than one. The choice is cached: rounding depends on the number of threads, and the same recipe on
the same machine must give the same result tomorrow.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from suanli import hardware
from suanli.errors import DamagedFile, StorageError, UsageError
from suanli.loop import Loop
from suanli.storage import read_json, write_json
from suanli.types import Device

ROUNDS = 3
BUDGET_S = 4.0  # no further round after this
WORTH = 0.9  # more threads must bring a step below this share of the time with fewer


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for operations on the CPU while the block runs; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def choose(loop: Loop, device: Device, requested: int | None, cache: Path) -> int | None:
    """The number of threads for this loop: `requested`, the cached choice, or the measured one.
    None on a device that is not a CPU. Raises UsageError for an impossible number."""
    if requested is not None:
        if not 1 <= requested <= 4 * hardware.cores():
            raise UsageError(f"--threads can't be {requested}.", fix=f"This machine has {hardware.cores()} cores.")
        return requested
    if device.type != "cpu":
        return None
    most = torch.get_num_threads()  # all cores, or what OMP_NUM_THREADS says
    if most == 1:
        return 1
    candidates = sorted({most >> shift for shift in range(most.bit_length())})
    path = cache / "plans" / f"{_key(loop, device, most)}.json"
    with suppress(FileNotFoundError, DamagedFile, KeyError, TypeError):
        known = read_json(path)["threads"]
        if known in candidates:
            return int(known)
    times = _measure(loop, candidates)
    chosen = candidates[0]
    for count in candidates[1:]:
        if times[count] < WORTH * times[chosen]:
            chosen = count
    with suppress(StorageError):  # a cache that can't be written costs a measurement, not the training
        write_json(path, {"threads": chosen, "step_s": times})
    return chosen


def _measure(loop: Loop, candidates: list[int]) -> dict[int, float]:
    """Median seconds of a step with each number of threads, in interleaved rounds."""
    found: dict[int, list[float]] = {c: [] for c in candidates}
    started = time.perf_counter()
    with loop.untouched():
        for number in range(ROUNDS + 1):
            for count in candidates:
                with threads(count):
                    took = step_seconds(loop)
                if number:  # the first round warms up
                    found[count].append(took)
            if found[candidates[0]] and time.perf_counter() - started > BUDGET_S:
                break
    return {c: statistics.median(t) for c, t in found.items()}


def step_seconds(loop: Loop) -> float:
    """Of one forward and backward pass at the real batch size."""
    started = time.perf_counter()
    loop.try_step(loop.order.batch_size)
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)
    return time.perf_counter() - started


def _key(loop: Loop, device: Device, most: int) -> str:
    facts = [loop.recipe.digest, list(loop.preprocess.input_shape), device.name, torch.__version__, most]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()
