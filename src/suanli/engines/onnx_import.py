"""An ONNX file from any framework, brought into the form that engines are built from: rows in, probabilities out.

What the file takes is found out from its input: pictures (B, C, H, W) or (B, H, W, C), which get normalising put in
front, or the rows of a file that `suanli export` wrote, which has that inside. What it gives are logits or
probabilities (B, K); a softmax is put behind the former. The batch has to be free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suanli.core.errors import DamagedFile, DataError, MachineError, UsageError, first_line, pip_install
from suanli.core.registry import load as load_plugin
from suanli.core.types import Preprocess
from suanli.models.model_folder import build_preprocess

CHANNELS = (1, 3)
SHAPERS = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Clip")  # keep probabilities as they are
MOST = 4096  # px of a side
FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}  # numbers of ONNX's types


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A file as it was understood."""

    graph: Any  # onnx.ModelProto from rows (B, *row_shape) to probabilities (B, K)
    preprocess: Preprocess
    classes: tuple[str, ...] | None  # as its metadata name them; None: it doesn't say
    count: int  # of classes


def read(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImportedModel:
    """The graph in an .onnx file, with what it needs in front and behind.

    `size` (height, width) where the file leaves it open; `mean` and `std` per channel as the network learned with
    them, where white is 1 (default: inputs in 0 to 1). Raises DamagedFile for what isn't a whole ONNX file, DataError
    for a graph of another form, UsageError for options that don't fit it, MachineError without the package onnx.
    """
    model = _loaded(path)
    given, result = _one(path, "input", _inputs(model)), _one(path, "output", model.graph.output)
    _free_batch(path, given, result)
    about = {prop.key: prop.value for prop in model.metadata_props}
    count = _classes(path, result)
    _softmax(model, result.name)
    _out_of_the_way(model, {given.name, result.name})
    if {"preprocess", "rows"} <= about.keys() and given.type.tensor_type.elem_type not in FLOATS:
        if size is not None or mean is not None or std is not None:
            raise UsageError(f"{path} brings its own size, mean and std.", fix="Leave the options out.")
        preprocess = _own_preprocess(path, about, _shape(given))
        _renamed(model, given.name, result)
    else:
        preprocess = _in_front(path, model, given, size, mean, std)
        _renamed(model, "rows", result)
    return ImportedModel(graph=model, preprocess=preprocess, classes=_names(about, count), count=count)


def _loaded(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        fix = f"Install it: {pip_install('suanli[engines]')}"
        raise MachineError("An ONNX file needs the package onnx.", fix=fix) from error
    if not path.is_file():
        raise DataError(f"There is nothing at {path}.", fix="Give the path of an .onnx file.")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:  # the second one: weights in another file
        raise DamagedFile(
            f"{path} can't be read ({first_line(error, 200)}).",
            fix="Export it again; weights in files of their own must lie beside it.",
        ) from error
    except Exception as error:
        if "DecodeError" not in type(error).__name__:  # protobuf's, whose place differs between its versions
            raise
        raise DamagedFile(f"{path} is not a whole ONNX file.", fix="Export it again, or copy it again.") from error
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise DataError(
                f"{path} is of opset {opset.version}; the package onnx here knows up to {newest}.",
                fix=f"Export it with an older opset, or renew the package: {pip_install('--upgrade', 'onnx')}",
            )
    return model


def _inputs(model: Any) -> list[Any]:
    """Without weights, which old files list, too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _one(path: Path, what: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        names = ", ".join(value.name for value in values) or "none"
        raise DataError(
            f"{path} has {len(values)} {what}s ({names}); one is needed.",
            fix=f"Export the network with the one {what} that matters.",
        )
    return values[0]


def _shape(value: Any) -> list[int | None]:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _free_batch(path: Path, given: Any, result: Any) -> None:
    for value in (given, result):
        shape = _shape(value)
        if shape and shape[0] is not None:
            raise DataError(
                f"{path} takes batches of {shape[0]} only.", fix="Export it with a batch size that is left open."
            )


def _classes(path: Path, result: Any) -> int:
    shape = _shape(result)
    if len(shape) != 2 or shape[1] is None or shape[1] < 2:
        raise DataError(
            f"{path} gives {_told(shape)}, not one number for each of some classes.",
            fix="Export a classifier that gives (batch, classes).",
        )
    return shape[1]


def _told(shape: Sequence[int | None]) -> str:
    return f"({', '.join('?' if n is None else str(n) for n in shape)})"


def _softmax(model: Any, name: str) -> None:
    """Puts a softmax behind logits."""
    import onnx

    graph = model.graph
    last = next((node for node in graph.node if name in node.output), None)
    while last is not None and last.op_type in SHAPERS:
        last = next((node for node in graph.node if last.input[0] in node.output), None)
    if last is not None and last.op_type == "Softmax":
        return
    if last is not None and last.op_type in ("Sigmoid", "LogSoftmax"):
        raise DataError(
            f"The graph ends in {last.op_type}; logits, or probabilities that sum to 1, are needed.",
            fix="Export the network without its last operation.",
        )
    for node in graph.node:
        for place, output in enumerate(node.output):
            if output == name:
                node.output[place] = f"{name}_logits"
        for place, taken in enumerate(node.input):
            if taken == name:
                node.input[place] = f"{name}_logits"
    graph.node.append(onnx.helper.make_node("Softmax", [f"{name}_logits"], [name], axis=1))


def _in_front(
    path: Path,
    model: Any,
    given: Any,
    size: tuple[int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocess:
    """Puts uint8 rows (B, H, W, C), their cast, normalising and transposing before the input."""
    import onnx

    number = given.type.tensor_type.elem_type
    shape = _shape(given)
    first = len(shape) == 4 and shape[1] in CHANNELS
    if number not in FLOATS or len(shape) != 4 or not (first or shape[3] in CHANNELS):
        kind = onnx.TensorProto.DataType.Name(number)
        raise DataError(
            f"{path} takes {kind} {_told(shape)}; pictures as floats (batch, channels, height, width) or "
            "(batch, height, width, channels) are needed.",
            fix="Export the network with such an input; with data of another kind, only what suanli exported.",
        )
    channels = shape[1] if first else shape[3]
    assert channels is not None
    open_sides = shape[2:] if first else shape[1:3]
    sides = [n for n in open_sides if n is not None]
    if len(sides) < 2 and size is None:
        raise UsageError(f"{path} leaves the size of pictures open.", fix="Give it: --size 224, or --size 224x160.")
    if size is not None and any(a is not None and a != b for a, b in zip(open_sides, size, strict=True)):
        raise UsageError(f"{path} takes pictures of {_told(open_sides)}, not {size}.", fix="Leave --size out.")
    height, width = size or (sides[0], sides[1])
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) != channels:
            raise UsageError(f"{name} has {len(values)} numbers; there are {channels} channels.", fix="One for each.")
    if not np.isfinite([*(mean or ()), *(std or ())]).all():
        raise UsageError("--mean and --std have to be finite numbers.", fix="Such as 0.485,0.456,0.406.")
    if std is not None and min(std) <= 0:
        raise UsageError(
            "--std has to be above 0.", fix="Give what the network learned with, such as 0.229,0.224,0.225."
        )
    spread, centre = np.asarray(std or [1.0] * channels), np.asarray(mean or [0.0] * channels)
    graph, helper = model.graph, onnx.helper
    constants = {
        "suanli_scale": (1 / (255 * spread)).astype(np.float32),
        "suanli_shift": (-centre / spread).astype(np.float32),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    places = [0, 3, 1, 2] if first else [0, 1, 2, 3]
    before = [
        helper.make_node("Cast", ["rows"], ["suanli_float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["suanli_float", "suanli_scale"], ["suanli_scaled"]),
        helper.make_node("Add", ["suanli_scaled", "suanli_shift"], ["suanli_normal"]),
        helper.make_node("Transpose", ["suanli_normal"], ["suanli_placed"], perm=places),
        helper.make_node("Cast", ["suanli_placed"], [given.name], to=number),
    ]
    for place, node in enumerate(before):
        graph.node.insert(place, node)
    batch = given.type.tensor_type.shape.dim[0].dim_param or "batch"
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.UINT8, [batch, height, width, channels])
    kept = [value for value in graph.input if value.name != given.name]
    del graph.input[:]
    graph.input.extend([rows, *kept])
    kind = load_plugin("preprocess", "image")
    preprocess: Preprocess = kind(
        height=height,
        width=width,
        channels=channels,
        mean=tuple(mean) if mean is not None else None,
        std=tuple(std) if std is not None else None,
    )
    return preprocess


def _own_preprocess(path: Path, about: dict[str, str], shape: Sequence[int | None]) -> Preprocess:
    try:
        preprocess = build_preprocess(json.loads(about["preprocess"]))
        if list(preprocess.row_shape) != list(shape[1:]) or max(preprocess.row_shape) > MOST:
            raise ValueError(f"rows of {preprocess.row_shape}, the input is {_told(shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise DamagedFile(
            f"The metadata of {path} can't be used ({first_line(error, 200)}).", fix="Export it again."
        ) from error
    return preprocess


def _out_of_the_way(model: Any, ends: set[str]) -> None:
    """Inner values that are called as the ends will be get another name."""
    names = {name: f"{name}_inner" for name in ("rows", "probabilities") if name not in ends}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.initializer, *model.graph.value_info):
        value.name = names.get(value.name, value.name)


def _renamed(model: Any, given: str, result: Any) -> None:
    """The graph's ends get the names that engines know: rows and probabilities."""
    names = {given: "rows", result.name: "probabilities"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)


def _names(about: dict[str, str], count: int) -> tuple[str, ...] | None:
    try:
        names = tuple(str(name) for name in json.loads(about["classes"]))
    except (KeyError, ValueError, TypeError):
        return None
    return names if len(names) == count else None
