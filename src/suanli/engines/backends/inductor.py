"""TorchInductor, compiled while it loads: torch.compile, once for a batch of one and once for any batch.

Only the model is stored, so it runs on any machine with a C++ compiler, but loading takes as long as compiling.
Source: "torch.compile" in PyTorch's documentation; `freezing` in torch._inductor.config.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config

from suanli.compute.plan import use_threads
from suanli.core.types import Engine, LoadedEngine, Placement
from suanli.engines.backends import _compiled, _cpu, eager
from suanli.engines.inference_module import InferenceModule, example_rows
from suanli.models.model_folder import load_model


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:
    module = InferenceModule(load_model(folder, trust_code=placement.trust_code))
    one, many = torch.compile(module, dynamic=False), torch.compile(module, dynamic=True)

    def answer(rows: np.ndarray) -> np.ndarray:
        lower = torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32")
        with use_threads(placement.threads), torch.inference_mode(), lower:
            run = one if len(rows) == 1 else many
            return run(torch.from_numpy(rows)).float().numpy()  # type: ignore[no-any-return]

    def find_precision(rows: np.ndarray) -> str:
        return _compiled.kernel_precision(lambda: answer(rows))

    with warnings.catch_warnings(), torch._inductor.config.patch(_compiled.SETTINGS):
        warnings.simplefilter("ignore")
        for batch in (1, 8):
            answer(example_rows(module.preprocess, batch).numpy())
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
