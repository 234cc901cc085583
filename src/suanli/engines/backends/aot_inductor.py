"""TorchInductor ahead of time: machine code for this processor, in .pt2 packages.

One package is for a batch of one, with constant shapes, and one for any batch. Weights are constants of the code
("freezing"), so that the compiler lays them out for the kernels.
Sources: "AOTInductor" in PyTorch's documentation; int8: "PyTorch 2 Export Post Training Quantization with X86 Backend
through Inductor" in torchao's.
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from suanli.compute.plan import use_threads
from suanli.core.types import Device, Engine, EngineInputs, LoadedEngine, Placement
from suanli.engines.backends import _compiled, _cpu
from suanli.engines.inference_module import MAX_BATCH, InferenceModule, example_rows
from suanli.models.model_folder import load_model

ONE, MANY = "one.pt2", "many.pt2"
BATCH = 8  # of examples, and of calibration


def why_not(device: Device, precision: str) -> str | None:
    if reason := _cpu.why_not(device, precision):
        return reason
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler is installed (g++ or clang++)"
    if precision == "int8" and importlib.util.find_spec("torchao") is None:
        return "not installed: torchao"
    return None


def build(inputs: EngineInputs, precision: str, folder: Path, placement: Placement) -> None:
    assert inputs.model is not None
    saved = load_model(inputs.model, trust_code=placement.trust_code)
    # Inductor finds the layout; frozen channels_last weights were seen to give wrong answers
    module: Any = InferenceModule(saved)
    rows = example_rows(saved.preprocess, BATCH)
    any_batch = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    module(rows)  # constants that the first call caches must not be created while exporting
    lower = precision == "bfloat16"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if precision == "int8":
            module = _quantize(torch.export.export(module, (rows,), dynamic_shapes=any_batch).module(), inputs)
        for name, example, shapes in ((ONE, rows[:1], None), (MANY, rows, any_batch)):
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                program = torch.export.export(module, (example,), dynamic_shapes=shapes)
                path = str(folder / name)
                torch._inductor.aoti_compile_and_package(
                    program, package_path=path, inductor_configs=_compiled.SETTINGS
                )


def _quantize(module: Any, inputs: EngineInputs) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    assert inputs.calibration is not None
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    quantizer.set_function_type_qconfig(torch.nn.functional.max_pool2d, None)  # in int8 it would lose its ceil_mode
    observed = prepare_pt2e(module, quantizer)
    for start in range(0, len(inputs.calibration), BATCH):
        observed(torch.from_numpy(np.array(inputs.calibration[start : start + BATCH])))
    return convert_pt2e(observed)


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:  # noqa: ARG001
    one, many = (torch._inductor.aoti_load_package(str(folder / name)) for name in (ONE, MANY))

    def answer(rows: np.ndarray) -> np.ndarray:
        with use_threads(placement.threads), torch.inference_mode():
            run = one if len(rows) == 1 else many
            return run(torch.from_numpy(rows)).float().numpy()  # type: ignore[no-any-return]

    def find_precision(rows: np.ndarray) -> str:
        return _compiled.kernel_precision(lambda: answer(rows))

    return LoadedEngine(answer=answer, find_precision=find_precision)


ENGINE = Engine(
    name="aot_inductor",
    precisions=("bfloat16", "int8", "float32"),
    packages=("torch",),
    why_not=why_not,
    build=build,
    load=load,
    needs="model",
    order=40,
    portable=False,
)
