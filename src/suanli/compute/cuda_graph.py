"""A whole training step as one CUDA graph: captured once, then replayed with a single launch.

A fast GPU computes a step of a small network sooner than Python can launch its hundreds of kernels. A graph launches
them all at once, the optimizer's too. It always reads the same memory, so inputs, targets and learning rates are
copied into fixed tensors before each replay.

Each batch shape gets its own graph, up to a few; other shapes are computed without one. Steps that read a value on
the host (loss scaling) can't be captured.
Source: https://pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

MAX_SHAPES = 4  # of batches that are captured: each graph holds the memory of a step
WARM_UPS = 3  # steps before a capture: libraries choose algorithms and allocate workspaces in the first ones

TrainStep = Callable[[Any, Any], torch.Tensor]
Shapes: TypeAlias = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True, kw_only=True)
class _Graph:
    fixed: tuple[Any, Any]  # inputs and targets that a replay reads
    replay: Callable[[], torch.Tensor]


class CapturedStep:
    """`train_step(inputs, targets)` with the same results, replayed from a graph. On a device without graphs it copies
    into the same fixed tensors and calls `train_step`, so that all but the capture is tested without a GPU."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, train_step: TrainStep) -> None:
        self._model, self._optimizer, self._train_step = model, optimizer, train_step
        self._graphs: dict[Shapes, _Graph] = {}

    def __call__(self, inputs: Any, targets: Any) -> torch.Tensor:
        shapes = _shapes((inputs, targets))
        graph = self._graphs.get(shapes)
        if graph is None:
            if len(self._graphs) == MAX_SHAPES:
                return self._train_step(inputs, targets)
            graph = self._graphs[shapes] = self._capture(inputs, targets)
        for fixed, value in zip(_leaves(graph.fixed), _leaves((inputs, targets)), strict=True):
            fixed.copy_(value)
        return graph.replay()

    def _capture(self, inputs: Any, targets: Any) -> _Graph:
        convert_rates_to_tensors(self._optimizer)  # not before: loading a checkpoint may have replaced them
        fixed = pytree.tree_map_only(torch.Tensor, torch.clone, (inputs, targets))
        device = _leaves(fixed)[0].device
        if device.type != "cuda":
            return _Graph(fixed=fixed, replay=lambda: self._train_step(*fixed))
        with _restore_afterwards(self._model, self._optimizer):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._train_step(*fixed)
            torch.cuda.current_stream(device).wait_stream(stream)
            self._optimizer.zero_grad(set_to_none=True)  # so that the capture allocates the gradients
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread may pin memory meanwhile
                loss = self._train_step(*fixed)

        def replay() -> torch.Tensor:
            graph.replay()
            return loss.clone()  # the next replay writes into the same place

        return _Graph(fixed=fixed, replay=replay)


def convert_rates_to_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Put learning rates and step counts into tensors on the parameters' device, where a graph can read them."""
    optimizer._warned_capturable_if_run_uncaptured = True  # or torch warns of the steps before the capture
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
def _restore_afterwards(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put weights, statistics and the optimizer's state back after the block, in place. State that didn't exist
    before becomes zero: with the optimizers that may be captured, it starts at zero."""
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
