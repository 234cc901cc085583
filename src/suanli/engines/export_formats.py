"""The file formats that `suanli export` writes: how each is written, and how it is read without suanli.

    onnx           one .onnx file
    openvino       a folder with model.xml and model.bin
    pt2            one .pt2 file, a program of torch.export
    litert         one .tflite file for phones and microcontrollers, which takes one input a call
    safetensors    the weights alone, with what built the network

A graph takes cached inputs (images: uint8 (B, H, W, C) of the working size; texts: token ids) and gives the task's
predictions (probabilities: float32 (B, K)), so the second half of preprocessing, such as normalising, is inside it and
must not be done again. The metadata "preprocess" says how to get to such inputs (height, width, channels, resize;
vocabulary, length); for images, "code" is Python that does it. "inputs" and "outputs" say what each array is for one
example, "task" what its predictions mean, and "classes" which class each number is for; where there is one input,
"rows" describes it, too. All of it is JSON.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.errors import MachineError
from suanli.core.schema import Schema
from suanli.core.storage import json_bytes
from suanli.machine.device import is_out_of_memory
from suanli.models import build
from suanli.models.model_folder import SavedModel

if TYPE_CHECKING:
    import torch
    from torch import nn

XML = "model.xml"
ABOUT = "As the first half of preprocessing leaves it; the second half, such as normalising, is inside the graph."

# --- reading, without suanli: sources that set `metadata`, and `answer`, a function from arrays by name to those of
# job["outputs"] in this order ---

READ_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
answer = lambda arrays: session.run(job["outputs"], arrays)
"""
READ_OPENVINO = f"""
sys.modules["openvino_telemetry"] = None  # else the import is reported to a server
import openvino
core = openvino.Core()
model = core.read_model(path + "/{XML}")
metadata = {{name: model.get_rt_info([name]).value for name in job["metadata"]}}
compiled = core.compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
def answer(arrays):
    answers = compiled(arrays)
    return [numpy.array(answers[name]) for name in job["outputs"]]
"""
READ_PT2 = """
import torch
extra = {name + ".json": "" for name in job["metadata"]}
module = torch.export.load(path, extra_files=extra).module()
metadata = {name.removesuffix(".json"): text for name, text in extra.items()}
def answer(arrays):
    answers = module(*map(torch.from_numpy, arrays.values()))
    return [part.numpy() for part in (answers if isinstance(answers, tuple) else [answers])]
"""
READ_LITERT = """
from ai_edge_litert import schema_py_generated
from ai_edge_litert.interpreter import Interpreter
model = schema_py_generated.ModelT.InitFromPackedBuf(open(path, "rb").read())
metadata = {item.name.decode(): bytes(model.buffers[item.buffer].data).decode() for item in model.metadata}
runner = Interpreter(path).get_signature_runner()
def answer(arrays):
    count = len(next(iter(arrays.values())))
    answers = [
        runner(**{f"args_{place}": array[i : i + 1] for place, array in enumerate(arrays.values())})
        for i in range(count)
    ]
    return [numpy.concatenate([one[f"output_{place}"] for one in answers]) for place in range(len(job["outputs"]))]
"""
READ_SAFETENSORS = """
import hashlib
import torch
from safetensors import safe_open
with safe_open(path, framework="pt") as file:
    metadata = file.metadata()
    for name in file.keys():
        tensor = file.get_tensor(name)
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        tensors[name] = [str(tensor.dtype), list(tensor.shape), hashlib.blake2b(content).hexdigest()]
answer = None
"""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    suffix: str  # of the file, after the name of the run
    packages: tuple[str, ...]  # what writes and reads it, besides suanli's own requirements
    extra: str = "engines"  # of suanli, that brings these
    write: Callable[[SavedModel, Path, Mapping[str, str]], None]  # model, path, metadata
    read: str  # source that reads it
    usage: str  # how to use it, in one line; {path} is the file, {feed} a dict of arrays, {tensors} a call's arguments
    is_folder: bool = False
    has_graph: bool = True  # False: weights alone


def build_metadata(saved: SavedModel, export_format: ExportFormat) -> dict[str, str]:
    """What the file says about itself; values are JSON."""
    task, preprocess = saved.task, saved.preprocess
    values: dict[str, object] = {
        "task": {"name": task.name, "settings": task.settings},
        "preprocess": preprocess.to_json(),
    }
    if task.classes:
        values["classes"] = list(task.classes)
    if export_format.has_graph:
        values["inputs"], values["outputs"] = _describe(preprocess.inputs), _describe(task.outputs)
        if preprocess.encoding_code is not None:
            values["code"] = preprocess.encoding_code
        if len(preprocess.inputs) == 1:  # as earlier versions said it
            (column,) = preprocess.inputs.values()
            values["rows"] = {"shape": list(column.shape), "dtype": column.dtype, "about": ABOUT}
    else:
        values["model_args"] = build.builder_arguments(saved.recipe, preprocess, task)
    texts = {name: json_bytes(value).decode().strip() for name, value in values.items()}
    return texts if export_format.has_graph else texts | {"model": saved.recipe.model, "format": "pt"}


def _describe(schema: Schema) -> dict[str, object]:
    return {name: {"shape": list(one.shape), "dtype": one.dtype, "role": one.role} for name, one in schema.items()}


# --- writing ---


def _write_onnx(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    from suanli.engines.inference_module import write_onnx

    try:
        write_onnx(saved, path, metadata)
    except MachineError as error:
        fix = "Choose another format: --to pt2 needs no ONNX, --to safetensors holds the weights alone."
        raise MachineError(error.message, fix=fix) from error


def _write_openvino(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    from suanli.engines.backends.openvino import import_openvino, openvino_core
    from suanli.engines.inference_module import innermost_cause

    onnx_path = path.with_suffix(".onnx")
    _write_onnx(saved, onnx_path, {})
    graph = onnx_path.read_bytes()
    onnx_path.unlink()
    openvino = import_openvino()
    fix = "Choose another format: --to onnx or pt2."
    try:
        model = openvino_core().read_model(graph)
    except RuntimeError as error:
        raise MachineError(f"OpenVINO can't take this network ({innermost_cause(error)}).", fix=fix) from error
    for name, text in metadata.items():
        model.set_rt_info(text, [name])
    path.mkdir()
    try:
        openvino.save_model(model, path / XML, compress_to_fp16=False)
    except RuntimeError as error:
        (path / XML).write_bytes(graph)  # of the same size: raises an error that says so if the disk is the reason
        raise MachineError(f"OpenVINO can't write this network ({innermost_cause(error)}).", fix=fix) from error


def _write_pt2(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    import torch

    from suanli.engines.inference_module import EXAMPLES, example_tensors, free_batch, innermost_cause

    module = _plain_module(saved)
    tensors = example_tensors(saved.preprocess, EXAMPLES)
    stream = io.BytesIO()  # written to disk by Python, whose errors say what is wrong with the disk
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module(*tensors)  # constants that the first call caches must not be created while exporting
            program = torch.export.export(module, tensors, dynamic_shapes=free_batch(saved.preprocess))
            for part in program.graph_module.modules():
                for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # names files of this machine
            extra = {f"{name}.json": text for name, text in metadata.items()}
            torch.export.save(program, stream, extra_files=extra)
    except Exception as error:  # a user's network may raise anything while it is traced
        if is_out_of_memory(error):
            raise
        raise MachineError(
            f"This network can't be written as a program of torch.export ({innermost_cause(error)}).",
            fix="Choose another format: --to safetensors holds the weights alone.",
        ) from error
    path.write_bytes(stream.getbuffer())


def _write_litert(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    import flatbuffers
    import litert_torch
    import torch
    from ai_edge_litert import schema_py_generated as schema

    from suanli.engines.inference_module import example_tensors, innermost_cause

    module = _plain_module(saved).eval()
    tensors = example_tensors(saved.preprocess, 1)
    try:
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            module(*tensors)  # constants that the first call caches must not be created while exporting
            litert_torch.convert(module, tensors).export(str(path))
    except Exception as error:  # a user's network may raise anything while it is traced
        if is_out_of_memory(error):
            raise
        raise MachineError(
            f"This network can't be written as LiteRT ({innermost_cause(error)}).",
            fix="Choose another format: --to onnx, or --to safetensors for the weights alone.",
        ) from error
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    for name, text in metadata.items():
        buffer, item = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(text.encode(), np.uint8)
        item.name, item.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or []), item]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())


def _plain_module(saved: SavedModel) -> nn.Module:
    """One that gives a single output as it is, several as a tuple."""
    from torch import nn

    from suanli.engines.inference_module import InferenceModule

    class Single(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module.eval()

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            (answer,) = self.module(*tensors)
            return answer  # type: ignore[no-any-return]

    module = InferenceModule(saved)
    return Single(module) if len(module.outputs) == 1 else module


def _write_safetensors(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    state = {name: value.contiguous().clone() for name, value in saved.module.state_dict().items()}
    path.write_bytes(save(state, metadata=dict(metadata)))


FORMATS = {
    "onnx": ExportFormat(
        suffix=".onnx",
        packages=("onnx", "onnxscript", "onnxruntime"),
        write=_write_onnx,
        read=READ_ONNX,
        usage="onnxruntime.InferenceSession({path!r}).run(None, {feed}){first}, {inputs}",
    ),
    "openvino": ExportFormat(
        suffix="-openvino",
        packages=("onnx", "onnxscript", "openvino"),
        write=_write_openvino,
        read=READ_OPENVINO,
        usage=f"openvino.compile_model({{path!r}} + '/{XML}', 'CPU')({{feed}}){{first}}, {{inputs}}",
        is_folder=True,
    ),
    "pt2": ExportFormat(
        suffix=".pt2",
        packages=(),
        write=_write_pt2,
        read=READ_PT2,
        usage="torch.export.load({path!r}).module()({tensors}), {inputs}",
    ),
    "litert": ExportFormat(
        suffix=".tflite",
        packages=("litert_torch", "ai_edge_litert"),
        extra="litert",
        write=_write_litert,
        read=READ_LITERT,
        usage="ai_edge_litert.interpreter.Interpreter({path!r}).get_signature_runner()({arguments}), {inputs}, B = 1",
    ),
    "safetensors": ExportFormat(
        suffix=".safetensors",
        packages=(),
        write=_write_safetensors,
        read=READ_SAFETENSORS,
        has_graph=False,
        usage="safetensors.torch.load_file({path!r}), for the network {model} that the metadata tells how to build",
    ),
}
