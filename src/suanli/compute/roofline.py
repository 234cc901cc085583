"""Where a model's layers lie on the roofline: operations, bytes and seconds of each, in one forward pass.

Operations are counted as in `flops.py`. Bytes are the least that a layer must move: its inputs, weights and outputs,
each once. Counting slows a pass down, so time is measured in separate passes.

A layer here is a module that was called. Its figures exclude those of the modules inside it. Layers inside compiled or
captured code can't be seen: pass the eager model.

The model is S. Williams, A. Waterman and D. Patterson, "Roofline: An Insightful Visual Performance Model
for Multicore Architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from suanli.compute.flops import count_flops, disable_fastpath
from suanli.compute.roofline_records import Layer
from suanli.core.types import Device

PASSES = 5  # that are timed
BUSY_S = 0.2  # how long a GPU is kept busy at most, while the host issues a pass
CLOCK_HZ = 2e9  # about that of a GPU; a slower one is kept busy for longer
ROOT = "(model)"


# --- the layers -----------------------------------------------------------------------------


def measure_layers(
    model: nn.Module, forward: Callable[[], object], *, device: Device, passes: int = PASSES
) -> list[Layer]:
    """The modules of `model` that `forward` calls, in the order in which they end.

    `forward()` makes one forward pass of one batch, in the mode, precision and layout to measure; it is called
    `passes` + 2 times. The caller restores what that changes (batch statistics, random numbers). On a GPU a layer's
    time is from its first to its last kernel.
    """
    modules = {name or ROOT: module for name, module in model.named_modules()}
    traffic: dict[str, list[_Traffic]] = {}

    def record(name: str, inputs: object, outputs: object) -> None:
        traffic.setdefault(name, []).append(_traffic(inputs, outputs))

    with disable_fastpath():
        with count_flops() as counter:
            calls = _trace_calls(modules, forward, lambda: counter.total, record)
        operations = _exclusive(calls, lambda start, end: end - start)
        seconds = _time_passes(modules, forward, device, passes)
    weights = _weights(modules, operations)
    moved = {
        name: sum(one.bytes + _weight_bytes(modules[name], weights[name], one) for one in each)
        for name, each in traffic.items()
    }
    containers = {call.name for call in calls if call.inner}
    return [
        Layer(
            name=name,
            kind=type(modules[name]).__name__.removeprefix("FSDP"),  # torch prefixes the class of a sharded module
            flops=count,
            bytes=None if name in containers and not count and not weights[name] else moved.get(name, 0),
            seconds=statistics.median(one.get(name, 0.0) for one in seconds),
        )
        for name, count in operations.items()
    ]


@dataclass(kw_only=True)
class _Call:
    """One call of a module; `start` and `end` are readings of whatever is measured."""

    name: str
    start: Any
    end: Any = None
    inner: list[_Call] = field(default_factory=list)


def _trace_calls(
    modules: Mapping[str, nn.Module],
    forward: Callable[[], object],
    read: Callable[[], Any],
    record: Callable[[str, object, object], None] | None = None,
) -> list[_Call]:
    """Every call of a module during `forward()`, with the reading before and after it. `record` gets the name, inputs
    and outputs of each."""
    done: list[_Call] = []
    under_way: list[_Call] = []

    def watch(name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(*_: object) -> None:
            under_way.append(_Call(name=name, start=read()))

        def leave(_: nn.Module, args: object, kwargs: object, outputs: object) -> None:
            call = under_way.pop()
            call.end = read()
            if under_way:
                under_way[-1].inner.append(call)
            done.append(call)
            if record is not None:
                record(name, (args, kwargs), outputs)

        return [
            module.register_forward_pre_hook(enter),
            # Called even where the module raises and its parent catches that: else `under_way` would keep the call.
            module.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name, module in modules.items():
            handles += watch(name, module)
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return done


def _exclusive(calls: list[_Call], difference: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """Of each module, the difference between start and end of its calls, without that of the calls inside them."""
    totals: dict[str, Any] = {}
    for call in calls:
        inside = sum(difference(one.start, one.end) for one in call.inner)
        totals[call.name] = totals.get(call.name, 0) + difference(call.start, call.end) - inside
    return totals


# --- bytes ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Traffic:
    bytes: int  # of inputs and outputs
    element_size: int | None  # of the narrowest floating-point output; None: there is none
    indices: int  # number of integers in the inputs


def _traffic(inputs: object, outputs: object) -> _Traffic:
    read = list({id(one): one for one in _tensors(inputs)}.values())  # query, key and value may be the same tensor
    written = list(_tensors(outputs))
    size = min((one.element_size() for one in written if one.is_floating_point()), default=None)
    return _Traffic(
        bytes=sum(_bytes(one, size) for one in [*read, *written]),
        element_size=size,
        indices=sum(one.numel() for one in read if not one.is_floating_point()),
    )


def _bytes(tensor: torch.Tensor, element_size: int | None) -> int:
    """Autocast computes with narrower copies: an operand counts as no wider than the result."""
    size = tensor.element_size()
    if element_size is not None and tensor.is_floating_point():
        size = min(size, element_size)
    return tensor.numel() * size


def _weight_bytes(module: nn.Module, weights: list[nn.Parameter], traffic: _Traffic) -> int:
    needed = sum(_bytes(weight, traffic.element_size) for weight in weights)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):  # only the rows that are looked up
        rows = min(traffic.indices, module.num_embeddings)
        needed = min(needed, rows * module.embedding_dim * (traffic.element_size or 4))
    return needed


def _weights(modules: Mapping[str, nn.Module], operations: Mapping[str, int]) -> dict[str, list[nn.Parameter]]:
    """Parameters by the called module that uses them: its own, and those of modules inside it that aren't called
    where it computes with them itself, as attention does with its projections."""
    users: dict[str, list[nn.Parameter]] = {name: [] for name in operations}
    for name, module in modules.items():
        user = name
        while user not in operations and user != ROOT:
            user = user.rpartition(".")[0] or ROOT
        if user in operations and (user == name or operations[user]):
            users[user] += module.parameters(recurse=False)
    return users


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Those in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _tensors(getattr(value, part.name, None))


# --- seconds --------------------------------------------------------------------------------


def _time_passes(
    modules: Mapping[str, nn.Module], forward: Callable[[], object], device: Device, passes: int
) -> list[dict[str, float]]:
    """Each module's seconds without the modules inside it, pass by pass; a first pass warms up and isn't listed."""
    if device.type == "cuda":
        return _time_passes_on_gpu(modules, forward, device, passes)

    def read() -> float:
        if device.type == "mps":
            torch.mps.synchronize()  # it has no events that could be read later
        return time.perf_counter()

    traces = (_trace_calls(modules, forward, read) for _ in range(passes + 1))
    return [_exclusive(calls, lambda start, end: end - start) for calls in traces][1:]


def _time_passes_on_gpu(
    modules: Mapping[str, nn.Module], forward: Callable[[], object], device: Device, passes: int
) -> list[dict[str, float]]:
    """With events in the stream. The GPU is kept busy until the host has issued the pass: else the time between two
    events around a short kernel would be the time that Python takes to issue it."""
    results, issue_s = [], BUSY_S
    with torch.cuda.device(device.torch_name):
        for _ in range(passes + 1):
            torch.cuda.synchronize()
            torch.cuda._sleep(int(1.5 * issue_s * CLOCK_HZ))  # type: ignore[no-untyped-call]
            started = time.perf_counter()
            calls = _trace_calls(modules, forward, _record_event)
            # The minimum, since a first pass warms up and a pass may wait for room in the queue.
            issue_s = min(issue_s, time.perf_counter() - started)
            torch.cuda.synchronize()
            results.append(_exclusive(calls, lambda start, end: start.elapsed_time(end) / 1e3))
    return results[1:]


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
