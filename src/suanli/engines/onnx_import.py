"""An ONNX file from any framework, made into a graph that engines are built from: rows in, probabilities out.

Its input says what the file takes: pictures (B, C, H, W) or (B, H, W, C), in front of which normalising is put, or the
rows of a file that `suanli export` wrote, which has that inside. Its output is logits or probabilities (B, K); logits
get a softmax. The batch size has to be free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.errors import DamagedFile, DataError, MachineError, UsageError, first_line, pip_install
from suanli.core.registry import load as load_plugin
from suanli.core.types import Preprocess
from suanli.models.model_folder import build_preprocess

if TYPE_CHECKING:
    import onnx

CHANNELS = (1, 3)
KEEP_PROBABILITIES = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Clip")  # what may follow them
MAX_SIDE = 4096  # px
FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}  # by the numbers of ONNX's types

Shape = list[int | None]  # None: left open


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    graph: onnx.ModelProto  # from rows (B, *row_shape) to probabilities (B, K)
    preprocess: Preprocess
    classes: tuple[str, ...] | None  # the names in its metadata; None: it has none
    count: int  # of classes


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """What the user says about the pictures that a network takes."""

    size: tuple[int, int] | None  # height and width, where the file leaves them open
    mean: Sequence[float] | None  # per channel, in training, where white is 1
    std: Sequence[float] | None


def read(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImportedModel:
    """The graph in an .onnx file, with what it needs in front and behind.

    `size` (height, width) where the file leaves it open; `mean` and `std` per channel that the network was trained
    with, where white is 1 (default: inputs in 0 to 1). Raises DamagedFile for what isn't a complete ONNX file,
    DataError for a graph of another form, UsageError for options that don't fit it, MachineError without the package
    onnx.
    """
    model = _load(path)
    source = _single(path, "input", _inputs(model))
    result = _single(path, "output", model.graph.output)
    _check_free_batch(path, source, result)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    count = _count_classes(path, result)
    exported = {"preprocess", "rows"} <= metadata.keys() and source.type.tensor_type.elem_type not in FLOATS
    # First other names for inner values that have the names of the ends.
    names = {name: f"{name}_inner" for name in ("rows", "logits", "probabilities")}
    names |= {source.name: "rows" if exported else "suanli_input", result.name: "probabilities"}
    _rename_values(model, names)
    _append_softmax(model)
    if exported:
        if size is not None or mean is not None or std is not None:
            raise UsageError(f"{path} brings its own size, mean and std.", fix="Leave the options out.")
        preprocess = _read_preprocess(path, metadata, _shape(source))
    else:
        preprocess = _prepend_preprocess(path, model, source, InputOptions(size=size, mean=mean, std=std))
    return ImportedModel(graph=model, preprocess=preprocess, classes=_class_names(metadata, count), count=count)


def _load(path: Path) -> onnx.ModelProto:
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
    except (OSError, ValueError, onnx.checker.ValidationError) as error:  # ValueError: weights in another file
        raise DamagedFile(
            f"{path} can't be read ({first_line(error, 200)}).",
            fix="Export it again; weights in files of their own must lie beside it.",
        ) from error
    except Exception as error:
        if "DecodeError" not in type(error).__name__:  # protobuf's, whose module differs between its versions
            raise
        raise DamagedFile(f"{path} is not a complete ONNX file.", fix="Export it again, or copy it again.") from error
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise DataError(
                f"{path} is of opset {opset.version}; the package onnx here knows up to {newest}.",
                fix=f"Export it with an older opset, or renew the package: {pip_install('--upgrade', 'onnx')}",
            )
    return model


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs without the weights, which old files list, too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _single(path: Path, what: str, values: Sequence[onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    if len(values) != 1:
        names = ", ".join(value.name for value in values) or "none"
        raise DataError(
            f"{path} has {len(values)} {what}s ({names}); one is needed.",
            fix=f"Export the network with the one {what} that matters.",
        )
    return values[0]


def _shape(value: onnx.ValueInfoProto) -> Shape:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _check_free_batch(path: Path, *values: onnx.ValueInfoProto) -> None:
    for value in values:
        shape = _shape(value)
        if shape and shape[0] is not None:
            raise DataError(
                f"{path} takes batches of {shape[0]} only.", fix="Export it with a batch size that is left open."
            )


def _count_classes(path: Path, result: onnx.ValueInfoProto) -> int:
    shape = _shape(result)
    if len(shape) != 2 or shape[1] is None or shape[1] < 2:
        raise DataError(
            f"{path} gives {_format(shape)}, not one number for each of some classes.",
            fix="Export a classifier that gives (batch, classes).",
        )
    return shape[1]


def _format(shape: Sequence[int | None]) -> str:
    return f"({', '.join('?' if n is None else str(n) for n in shape)})"


def _append_softmax(model: onnx.ModelProto) -> None:
    """Puts a softmax behind the output, unless it is probabilities already."""
    import onnx

    graph = model.graph
    last = next((node for node in graph.node if "probabilities" in node.output), None)
    while last is not None and last.op_type in KEEP_PROBABILITIES:
        last = next((node for node in graph.node if last.input[0] in node.output), None)
    if last is not None and last.op_type == "Softmax":
        return
    if last is not None and last.op_type in ("Sigmoid", "LogSoftmax"):
        raise DataError(
            f"The graph ends in {last.op_type}; logits, or probabilities that sum to 1, are needed.",
            fix="Export the network without its last operation.",
        )
    for node in graph.node:
        _rename_in_node(node, {"probabilities": "logits"})
    graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))


def _prepend_preprocess(
    path: Path, model: onnx.ModelProto, source: onnx.ValueInfoProto, options: InputOptions
) -> Preprocess:
    """Puts uint8 rows (B, H, W, C), their cast, normalising and transposing in front of the input."""
    height, width, channels = _picture_shape(path, source, options.size)
    _check_statistics(options, channels)
    _prepend_nodes(model, source, (height, width, channels), options)
    preprocess: Preprocess = load_plugin("preprocess", "image")(
        height=height,
        width=width,
        channels=channels,
        mean=None if options.mean is None else tuple(options.mean),
        std=None if options.std is None else tuple(options.std),
    )
    return preprocess


def _picture_shape(path: Path, source: onnx.ValueInfoProto, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Height, width and channels of the pictures that it takes."""
    import onnx

    shape, number = _shape(source), source.type.tensor_type.elem_type
    if number not in FLOATS or len(shape) != 4 or not (_has_channels_first(shape) or shape[3] in CHANNELS):
        kind = onnx.TensorProto.DataType.Name(number)
        raise DataError(
            f"{path} takes {kind} {_format(shape)}; pictures as floats (batch, channels, height, width) or "
            "(batch, height, width, channels) are needed.",
            fix="Export the network with such an input; for data of another kind, only files that suanli exported fit.",
        )
    channels, sides = (shape[1], shape[2:]) if _has_channels_first(shape) else (shape[3], shape[1:3])
    assert channels is not None
    if size is not None and any(side is not None and side != n for side, n in zip(sides, size, strict=True)):
        raise UsageError(f"{path} takes pictures of {_format(sides)}, not {size}.", fix="Leave --size out.")
    height, width = size or sides
    if height is None or width is None:
        raise UsageError(f"{path} leaves the size of pictures open.", fix="Give it: --size 224, or --size 224x160.")
    return height, width, channels


def _has_channels_first(shape: Shape) -> bool:
    return len(shape) == 4 and shape[1] in CHANNELS


def _check_statistics(options: InputOptions, channels: int) -> None:
    for name, values in (("--mean", options.mean), ("--std", options.std)):
        if values is not None and len(values) != channels:
            raise UsageError(f"{name} has {len(values)} numbers; there are {channels} channels.", fix="One for each.")
    if not np.isfinite([*(options.mean or ()), *(options.std or ())]).all():
        raise UsageError("--mean and --std have to be finite numbers.", fix="Such as 0.485,0.456,0.406.")
    if options.std is not None and min(options.std) <= 0:
        raise UsageError(
            "--std has to be above 0.", fix="Give what the network was trained with, such as 0.229,0.224,0.225."
        )


def _prepend_nodes(
    model: onnx.ModelProto, source: onnx.ValueInfoProto, picture: tuple[int, int, int], options: InputOptions
) -> None:
    import onnx

    graph, helper = model.graph, onnx.helper
    channels = picture[2]
    std, mean = np.asarray(options.std or [1.0] * channels), np.asarray(options.mean or [0.0] * channels)
    constants = {
        "suanli_scale": (1 / (255 * std)).astype(np.float32),
        "suanli_shift": (-mean / std).astype(np.float32),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    order = [0, 3, 1, 2] if _has_channels_first(_shape(source)) else [0, 1, 2, 3]
    nodes = [
        helper.make_node("Cast", ["rows"], ["suanli_float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["suanli_float", "suanli_scale"], ["suanli_scaled"]),
        helper.make_node("Add", ["suanli_scaled", "suanli_shift"], ["suanli_normal"]),
        helper.make_node("Transpose", ["suanli_normal"], ["suanli_placed"], perm=order),
        helper.make_node("Cast", ["suanli_placed"], [source.name], to=source.type.tensor_type.elem_type),
    ]
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)
    batch = source.type.tensor_type.shape.dim[0].dim_param or "batch"
    rows = helper.make_tensor_value_info("rows", onnx.TensorProto.UINT8, [batch, *picture])
    others = [value for value in graph.input if value.name != source.name]
    del graph.input[:]
    graph.input.extend([rows, *others])


def _read_preprocess(path: Path, metadata: dict[str, str], shape: Shape) -> Preprocess:
    try:
        preprocess = build_preprocess(json.loads(metadata["preprocess"]))
        if list(preprocess.row_shape) != shape[1:] or max(preprocess.row_shape) > MAX_SIDE:
            raise ValueError(f"rows of {preprocess.row_shape}, the input is {_format(shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise DamagedFile(
            f"The metadata of {path} can't be used ({first_line(error, 200)}).", fix="Export it again."
        ) from error
    return preprocess


def _rename_values(model: onnx.ModelProto, names: dict[str, str]) -> None:
    """Gives values of the graph, its inputs and outputs among them, other names."""
    graph = model.graph
    for node in graph.node:
        _rename_in_node(node, names)
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)


def _rename_in_node(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]


def _class_names(metadata: dict[str, str], count: int) -> tuple[str, ...] | None:
    try:
        names = tuple(str(name) for name in json.loads(metadata["classes"]))
    except (KeyError, ValueError, TypeError):
        return None
    return names if len(names) == count else None
