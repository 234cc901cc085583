"""PyTorch on an NVIDIA GPU with one launch for a whole batch: its kernels are captured once as a CUDA graph.

A small network computes a batch sooner than Python can launch its kernels one by one. A graph is for one batch size,
so there is one for each of a few sizes, captured when it is first needed; a batch is padded to the next size, and split
where it is larger than the largest. The padding is inputs of an earlier batch: in evaluation mode no input influences
another's answer.

Weights are cast to the lower precision once, where autocast would cast them in every replay. A network that can't
compute in one dtype throughout gets autocast instead. Preprocessing and predictions, such as a softmax, stay in
float32.

Not measured on a GPU yet: capture, replay and the switch for TF32 are written after PyTorch's documentation; the code
around them is tested on a CPU, where the same tensors are used and nothing is captured.
Source: "CUDA Graphs" and "Whole-network capture" in https://pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from suanli.core.schema import Arrays, Schema, zeros
from suanli.core.types import Device, Engine, LoadedEngine, Placement
from suanli.engines.backends import eager
from suanli.engines.inference_module import InferenceModule, example_tensors, to_arrays, to_tensors
from suanli.machine.device import is_out_of_memory
from suanli.models.model_folder import SavedModel, load_model

SIZES = (1, 2, 4, 8, 16, 32, 64)  # of batches that are captured; each graph holds the memory of its own pass
WARM_UPS = 3  # before capture: libraries choose algorithms and allocate workspaces in the first passes


def why_not(device: Device, precision: str) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if precision not in device.fast_dtypes:
        return f"{device.name} has no {precision} of its own"
    return None


# --- sizes ---


def captured_size(count: int) -> int:
    """The smallest captured size that holds so many inputs, at most the largest."""
    return next((size for size in SIZES if size >= count), SIZES[-1])


def split_batch(count: int) -> list[tuple[int, int, int]]:
    """The parts of a batch: first input, input after the last, and the captured size that holds them."""
    starts = range(0, count, SIZES[-1])
    stops = [min(start + SIZES[-1], count) for start in starts]
    return [(start, stop, captured_size(stop - start)) for start, stop in zip(starts, stops, strict=True)]


# --- what is captured ---


class LowPrecisionModule(nn.Module):
    """`InferenceModule` with a network whose weights have this dtype."""

    def __init__(self, saved: SavedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = InferenceModule(replace(saved, module=_CastNetwork(saved.module, dtype)))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answers: tuple[torch.Tensor, ...] = self.module(*tensors)
        return answers


class _CastNetwork(nn.Module):
    """A copy of a network in this dtype, which takes and gives float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype

    def forward(self, *inputs: torch.Tensor) -> Any:
        def cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor

        outputs = self.network(*map(cast(self.dtype), inputs))
        return _pytree.tree_map_only(torch.Tensor, cast(torch.float32), outputs)


class AutocastModule(nn.Module):
    """`InferenceModule` with float32 weights that are cast where they are used."""

    def __init__(self, saved: SavedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = InferenceModule(saved), dtype

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Without the cache, as PyTorch demands: a graph must not refer to what the cache frees after the block.
        with torch.autocast(tensors[0].device.type, self.dtype, cache_enabled=False):
            answers: tuple[torch.Tensor, ...] = self.module(*tensors)
        return answers


def prepare_model(saved: SavedModel, precision: str, where: torch.device) -> nn.Module:
    """An `InferenceModule`, or one that computes as it does, on its device and ready to be captured."""
    kinds: list[type[LowPrecisionModule | AutocastModule]] = [LowPrecisionModule, AutocastModule]
    if precision not in eager.LOWER:
        return _place(InferenceModule(saved), where)
    for kind in kinds:
        model = _place(kind(saved, eager.DTYPES[precision]), where)
        try:
            with torch.inference_mode():
                model(*(tensor.to(where) for tensor in example_tensors(saved.preprocess, SIZES[1])))
        except RuntimeError as error:  # two dtypes meet in one operation
            if kind is kinds[-1] or is_out_of_memory(error):
                raise
        else:
            break
    return model


def _place(module: nn.Module, where: torch.device) -> nn.Module:
    return module.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


# --- capture ---


@dataclass(frozen=True, kw_only=True)
class _CapturedGraph:
    inputs: tuple[torch.Tensor, ...]  # that a replay reads
    replay: Callable[[], tuple[torch.Tensor, ...]]  # the answers, which the next replay overwrites


class CapturedModel:
    """A model's answers to NumPy arrays of any number of inputs, by replaying graphs; not on a GPU, by computing it."""

    def __init__(
        self, model: nn.Module, inputs: Schema, outputs: Sequence[str], precision: str, where: torch.device
    ) -> None:
        """`inputs` and `outputs` are in the order of the model's arguments and answers."""
        self._model, self._inputs, self._outputs = model, inputs, outputs
        self._precision, self._where = precision, where
        self.graphs: dict[int, _CapturedGraph] = {}

    def __call__(self, arrays: Arrays) -> Arrays:
        inputs = to_tensors(arrays, tuple(self._inputs))
        answers = []
        with torch.inference_mode(), self._on_device(), eager.tf32_switch(self._precision, self._where.type):
            for start, stop, size in split_batch(len(inputs[0])):
                graph = self.graphs.get(size)
                if graph is None:
                    graph = self.graphs[size] = self._capture(size)
                for target, source in zip(graph.inputs, inputs, strict=True):
                    target[: stop - start].copy_(source[start:stop])
                answers.append(to_arrays(self._outputs, [answer[: stop - start] for answer in graph.replay()]))
        return {name: np.concatenate([part[name] for part in answers]) for name in self._outputs}

    def run_uncaptured(self, arrays: Arrays) -> None:
        """Compute what a graph would replay, so that hooks are called."""
        with torch.inference_mode(), self._on_device(), eager.tf32_switch(self._precision, self._where.type):
            self._model(*(tensor.to(self._where) for tensor in to_tensors(arrays, tuple(self._inputs))))

    def _on_device(self) -> AbstractContextManager[object]:
        """Graphs and default streams belong to the current GPU."""
        return torch.cuda.device(self._where) if self._where.type == "cuda" else nullcontext()

    def _capture(self, size: int) -> _CapturedGraph:
        inputs = tuple(torch.from_numpy(array).to(self._where) for array in zeros(self._inputs, size).values())
        if self._where.type != "cuda":
            return _CapturedGraph(inputs=inputs, replay=lambda: self._model(*inputs))
        stream = torch.cuda.Stream(self._where)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._where))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._model(*inputs)
        torch.cuda.current_stream(self._where).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # the same: cuBLAS has a workspace for each stream
            answers: tuple[torch.Tensor, ...] = self._model(*inputs)

        def replay() -> tuple[torch.Tensor, ...]:
            graph.replay()
            return answers

        return _CapturedGraph(inputs=inputs, replay=replay)


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    saved = load_model(folder, trust_code=placement.trust_code)
    where = torch.device(placement.device.torch_name)
    model = prepare_model(saved, precision, where)
    captured = CapturedModel(model, saved.preprocess.inputs, tuple(saved.task.outputs), precision, where)

    def find_precision(arrays: Arrays) -> str:
        return eager.network_precision(model, lambda: captured.run_uncaptured(arrays)) or precision

    return LoadedEngine(answer=captured, find_precision=find_precision)


ENGINE = Engine(
    name="cuda_graphs",
    precisions=("float16", "bfloat16", "tfloat32", "float32"),
    packages=("torch",),
    why_not=why_not,
    build=eager.build,
    load=load,
    needs="model",
    order=25,
)
