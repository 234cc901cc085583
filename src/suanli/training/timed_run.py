"""A training that advances a few steps at a time and is measured: speed, energy and peak memory.

Several such runs that take turns, one block of steps each in every round, have had the same steps after each round and
the same disturbances during it. A block is timed as a whole, up to the last result of the device; single steps are
timed by marks that the device itself sets between them, because waiting for each would slow down what is measured.

Peak memory is that of the process without what the other runs hold; a training split that lies on the device counts
for every run. Only blocks that aren't timed take it. On a CPU it is the kernel's high-water mark, which only Linux can
set back. What the allocator keeps for later is returned to the system first, and that slows down the next steps.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from suanli.compute.flops import flops
from suanli.compute.infer import infer
from suanli.compute.step_runner import apply_settings
from suanli.core.schema import Arrays
from suanli.core.types import Device
from suanli.machine import energy
from suanli.machine.timing import percentile
from suanli.training import utilization
from suanli.training.loop import Loop
from suanli.training.validation import validation_batch_size


@dataclass(kw_only=True)
class Timings:
    """The measurements of one run's blocks so far."""

    seconds: list[float] = field(default_factory=list)  # of each timed block
    examples: list[int] = field(default_factory=list)  # in each timed block
    step_s: list[float] = field(default_factory=list)  # of each step in them
    pace_s: float = 0.0  # of a step, in the latest block
    joules: float | None = 0.0  # in all of them; None: not readable
    peak_bytes: int | None = None  # in blocks that weren't timed; None: unknown


class TimedRun:
    """A loop and its measurements. An error in a block is raised, and the run can't be used from then on."""

    def __init__(self, loop: Loop, device: Device) -> None:
        self.loop, self.device = loop, device
        self.training, self.evaluation = Timings(), Timings()
        self._steps = loop.run()
        # Of equal size, and the same ones for every run: the last ones of a pass would be smaller.
        self.evaluation_batch = min(validation_batch_size(loop.recipe), len(loop.val_feed))
        positions = _cycle_positions(len(loop.val_feed), self.evaluation_batch)
        self._batches = loop.val_feed.batches(positions, read_ahead=loop.compute.read_ahead)

    def train(self, steps: int, *, timed: bool = True, other_bytes: int = 0) -> None:
        """A block of so many steps; `other_bytes` of the device's memory are held by other runs."""
        examples = steps * self.loop.order.batch_size
        self._measure(self.training, self._train_step, steps, examples, timed, other_bytes)

    def evaluate(self, batches: int, *, timed: bool = True, other_bytes: int = 0) -> None:
        """A block of so many batches of validation examples, without their scores."""
        examples = batches * self.evaluation_batch
        self._measure(self.evaluation, self._evaluate_batch, batches, examples, timed, other_bytes)

    def predictions(self) -> Arrays:
        """(N, …) for the whole validation split, with the weights that a finished training would keep."""
        loop = self.loop
        inputs = (inputs for inputs, _, _ in loop.val_feed.in_order(self.evaluation_batch))
        with apply_settings(loop.compute), loop.use_averaged_weights():
            return infer(loop.compute, loop.preprocess, loop.task, inputs)

    def count_flops(self) -> tuple[int, int]:
        """Of one training step, which is done, and of one validation batch."""
        with apply_settings(self.loop.compute):
            return flops(self._train_step), flops(self._evaluate_batch)

    def precision(self) -> str:
        """The name of the dtype that products and convolutions are computed in."""
        return utilization.step_precision(self.loop.compute, self.device)

    def state_bytes(self) -> int:
        """Of the device's memory, by weights, gradients, averages and the optimizer's state."""
        loop = self.loop
        tensors = [*loop.model.parameters(), *loop.model.buffers(), *(loop.ema.tensors.values() if loop.ema else ())]
        tensors += [p.grad for p in loop.model.parameters() if p.grad is not None]
        for state in loop.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors if t.device.type == loop.device.type]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    # --- one block ---

    def _train_step(self) -> None:
        next(self._steps)

    def _evaluate_batch(self) -> None:
        loop = self.loop
        inputs, _, _ = next(self._batches)
        infer(loop.compute, loop.preprocess, loop.task, [inputs])

    def _measure(
        self, timings: Timings, work: Callable[[], None], times: int, examples: int, timed: bool, other_bytes: int
    ) -> None:
        with apply_settings(self.loop.compute):
            self._synchronize()
            watched = not timed and _reset_peak(self.device)
            with energy.measure_energy(self.device) if timed else nullcontext() as meter:
                started = time.perf_counter()
                marks = _Marks(self.loop.device)
                for _ in range(times):
                    work()
                    marks.set()
                self._synchronize()
                took_s = time.perf_counter() - started
            if watched and (peak := _read_peak(self.device)) is not None:
                timings.peak_bytes = max(timings.peak_bytes or 0, peak - other_bytes)
        intervals = marks.intervals_s()
        timings.pace_s = percentile(intervals, 0.5)
        if not timed:
            return
        timings.seconds.append(took_s)
        timings.examples.append(examples)
        timings.step_s += intervals
        joules = None if meter is None else meter.joules
        timings.joules = None if joules is None or timings.joules is None else timings.joules + joules

    def _synchronize(self) -> None:
        """Waits for the device; raises Diverged for a loss that isn't finite."""
        self.loop.read_losses()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.loop.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _cycle_positions(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Positions of batches of equal size, from the first again after the last; without end."""
    for start in itertools.count(0, batch):
        yield torch.arange(start, start + batch) % count


class _Marks:
    """Moments in the device's own sequence of work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Any] = []
        self.set()

    def set(self) -> None:
        if self._device.type == "cpu":
            self._moments.append(time.perf_counter())
        elif self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._moments.append(event)
        else:
            self._moments.append(torch.mps.Event(enable_timing=True))
            self._moments[-1].record()

    def intervals_s(self) -> list[float]:
        """Between neighbours; the device must have passed the last."""
        pairs = itertools.pairwise(self._moments)
        if self._device.type == "cpu":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


# --- peak memory ----------------------------------------------------------------------------


def _reset_peak(device: Device) -> bool:
    """Starts a new search for the most memory in use. False: that can't be done here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device.torch_name)
        return True
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    gc.collect()
    with suppress(OSError, AttributeError):  # only the GNU library has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_peak(device: Device) -> int | None:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch_name)
    line = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line[1]) * 1024 if line else None
