"""PyTorch on an NVIDIA GPU with one launch for a whole batch: its kernels are captured once as a CUDA graph.

A small network computes a batch sooner than Python can launch its kernels one by one. A graph is for one batch size,
so there is one for each of a few sizes, captured when it is first needed; a batch is padded to the next size, and split
where it is larger than the largest. The padding is rows of an earlier batch: in evaluation mode no row influences
another's answer.

Weights are cast to the lower precision once, where autocast would cast them in every replay. A network that can't
compute in one dtype throughout gets autocast instead. Preprocessing and softmax stay in float32.

Not measured on a GPU yet: capture, replay and the switch for TF32 are written after PyTorch's documentation; the code
around them is tested on a CPU, where the same tensors are used and nothing is captured.
Source: "CUDA Graphs" and "Whole-network capture" in https://pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from suanli.core.types import Device, Engine, LoadedEngine, Placement
from suanli.engines.backends import eager
from suanli.engines.inference_module import InferenceModule, example_rows
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
    """The smallest captured size that holds so many rows, at most the largest."""
    return next((size for size in SIZES if size >= count), SIZES[-1])


def split_batch(count: int) -> list[tuple[int, int, int]]:
    """The parts of a batch: first row, row after the last, and the captured size that holds them."""
    starts = range(0, count, SIZES[-1])
    stops = [min(start + SIZES[-1], count) for start in starts]
    return [(start, stop, captured_size(stop - start)) for start, stop in zip(starts, stops, strict=True)]


# --- what is captured ---


class LowPrecisionModule(nn.Module):
    """Cached rows to probabilities, with a network whose weights have this dtype."""

    def __init__(self, saved: SavedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.deepcopy(saved.module).to(dtype)
        self.dtype, self._preprocess, self._task = dtype, saved.preprocess, saved.task
        self.eval()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = self._preprocess.to_model(rows)
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        return self._task.probabilities(self.network(inputs).float())


class AutocastModule(nn.Module):
    """Cached rows to probabilities, with float32 weights that are cast where they are used."""

    def __init__(self, saved: SavedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = InferenceModule(saved), dtype

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        # Without the cache, as PyTorch demands: a graph must not refer to what the cache frees after the block.
        with torch.autocast(rows.device.type, self.dtype, cache_enabled=False):
            probabilities: torch.Tensor = self.module(rows)
        return probabilities.float()


def prepare_model(saved: SavedModel, precision: str, where: torch.device) -> nn.Module:
    """The model on its device, ready to be captured: cached rows to probabilities (B, K) float32."""
    kinds: list[type[LowPrecisionModule | AutocastModule]] = [LowPrecisionModule, AutocastModule]
    if precision not in eager.LOWER:
        return _place(InferenceModule(saved), where)
    for kind in kinds:
        model = _place(kind(saved, eager.DTYPES[precision]), where)
        try:
            with torch.inference_mode():
                model(example_rows(saved.preprocess, SIZES[1]).to(where))
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
    rows: torch.Tensor  # rows that a replay reads
    replay: Callable[[], torch.Tensor]  # the answers, which the next replay overwrites


class CapturedModel:
    """`model(rows)` for NumPy arrays of any number of rows, by replaying graphs; not on a GPU, by computing it."""

    def __init__(self, model: nn.Module, row: torch.Tensor, precision: str, where: torch.device) -> None:
        """`row` (1, *row_shape) is any row, for shape and dtype."""
        self._model, self._row, self._precision, self._where = model, row, precision, where
        self.graphs: dict[int, _CapturedGraph] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        answers = []
        with torch.inference_mode(), self._on_device(), eager.tf32_switch(self._precision, self._where.type):
            for start, stop, size in split_batch(len(rows)):
                graph = self.graphs.get(size)
                if graph is None:
                    graph = self.graphs[size] = self._capture(size)
                graph.rows[: stop - start].copy_(torch.from_numpy(rows[start:stop]))
                answers.append(graph.replay()[: stop - start].cpu().numpy())
        return np.concatenate(answers)

    def run_uncaptured(self, rows: np.ndarray) -> None:
        """Compute what a graph would replay, so that hooks are called."""
        with torch.inference_mode(), self._on_device(), eager.tf32_switch(self._precision, self._where.type):
            self._model(torch.from_numpy(rows).to(self._where))

    def _on_device(self) -> AbstractContextManager[object]:
        """Graphs and default streams belong to the current GPU."""
        return torch.cuda.device(self._where) if self._where.type == "cuda" else nullcontext()

    def _capture(self, size: int) -> _CapturedGraph:
        rows = torch.zeros((size, *self._row.shape[1:]), dtype=self._row.dtype, device=self._where)
        if self._where.type != "cuda":
            return _CapturedGraph(rows=rows, replay=lambda: self._model(rows))
        stream = torch.cuda.Stream(self._where)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._where))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._model(rows)
        torch.cuda.current_stream(self._where).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # the same: cuBLAS has a workspace for each stream
            answers: torch.Tensor = self._model(rows)

        def replay() -> torch.Tensor:
            graph.replay()
            return answers

        return _CapturedGraph(rows=rows, replay=replay)


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    saved = load_model(folder, trust_code=placement.trust_code)
    where = torch.device(placement.device.torch_name)
    model = prepare_model(saved, precision, where)
    captured = CapturedModel(model, example_rows(saved.preprocess, 1), precision, where)

    def find_precision(rows: np.ndarray) -> str:
        return eager.network_precision(model, lambda: captured.run_uncaptured(rows)) or precision

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
