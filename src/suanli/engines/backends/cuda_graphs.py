"""PyTorch on an NVIDIA GPU with one launch for a whole batch: its kernels are recorded once as a CUDA graph.

A small network computes a batch sooner than Python can issue its kernels one by one. A graph is for one size of a
batch, so there is one for each of a few sizes, recorded when it is first needed; a batch is filled up to the next size,
and cut into parts where it is larger than the largest. What fills it up are rows of an earlier batch: in evaluation no
row has any say in another's answer.

Weights are cast to the lower precision once, where autocast would cast them in every replay. A network that can't
compute in one dtype throughout gets autocast after all. Preprocessing stays in float32, and so does the softmax.

Not measured on a GPU yet: recording, replaying and the switch for TF32 are written after PyTorch's documentation; what
surrounds them is tested on a CPU, where the same tensors are used and nothing is recorded.
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

SIZES = (1, 2, 4, 8, 16, 32, 64)  # of batches that are recorded: each keeps the memory of its own pass
WARM_UPS = 3  # before recording: libraries choose algorithms and allocate workspaces in the first passes


def why_not(device: Device, precision: str) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if precision not in device.fast_dtypes:
        return f"{device.name} has no {precision} of its own"
    return None


# --- sizes ---


def captured_size(count: int) -> int:
    """The smallest recorded size that holds so many rows, at most the largest."""
    return next((size for size in SIZES if size >= count), SIZES[-1])


def split_batch(count: int) -> list[tuple[int, int, int]]:
    """Rows from, up to (not included), and the recorded size that holds them: how a batch is cut up."""
    starts = range(0, count, SIZES[-1])
    stops = [min(start + SIZES[-1], count) for start in starts]
    return [(start, stop, captured_size(stop - start)) for start, stop in zip(starts, stops, strict=True)]


# --- what is recorded ---


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
        self.whole, self.dtype = InferenceModule(saved), dtype

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        # Without the cache, as PyTorch demands: a graph must not refer to what the cache frees after the block.
        with torch.autocast(rows.device.type, self.dtype, cache_enabled=False):
            probabilities: torch.Tensor = self.whole(rows)
        return probabilities.float()


def prepare_model(saved: SavedModel, precision: str, where: torch.device) -> nn.Module:
    """The model on its device, ready to be recorded: cached rows to probabilities (B, K) float32."""
    kinds: list[type[LowPrecisionModule | AutocastModule]] = [LowPrecisionModule, AutocastModule]
    if precision not in eager.LOWER:
        return _placed(InferenceModule(saved), where)
    for kind in kinds:
        found = _placed(kind(saved, eager.DTYPES[precision]), where)
        try:
            with torch.inference_mode():
                found(example_rows(saved.preprocess, SIZES[1]).to(where))
        except RuntimeError as error:  # of two dtypes that meet in one operation
            if kind is kinds[-1] or is_out_of_memory(error):
                raise
        else:
            break
    return found


def _placed(module: nn.Module, where: torch.device) -> nn.Module:
    return module.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


# --- recording ---


@dataclass(frozen=True, kw_only=True)
class _CapturedGraph:
    rows: torch.Tensor  # rows that a replay reads
    replay: Callable[[], torch.Tensor]  # the answers, which the next replay overwrites


class CapturedModel:
    """`model(rows)` for NumPy arrays of any number of rows, replayed. Where there are no graphs it is computed anew."""

    def __init__(self, model: nn.Module, row: torch.Tensor, precision: str, where: torch.device) -> None:
        """`row` (1, *row_shape) is any row, for shape and dtype."""
        self._model, self._row, self._precision, self._where = model, row, precision, where
        self.graphs: dict[int, _CapturedGraph] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        found = []
        with torch.inference_mode(), self._there(), eager.tf32_switch(self._precision, self._where.type):
            for start, stop, size in split_batch(len(rows)):
                recording = self.graphs.get(size)
                if recording is None:
                    recording = self.graphs[size] = self._record(size)
                recording.rows[: stop - start].copy_(torch.from_numpy(rows[start:stop]))
                found.append(recording.replay()[: stop - start].cpu().numpy())
        return np.concatenate(found)

    def run_uncaptured(self, rows: np.ndarray) -> None:
        """Without a graph: what a graph would record, and hooks are called."""
        with torch.inference_mode(), self._there(), eager.tf32_switch(self._precision, self._where.type):
            self._model(torch.from_numpy(rows).to(self._where))

    def _there(self) -> AbstractContextManager[object]:
        """Graphs, and streams without a name, are those of the current GPU."""
        return torch.cuda.device(self._where) if self._where.type == "cuda" else nullcontext()

    def _record(self, size: int) -> _CapturedGraph:
        given = torch.zeros((size, *self._row.shape[1:]), dtype=self._row.dtype, device=self._where)
        if self._where.type != "cuda":
            return _CapturedGraph(rows=given, replay=lambda: self._model(given))
        aside = torch.cuda.Stream(self._where)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self._where))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._model(given)
        torch.cuda.current_stream(self._where).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):  # the same: cuBLAS has a workspace for each stream
            answers: torch.Tensor = self._model(given)

        def replay() -> torch.Tensor:
            graph.replay()
            return answers

        return _CapturedGraph(rows=given, replay=replay)


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
