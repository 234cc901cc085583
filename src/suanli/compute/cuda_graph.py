"""A whole training step as one CUDA graph: recorded once, then replayed with a single launch.

A small network on a fast GPU computes a step sooner than Python can issue its hundreds of kernels. A graph
issues them all at once, the optimizer's too. What changes from step to step must lie in tensors that stay
where they are: inputs, targets and learning rates are copied into fixed ones before each replay.

Each shape of a batch has a graph of its own, up to a few; others are computed without one. Not for steps that look
at a value on the way (loss scaling). Source: https://pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

SHAPES = 4  # of batches that are recorded: each holds the memory of a step
WARM_UPS = 3  # steps before recording: libraries choose algorithms and allocate workspaces in the first ones

Learn = Callable[[Any, Any], torch.Tensor]
Shapes: TypeAlias = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True, kw_only=True)
class _Recording:
    fixed: tuple[Any, Any]  # inputs and targets that a replay reads
    replay: Callable[[], torch.Tensor]


class CapturedStep:
    """`learn(inputs, targets)` with the same results, replayed. On a device without graphs the same fixed
    tensors are used and `learn` is called, so that all but the recording is tested without a GPU."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, learn: Learn) -> None:
        self._model, self._optimizer, self._learn = model, optimizer, learn
        self._recordings: dict[Shapes, _Recording] = {}

    def __call__(self, inputs: Any, targets: Any) -> torch.Tensor:
        shapes = _shapes((inputs, targets))
        recording = self._recordings.get(shapes)
        if recording is None:
            if len(self._recordings) == SHAPES:
                return self._learn(inputs, targets)
            recording = self._recordings[shapes] = self._record(inputs, targets)
        for fixed, given in zip(_leaves(recording.fixed), _leaves((inputs, targets)), strict=True):
            fixed.copy_(given)
        return recording.replay()

    def _record(self, inputs: Any, targets: Any) -> _Recording:
        convert_rates_to_tensors(self._optimizer)  # only now: a checkpoint may have replaced them
        fixed = pytree.tree_map_only(torch.Tensor, torch.clone, (inputs, targets))
        device = _leaves(fixed)[0].device
        if device.type != "cuda":
            return _Recording(fixed=fixed, replay=lambda: self._learn(*fixed))
        with _as_before(self._model, self._optimizer):
            aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self._learn(*fixed)
            torch.cuda.current_stream(device).wait_stream(aside)
            self._optimizer.zero_grad(set_to_none=True)  # so that gradients are allocated by the recording
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread may pin memory meanwhile
                loss = self._learn(*fixed)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss.clone()  # the next replay writes into the same place

        return _Recording(fixed=fixed, replay=replay)


def convert_rates_to_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Learning rates as tensors on the parameters' device, and step counts too: a graph reads them from
    there."""
    optimizer._warned_capturable_if_run_uncaptured = True  # or torch warns of the steps before a recording
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group and device.type == "cuda":
            group["capturable"] = True
            for parameter in group["params"]:
                entries = optimizer.state.get(parameter, {})
                if "step" in entries:
                    entries["step"] = torch.as_tensor(entries["step"], dtype=torch.float32, device=device)


@contextmanager
def _as_before(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Puts weights, statistics and the optimizer's state back, in place. State that was not there before
    becomes zero, from which every optimizer here starts."""
    tensors = list(model.state_dict().values())
    values = [t.detach().clone() for t in tensors]
    state = {p: {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)} for p, s in optimizer.state.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    if isinstance(value, torch.Tensor):
                        before = state.get(parameter, {}).get(key)
                        value.zero_() if before is None else value.copy_(before)


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _shapes(value: Any) -> Shapes:
    return tuple((leaf.shape, leaf.dtype) for leaf in _leaves(value))
