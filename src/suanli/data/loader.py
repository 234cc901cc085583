"""Batches on the device.

`Feed` takes them from one tensor on the device where the split fits, or else from the memory map, read ahead by a
thread. Both give the same batches, and neither needs a loader process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch

from suanli.core.schema import Ragged, Tensors, example_bytes, take
from suanli.core.types import Device, Split
from suanli.machine.device import available_memory_bytes
from suanli.machine.threads import start_thread

RESIDENT_SHARE = 0.4  # of the available memory that a resident split may take
READ_AHEAD = 3  # batches
MOVED_BYTES = 256 << 20  # copied to the device at a time

FetchedBatch = tuple[Tensors, Tensors, torch.Tensor]  # inputs, targets, positions
Read = TypeVar("Read")


def mix(*numbers: int) -> int:
    """One seed from several numbers; similar numbers give unrelated seeds. Source: SplitMix64, Steele et al. 2014."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1  # torch wants a signed 64-bit seed


class Order:
    """Which examples make up each batch: a function of seed and step alone, so a training can resume at any step
    without stored state.

    Every batch has the same size, at most `batch_size`. The remainder, less than one example a step, is left out of an
    epoch; in the next one it is another.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples = examples
        self.steps_per_epoch = -(-examples // batch_size)
        self.batch_size = examples // self.steps_per_epoch
        self._seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def positions(self, step: int) -> torch.Tensor:
        """The positions of a batch in the split, (B,) int64, on the CPU."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix(self._seed, 1, epoch))
            self._permutation = torch.randperm(self.examples, generator=generator)
            self._epoch = epoch
        return self._permutation[number * self.batch_size : (number + 1) * self.batch_size]


class Feed:
    """Batches of one split on the device: cached inputs (B, …), targets (B, …), positions (B,). Ragged columns are
    padded, with their lengths. Inputs of a split with windows are its windows, without targets."""

    def __init__(self, split: Split, device: Device, *, resident: bool = False) -> None:
        """`resident` copies all inputs to the device first. On a CPU the memory map is as fast, since its pages stay in
        memory."""
        self.split = split
        self.device = torch.device(device.torch_name)
        targets = split.targets if split.windows is None else {}
        ragged = {name: column for name, column in targets.items() if isinstance(column, Ragged)}
        self._targets = {
            name: torch.from_numpy(column).to(self.device) for name, column in targets.items() if name not in ragged
        }
        self._ragged_targets = ragged
        self._inputs = self._load_to_device() if resident and self.device.type != "cpu" else None

    def _load_to_device(self) -> dict[str, torch.Tensor] | None:
        """All inputs; None: some are ragged."""
        loaded = {}
        for name, column in self.split.inputs.items():
            if isinstance(column, Ragged):
                return None
            loaded[name] = self._load_column(column)
        return loaded

    def _load_column(self, column: np.ndarray) -> torch.Tensor:
        """Copied part by part, since a second copy in main memory might not fit."""
        index = self.split.index
        part = max(1, MOVED_BYTES // max(1, column[:1].nbytes))
        first = torch.from_numpy(column[index[:1]])
        rows = torch.empty((len(index), *first.shape[1:]), dtype=first.dtype, device=self.device)
        for start in range(0, len(index), part):
            rows[start : start + part] = torch.from_numpy(column[index[start : start + part]])
        return rows

    def __len__(self) -> int:
        return len(self.split.index)

    def inputs(self, positions: torch.Tensor) -> Tensors:
        """The inputs at these positions, on the device; `positions` is on the CPU."""
        return self._pick_inputs(positions, self._move(positions))

    def _pick_inputs(self, positions: torch.Tensor, on_device: torch.Tensor) -> Tensors:
        """The inputs at these positions, which are passed twice: on the CPU and on the device."""
        if self._inputs is not None:
            return {name: column.index_select(0, on_device) for name, column in self._inputs.items()}
        return {name: tensor.to(self.device) for name, tensor in self._read_inputs(positions).items()}

    def _read_inputs(self, positions: torch.Tensor) -> Tensors:
        """From the memory map."""
        rows = self.split.index[positions.numpy()]
        arrays: dict[str, np.ndarray] = {}
        for name, column in self.split.inputs.items():
            arrays |= take(column, rows, name)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _pick_targets(self, positions: torch.Tensor, on_device: torch.Tensor) -> Tensors:
        targets = {name: column.index_select(0, on_device) for name, column in self._targets.items()}
        for name, column in self._ragged_targets.items():
            for key, array in take(column, positions.numpy(), name).items():
                targets[key] = torch.from_numpy(array).to(self.device)
        return targets

    def batches(self, steps: Iterator[torch.Tensor], *, read_ahead: bool = False) -> Iterator[FetchedBatch]:
        """A batch for each tensor of positions in `steps`. With `read_ahead`, a thread reads a few batches ahead."""
        if not read_ahead or self._inputs is not None:
            yield from map(self._batch, steps)
        elif self.device.type == "cuda":
            yield from self._copy_on_stream(steps)
        else:
            yield from _read_ahead(self._batch, steps)

    def _batch(self, positions: torch.Tensor) -> FetchedBatch:
        on_device = self._move(positions)
        return self._pick_inputs(positions, on_device), self._pick_targets(positions, on_device), on_device

    def _move(self, positions: torch.Tensor) -> torch.Tensor:
        """A copy on the device, from pinned memory: any other copy waits until the device has finished its work."""
        if self.device.type != "cuda":
            return positions.to(self.device)
        return positions.pin_memory().to(self.device, non_blocking=True)

    def _copy_on_stream(self, steps: Iterator[torch.Tensor]) -> Iterator[FetchedBatch]:
        """Batches that are copied from pinned memory on a separate stream while earlier ones are computed."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

        def read(positions: torch.Tensor) -> tuple[FetchedBatch, torch.cuda.Event]:
            pinned = {name: tensor.pin_memory() for name, tensor in self._read_inputs(positions).items()}
            with torch.cuda.stream(stream):
                on_device = positions.pin_memory().to(self.device, non_blocking=True)
                inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in pinned.items()}
                batch = inputs, self._pick_targets(positions, on_device), on_device
                return batch, stream.record_event()

        for batch, copied in _read_ahead(read, steps):
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            inputs, targets, on_device = batch
            for tensor in (*inputs.values(), *targets.values(), on_device):
                tensor.record_stream(computing)  # else its memory could be reused for the next copy too soon
            yield batch

    def in_order(self, batch_size: int, of: range | None = None) -> Iterator[FetchedBatch]:
        """Every input once, or those at the positions `of`, in the order of the split. The last batch may be
        smaller."""
        positions = range(len(self)) if of is None else of
        return self.batches(iter(torch.arange(positions.start, positions.stop).split(batch_size)))  # type: ignore[no-untyped-call]


def fits(split: Split, device: Device) -> bool:
    """Whether the device's memory has room for the split during training."""
    room = available_memory_bytes(device)
    return room is None or len(split.index) * example_bytes(split.inputs) <= RESIDENT_SHARE * room


def _read_ahead(read: Callable[[torch.Tensor], Read], steps: Iterator[torch.Tensor]) -> Iterator[Read]:
    """The results of `read` for each entry, from a thread that works a few entries ahead."""
    ready: queue.Queue[Read | BaseException | None] = queue.Queue(READ_AHEAD)
    stop = threading.Event()

    def put(item: Read | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for positions in steps:
                if stop.is_set():
                    return
                put(read(positions))
            put(None)
        except BaseException as error:  # noqa: BLE001  # raised again where the batch is awaited
            put(error)

    # Shuffling an epoch would start a second pool. Waiting threads then hardly spin, as `short_spin` has it.
    thread = start_thread(work, name="suanli-read-ahead", pool=1)
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
