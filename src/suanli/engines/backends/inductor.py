"""TorchInductor, compiled while it loads: torch.compile, once for a batch of one and once for any batch.

Only the model is stored, so it runs on any machine with a C++ compiler, but loading takes as long as compiling.
Source: "torch.compile" in PyTorch's documentation; `freezing` in torch._inductor.config.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch._inductor.config

from suanli.compute.plan import use_threads
from suanli.core.schema import Arrays, zeros
from suanli.core.types import Engine, LoadedEngine, Placement
from suanli.engines.backends import _compiled, _cpu, eager
from suanli.engines.inference_module import InferenceModule, to_arrays, to_tensors
from suanli.models.model_folder import load_model


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    module = InferenceModule(load_model(folder, trust_code=placement.trust_code))
    names = tuple(module.preprocess.inputs)
    one, many = torch.compile(module, dynamic=False), torch.compile(module)

    def answer(arrays: Arrays) -> Arrays:
        tensors = to_tensors(arrays, names)
        lower = torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32")
        with use_threads(placement.threads), torch.inference_mode(), lower:
            if len(tensors[0]) == 1:
                return to_arrays(module.outputs, one(*tensors))
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the batch alone: other sides are those of the model
            return to_arrays(module.outputs, many(*tensors))

    def find_precision(arrays: Arrays) -> str:
        return _compiled.kernel_precision(lambda: answer(arrays))

    with warnings.catch_warnings(), torch._inductor.config.patch(_compiled.SETTINGS):
        warnings.simplefilter("ignore")
        for batch in (1, 8):
            answer(zeros(module.preprocess.inputs, batch))
    return LoadedEngine(answer=answer, find_precision=find_precision)


ENGINE = Engine(
    name="inductor",
    precisions=("bfloat16", "float32"),
    packages=("torch",),
    why_not=_cpu.why_not,
    build=eager.build,
    load=load,
    needs="model",
    order=60,
)
