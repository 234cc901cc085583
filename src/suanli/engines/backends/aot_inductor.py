"""TorchInductor ahead of time: machine code for this processor, in .pt2 packages.

One package is for a batch of one, with constant shapes, and one for any batch. Weights are constants of the code
("freezing"), so that the compiler lays them out for the kernels.
Sources: "AOTInductor" in PyTorch's documentation; int8: "PyTorch 2 Export Post Training Quantization with X86 Backend
through Inductor" in torchao's.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from suanli.compute.plan import use_threads
from suanli.core.schema import Arrays
from suanli.core.types import Device, Engine, EngineInputs, LoadedEngine, Placement
from suanli.engines.backends import _compiled, _cpu
from suanli.engines.inference_module import InferenceModule, example_tensors, free_batch, to_arrays, to_tensors
from suanli.models.model_folder import load_model

ONE, MANY, NAMES = "one.pt2", "many.pt2", "names.json"
OLDER_NAMES = {"inputs": ["rows"], "outputs": ["probabilities"]}  # of an engine that an older version built
BATCH = 8  # of examples


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
    names = {"inputs": list(saved.preprocess.inputs), "outputs": list(module.outputs)}
    (folder / NAMES).write_text(json.dumps(names))
    tensors = example_tensors(saved.preprocess, BATCH)
    any_batch: Any = free_batch(saved.preprocess)
    module(*tensors)  # constants that the first call caches must not be created while exporting
    lower = precision == "bfloat16"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if precision == "int8":
            exported = torch.export.export(module, tensors, dynamic_shapes=any_batch).module()
            module = _quantize(exported, inputs, names["inputs"])
            (any_batch,) = any_batch  # it names its arguments one by one
        one = example_tensors(saved.preprocess, 1)
        for name, examples, shapes in ((ONE, one, None), (MANY, tensors, any_batch)):
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                program = torch.export.export(module, examples, dynamic_shapes=shapes)
                path = str(folder / name)
                torch._inductor.aoti_compile_and_package(
                    program, package_path=path, inductor_configs=_compiled.SETTINGS
                )


def _quantize(module: torch.fx.GraphModule, inputs: EngineInputs, names: Sequence[str]) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    assert inputs.calibration is not None
    _separate_calls(module)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    quantizer.set_function_type_qconfig(torch.nn.functional.max_pool2d, None)  # in int8 it would lose its ceil_mode
    quantizer.set_module_name_qconfig("predict", None)  # such as suppressing overlapping boxes
    observed = prepare_pt2e(module, quantizer)
    for arrays in inputs.calibration:
        observed(*to_tensors(arrays, names))
    return convert_pt2e(observed)


def _separate_calls(module: torch.fx.GraphModule) -> None:
    """Gives each call of a layer that is called several times a name and weights of its own: the quantizer would take
    its calls for one, and fold the norms behind all of them into the same weights."""
    graph, seen = module.graph, set()
    for node in list(graph.nodes):
        stack = node.meta.get("nn_module_stack")
        if not stack or node.op != "call_function":
            continue
        key, (path, kind) = list(stack.items())[-1]
        if call := key.partition("@")[2]:
            node.meta["nn_module_stack"] = {**stack, key: (f"{path}@{call}", kind)}
        for source in [one for one in node.all_input_nodes if one.op == "get_attr"]:
            if call and source.target in seen:
                name = f"{source.target}@{call}".replace(".", "_")
                setattr(module, name, torch.nn.Parameter(module.get_parameter(source.target).clone()))
                with graph.inserting_before(node):
                    node.replace_input_with(source, graph.get_attr(name))
            seen.add(source.target)
    module.recompile()


def load(folder: Path, precision: str, placement: Placement) -> LoadedEngine:  # noqa: ARG001
    one, many = (torch._inductor.aoti_load_package(str(folder / name)) for name in (ONE, MANY))
    file = folder / NAMES
    names = json.loads(file.read_text()) if file.exists() else OLDER_NAMES

    def answer(arrays: Arrays) -> Arrays:
        tensors = to_tensors(arrays, names["inputs"])
        with use_threads(placement.threads), torch.inference_mode():
            run = one if len(tensors[0]) == 1 else many
            answers = run(*tensors)
            return to_arrays(names["outputs"], [answers] if isinstance(answers, torch.Tensor) else answers)

    def find_precision(arrays: Arrays) -> str:
        return _compiled.kernel_precision(lambda: answer(arrays))

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
