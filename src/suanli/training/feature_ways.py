"""The ways to compute what a network without its head returns, and the race that finds the fastest of them here.

The first batches are computed by torch in float32, with batch norms folded into the convolutions before them and the
channels last. Another way is tried only if so many images are left that its start pays, and taken only if it is faster
and agrees. The head is fitted to the same features that choose it, so a small error is no loss by itself.
"""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from suanli.compute.step_runner import list_tensors, map_tensors
from suanli.core.types import Device
from suanli.engines.backends.openvino import HINTS, import_openvino, openvino_core

TOLERANCE = 2e-2  # of the features' relative error (L2)
START_S = 2.5  # of OpenVINO: converting and compiling EfficientNet-Lite0 took 1.7 s on two cores
PAYS = 3.0  # times the seconds that a way takes to start must be left by the fastest way so far
FASTER = 1.03  # times as fast as the fastest so far: noise doesn't change the way
TRIED = 32  # images that another way computes twice
TORCH_PIECE = 8  # images that torch computes at once on a CPU: what a layer of more returns is fresh memory each time
PIECE = 16  # images of one request to OpenVINO, which computes one on each core
FOLDED_IMAGES = 2  # that show which convolution is before which norm
FOLDED_TOLERANCE = 1e-3

Compute = Callable[[Any], torch.Tensor]  # from inputs of the network (n, …) to features (n, F) in float32


@dataclass(frozen=True, kw_only=True)
class Way:
    name: str
    start_s: float  # that it takes until the first image, about, beside computing it
    make: Callable[[nn.Module, Device, Any], Compute]  # from the backbone and some inputs


class Race:
    """Computes all batches, and looks for a faster way meanwhile."""

    def __init__(self, backbone: nn.Module, device: Device, images: int, ways: Sequence[Way] | None = None) -> None:
        """`ways` are tried in this order; None: those that this machine has."""
        self._backbone, self._device, self._left = backbone, device, images
        self._waiting = list(usual_ways(device) if ways is None else ways)
        self._compute: Compute | None = None
        self.name = ""
        self.rates: dict[str, float] = {}  # images/s by way, the newest

    @property
    def note(self) -> str:
        return f"{self.rates[self.name]:,.0f} images/s" if self.name in self.rates else ""

    def compute(self, inputs: Any) -> np.ndarray:
        """(n, F) float32."""
        first = self._compute is None
        if self._compute is None:
            self.name, self._compute = "float32", _plain(self._backbone, self._device, inputs)
        features, seconds = _timed(self._compute, inputs)
        count = len(features)
        if not first:  # the first call also chooses kernels
            self.rates[self.name] = count / seconds
        self._left -= count
        while self._waiting and not first and self._pays(self._waiting[0]):
            self._try(self._waiting.pop(0), map_tensors(inputs, lambda t: t[:TRIED]), features[:TRIED])
        return features.cpu().numpy()

    def _pays(self, way: Way) -> bool:
        rate = self.rates[self.name]
        return self._left / rate > PAYS * (way.start_s + 2 * TRIED / rate)

    def _try(self, way: Way, inputs: Any, expected: torch.Tensor) -> None:
        try:
            compute = way.make(self._backbone, self._device, inputs)
            answer = compute(inputs)
            if relative_error(answer, expected) > TOLERANCE:
                return
            rate = len(expected) / _timed(compute, inputs)[1]
        except Exception:  # noqa: BLE001  # converters and compilers may raise anything; another way goes on
            return
        self.rates[way.name] = rate
        if rate > FASTER * self.rates[self.name]:
            self.name, self._compute = way.name, compute


def relative_error(answer: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite for other shapes and for numbers that aren't finite."""
    if answer.shape != expected.shape:
        return float("inf")
    error = float((answer - expected).norm() / expected.norm().clamp(min=1e-12))
    return error if np.isfinite(error) else float("inf")


def _timed(compute: Compute, inputs: Any) -> tuple[torch.Tensor, float]:
    before = time.perf_counter()
    features = compute(inputs)
    if features.device.type == "cuda":
        torch.cuda.synchronize(features.device)
    return features, time.perf_counter() - before


# --- by torch -------------------------------------------------------------------------------


def _plain(backbone: nn.Module, device: Device, inputs: Any) -> Compute:
    return _make_torch(fold_batch_norms(backbone, inputs), device, None)


def _make_torch(module: nn.Module, device: Device, dtype: torch.dtype | None) -> Compute:
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub

    def compute(inputs: Any) -> torch.Tensor:
        count = len(list_tensors(inputs)[0])
        piece = TORCH_PIECE if device.type == "cpu" else count
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            starts = range(0, count, piece)
            parts = [_call(module, map_tensors(inputs, itemgetter(slice(i, i + piece)))).float() for i in starts]
        return torch.cat(parts)

    return compute


def fold_batch_norms(module: nn.Module, inputs: Any) -> nn.Module:
    """A copy with each batch norm that follows a convolution multiplied into it, and left as it is where that changes
    an answer: what the module's code does between its layers can't be seen."""
    few = map_tensors(inputs, lambda tensor: tensor[:FOLDED_IMAGES])
    folded = copy.deepcopy(module)
    pairs = _find_pairs(folded, few)
    for conv, norm in pairs:
        layers = folded.get_submodule(conv), folded.get_submodule(norm)
        folded.set_submodule(conv, fuse_conv_bn_eval(*layers))  # type: ignore[type-var, arg-type]
        folded.set_submodule(norm, nn.Identity())
    with torch.inference_mode():
        expected, answer = (_call(one, few).float() for one in (module, folded))
    return folded if relative_error(answer, expected) <= FOLDED_TOLERANCE else copy.deepcopy(module)


def _find_pairs(module: nn.Module, inputs: Any) -> list[tuple[str, str]]:
    """The names of convolutions and of the batch norms that are given their output, each of them called once."""
    made: dict[int, str] = {}  # by the id of the output, which is kept alive meanwhile
    pairs: list[tuple[str, str]] = []
    alive: list[Any] = []
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            alive.append(output)
            if isinstance(layer, nn.Conv2d):
                made[id(output)] = name
            elif arguments and (conv := made.get(id(arguments[0]))) is not None:
                pairs.append((conv, name))

        return hook

    # A subclass of a batch norm may do more than that.
    layers = module.named_modules()
    watched = [(name, one) for name, one in layers if isinstance(one, nn.Conv2d) or type(one) is nn.BatchNorm2d]
    handles = [one.register_forward_hook(watch(name)) for name, one in watched]
    try:
        with torch.inference_mode():
            _call(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)]


def _call(module: nn.Module, inputs: Any) -> torch.Tensor:
    features: torch.Tensor = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
    return features


# --- other ways -----------------------------------------------------------------------------


def usual_ways(device: Device) -> Iterator[Way]:
    """Beside the plain one, in the order in which they are tried."""
    half = {"cuda": torch.float16, "cpu": torch.bfloat16}.get(device.type)
    reduced = str(half).removeprefix("torch.") if half in (torch.float16, torch.bfloat16) else None
    if device.type == "cpu" and importlib.util.find_spec("openvino") is not None:
        yield Way(name="OpenVINO float32", start_s=START_S, make=_make_openvino("float32"))
        if reduced in device.fast_dtypes:
            yield Way(name="OpenVINO bfloat16", start_s=START_S, make=_make_openvino("bfloat16"))
    if half is not None and reduced in device.fast_dtypes:

        def make(backbone: nn.Module, device: Device, inputs: Any) -> Compute:
            return _make_torch(fold_batch_norms(backbone, inputs), device, half)

        yield Way(name=str(reduced), start_s=0.5, make=make)


def _make_openvino(precision: str) -> Callable[[nn.Module, Device, Any], Compute]:
    def make(backbone: nn.Module, device: Device, inputs: Any) -> Compute:  # noqa: ARG001
        openvino = import_openvino()
        examples = tuple(tensor[:PIECE].contiguous() for tensor in list_tensors(inputs))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of tracing: shapes are constant here
            model = openvino.convert_model(copy.deepcopy(backbone), example_input=examples)
        for port, example in zip(model.inputs, examples, strict=True):
            model.reshape({port: [PIECE, *example.shape[1:]]})
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        queue = openvino.AsyncInferQueue(openvino_core().compile_model(model, "CPU", settings))
        return _Queue(queue)

    return make


class _Queue:
    """Pieces of a batch, as many at once as there are streams."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._answers: dict[int, np.ndarray] = {}
        queue.set_callback(self._keep)

    def _keep(self, request: Any, start: int) -> None:
        self._answers[start] = np.array(request.output_tensors[0].data)

    def __call__(self, inputs: Any) -> torch.Tensor:
        tensors = [tensor.contiguous().numpy() for tensor in list_tensors(inputs)]
        count = len(tensors[0])
        for start in range(0, count, PIECE):
            piece = {place: _fill(tensor[start : start + PIECE]) for place, tensor in enumerate(tensors)}
            self._queue.start_async(piece, start)
        self._queue.wait_all()
        parts = [self._answers.pop(start) for start in sorted(self._answers)]
        return torch.from_numpy(np.concatenate(parts)[:count].astype(np.float32, copy=False))


def _fill(piece: np.ndarray) -> np.ndarray:
    """A last piece that is too short is filled with its last image."""
    missing = PIECE - len(piece)
    return np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
