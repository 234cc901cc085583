"""Estimates the memory and time of a training on this machine, before its first step.

Memory: the bytes that autograd keeps for one example (counted with saved-tensor hooks on small batches) times the
batch size, plus gradients and optimizer state, plus what the process uses already. Time: one forward and backward pass
on a part of a batch. The weights are restored afterwards.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from suanli.compute.step_runner import apply_settings
from suanli.core.console import duration, size
from suanli.core.errors import OutOfMemory, UsageError
from suanli.core.types import Device
from suanli.machine import timing
from suanli.machine.device import available_memory_bytes, is_out_of_memory, peak_memory_bytes
from suanli.parallel import dtensor, fsdp
from suanli.training import checkpoint
from suanli.training.image_sizes import smallest_scale
from suanli.training.loop import Loop

PROBE_BATCHES = (2, 6)
STATE_COPIES = 4  # weights, gradients and two moments
BACKWARD = 1.5  # times what the forward pass keeps, at most: gradients between two layers come on top
TIMED_PART = 4  # of a batch, on a CPU, where time is proportional to examples; a GPU may not notice fewer
TIMED_EXAMPLES = 16  # at least: too few take no longer than the launch of the kernels
WORKSPACE_BYTES = 64 << 20  # scratch memory of kernels, and rounding of allocations


@dataclass(frozen=True, kw_only=True)
class Forecast:
    train_seconds: float
    memory_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"about {duration(self.train_seconds)} of training, {size(self.memory_bytes)} of memory, "
            f"{size(self.disk_bytes)} on disk"
        )


def check_memory(loop: Loop, device: Device) -> int:
    """The memory that the process will use, in bytes. Raises OutOfMemory, with the batch size that would fit, before
    memory runs out: on most systems the process would end without a message. Raises UsageError for a network that
    can't learn from such batches."""
    needed, error = estimate_memory(loop, device)
    if error is not None:
        raise error
    return needed


def estimate_memory(loop: Loop, device: Device) -> tuple[int, OutOfMemory | None]:
    """As `check_memory`, but returns the error. A collective for a sharded network."""
    used = peak_memory_bytes(device) or 0
    batch = -(-loop.batch_size // loop.recipe.accumulate)
    # Sharded weights and their averages exist already; for a whole network, this measures a copy.
    copies = STATE_COPIES - 1 if loop.compute.sharded else STATE_COPIES + (loop.ema is not None)
    states = fsdp.local_bytes(loop.model) * copies + fsdp.gathered_bytes(loop.model)
    available = available_memory_bytes(device, loop.group.local_size)
    if loop.compute.sharded:  # measuring is a collective, so no process may fail in it
        short = available is not None and states > available
        if any(loop.group.gather(short)):
            return used + states, out_of_memory_error(loop, states, available if short else None, 0)
    with (
        explain_out_of_memory(device),
        _explain_failure(loop, batch),
        apply_settings(loop.compute),
        loop.preserve_weights(),
    ):
        per_example, once = _activation_bytes(loop, batch)
        if (scale := smallest_scale(loop.recipe)) != 1:
            loop.try_step(min(PROBE_BATCHES[0], batch), scale=scale)  # some networks take one size only
    fixed = once + states
    needed = fixed + int(BACKWARD * per_example * batch) + WORKSPACE_BYTES
    available = available_memory_bytes(device, loop.group.local_size)
    if available is None or needed <= available:
        return used + needed, None
    # The advice must really fit, so all that is needed beside the examples is subtracted first.
    room = available - fixed - WORKSPACE_BYTES
    fits = max(0, int(room / (BACKWARD * max(per_example, 1))))
    return used + needed, out_of_memory_error(loop, needed, available, fits)


@contextmanager
def _explain_failure(loop: Loop, batch: int) -> Iterator[None]:
    """Turns an error inside the network into a UsageError."""
    try:
        yield
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        field = next((name for name in ("progressive_resizing", "mixed_sizes") if getattr(loop.recipe, name)), None)
        sizes = "images of several sizes, " if field else ""
        raise UsageError(
            f"The network {loop.recipe.model!r} can't learn from {sizes}batches of {batch}: {error}",
            fix=f"Choose {f'{field}=[], ' if field else ''}a larger --batch-size, or another model.",
        ) from error


@contextmanager
def explain_out_of_memory(device: Device) -> Iterator[None]:
    """Turns an allocation that fails before the first batch into OutOfMemory, with advice."""
    try:
        yield
    except (RuntimeError, MemoryError, SystemError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(
            error.__traceback__
        )  # they keep alive what was built so far, and the message takes memory
        available = available_memory_bytes(device)
        have = "" if available is None else f", {size(available)} are free"
        raise OutOfMemory(
            f"The network doesn't fit into the memory of {device.name}{have}.",
            fix="Choose a smaller model or smaller inputs, or end other programs.",
        ) from error


def forecast(loop: Loop, memory_bytes: int, step_s: float | None) -> Forecast:
    """`memory_bytes` is the result of `check_memory`, `step_s` the seconds of a step when the plan was made; None: a
    step is timed now."""
    if step_s is None:
        part = TIMED_PART if loop.device.type == "cpu" and loop.compute.micro_batches == 1 else 1
        step_s = measure_step_s(loop, memory_bytes, max(TIMED_EXAMPLES, loop.batch_size // part))
    return Forecast(
        train_seconds=(loop.full_size_steps_left + validation_steps(loop)) * step_s,
        memory_bytes=memory_bytes,
        disk_bytes=sum(t.numel() * t.element_size() for t in loop.model.state_dict().values())
        * (1 + checkpoint.KEPT * (STATE_COPIES - 1)),
    )


def validation_steps(loop: Loop, validations: float | None = None) -> float:
    """The time of so many validations (None: of all in a run), in training steps: a forward pass takes about a third of
    a step."""
    if validations is None:
        validations = max(1.0, loop.steps / loop.order.steps_per_epoch / loop.recipe.validate_every)
    return validations * len(loop.val_feed) / loop.order.batch_size / 3


def measure_step_s(loop: Loop, memory_bytes: int, examples: int | None = None) -> float:
    """Seconds of a forward and backward pass on this process's share of a batch, from those of its first `examples`
    (None: of all). Raises OutOfMemory."""
    examples = min(examples or loop.batch_size, loop.batch_size)

    def settle() -> None:
        if loop.device.type == "cuda":
            torch.cuda.synchronize(loop.device)

    try:
        with apply_settings(loop.compute), loop.preserve_weights():
            loop.try_step(examples)
            return timing.seconds(lambda: loop.try_step(examples), settle) * loop.batch_size / examples
    except (RuntimeError, MemoryError, SystemError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory_error(loop, memory_bytes, None, loop.order.batch_size // 2) from error


def out_of_memory_error(loop: Loop, needed: int, available: int | None, fits: int) -> OutOfMemory:
    """`fits`: the number of examples that fit at once."""
    batch = loop.order.batch_size
    have = f", {size(available)} are free" if available is not None else ""
    message = f"A batch of {batch} needs about {size(needed)}{have}."
    if fits < 1:
        more = "more processes" if loop.compute.sharded else "shard the network over several processes (--shard)"
        fix = f"Not even one example fits: choose a smaller model or smaller inputs, or {more}."
        return OutOfMemory(message, fix=fix)
    fits = 1 << (min(fits, batch - 1).bit_length() - 1) if fits > 1 and batch > 1 else 1
    parts = -(-batch // fits)
    return OutOfMemory(
        message,
        fix=f"--batch-size {fits} would fit; --set accumulate={parts} computes the same batch in {parts} parts.",
    )


def _activation_bytes(loop: Loop, batch: int) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass: for each example, and once (such as the weights in
    another precision). Two small batches tell the two apart."""
    small, large = min(PROBE_BATCHES[0], batch), min(PROBE_BATCHES[1], batch)
    few, many = _kept_bytes(loop, small), _kept_bytes(loop, large)
    if small == large:
        return many // large, 0
    per_example = max(0, many - few) // (large - small)
    return per_example, max(0, few - per_example * small)


def _kept_bytes(loop: Loop, batch: int) -> int:
    weights = {dtensor.local_part(p).untyped_storage().data_ptr() for p in loop.model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loop.try_step(batch, whole=True)
    return sum(storage.nbytes() for storage in kept.values())  # gathered weights are freed by now: 0 bytes
