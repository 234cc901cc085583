"""Plain PyTorch: the reference in float32, and lower precisions where the device has them.

On an NVIDIA GPU float32 means float32: PyTorch's default computes convolutions of float32 numbers in TF32 there, so the
switch is set for each call. tfloat32 is the same network with the switch on.
float32 was run on an H100, the other precisions were not. Source of the switches: "Numerical accuracy" and
"TensorFloat-32" in PyTorch's documentation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from suanli.compute.plan import use_threads
from suanli.core.schema import Arrays
from suanli.core.types import Device, Engine, EngineInputs, LoadedEngine, Placement
from suanli.engines.inference_module import InferenceModule, to_arrays, to_tensors
from suanli.machine.switches import set_attributes
from suanli.models.model_folder import WEIGHTS, load_model

DTYPES = {
    "float32": torch.float32,
    "tfloat32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LOWER = ("bfloat16", "float16")  # with weights of fewer bits
HEAVY = (nn.Conv1d, nn.Conv2d, nn.Linear)


def why_not(device: Device, precision: str) -> str | None:
    if precision not in device.fast_dtypes:
        return f"{device.name} has no {precision} of its own"
    if precision == "float16" and device.type == "cpu":
        return "PyTorch has few float16 kernels for CPUs"
    return None


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert inputs.model is not None
    for name in ("model.json", WEIGHTS):
        shutil.copyfile(inputs.model / name, folder / name)


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    module = InferenceModule(load_model(folder, trust_code=placement.trust_code))
    where = torch.device(placement.device.torch_name)
    module.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    lower = precision in LOWER

    def answer(arrays: Arrays) -> Arrays:
        autocast = torch.autocast(where.type, DTYPES[precision], enabled=lower)
        with use_threads(placement.threads), torch.inference_mode(), autocast, tf32_switch(precision, where.type):
            tensors = to_tensors(arrays, tuple(module.preprocess.inputs))
            return to_arrays(module.outputs, module(*(tensor.to(where) for tensor in tensors)))

    def find_precision(arrays: Arrays) -> str:
        return network_precision(module, lambda: answer(arrays)) or precision

    return LoadedEngine(answer=answer, find_precision=find_precision)


def tf32_switch(precision: str, device_type: str) -> AbstractContextManager[None]:
    """A context in which an NVIDIA GPU computes products and convolutions of float32 numbers in TF32 for "tfloat32", in
    full float32 for any other precision, whatever is set for the process."""
    if device_type != "cuda":
        return nullcontext()
    backends = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)  # type: ignore[attr-defined]
    return set_attributes(switches, "fp32_precision", "tf32" if precision == "tfloat32" else "ieee")


def network_precision(network: nn.Module, work: Callable[[], object]) -> str | None:
    """The precision of most of the network's products and convolutions while `work` runs it; None: it has none."""
    precisions: list[str] = []

    def note_precision(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        precisions.append(layer_precision(module, output.dtype, output.device.type))

    hooks = [module.register_forward_hook(note_precision) for module in network.modules() if isinstance(module, HEAVY)]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return max(set(precisions), key=precisions.count) if precisions else None


def layer_precision(module: nn.Module, dtype: torch.dtype, device_type: str) -> str:
    """The precision in which a layer computes outputs of this dtype, by the present state of the switches."""
    backends = torch.backends
    switch = backends.cuda.matmul if isinstance(module, nn.Linear) else backends.cudnn.conv  # type: ignore[attr-defined]
    if dtype == torch.float32 and device_type == "cuda" and switch.fp32_precision == "tf32":
        return "tfloat32"
    return str(dtype).removeprefix("torch.")


ENGINE = Engine(
    name="eager",
    precisions=("bfloat16", "float16", "tfloat32", "float32"),
    packages=("torch",),
    why_not=why_not,
    build=build,
    load=load,
    needs="model",
    order=30,
)
