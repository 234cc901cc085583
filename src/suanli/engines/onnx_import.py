"""An ONNX file from any framework, made into a graph that engines are built from.

Three kinds of files become three kinds of graphs. The arrays of all have an axis in front that counts examples.

- What `suanli export` wrote takes encoded inputs and brings its preprocessing, classes and task.
- A network for pictures, (B, C, H, W) or (B, H, W, C), gets normalising in front, so that it takes uint8 pixels. One
  that gives (B, K) is a classifier: logits get a softmax.
- Any other takes and gives tensors as its signature says. Where it has no axis that counts examples, one of length 1 is
  put in front of every input and output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.errors import DamagedFile, DataError, MachineError, UsageError, first_line, pip_install
from suanli.core.registry import load as load_plugin
from suanli.core.schema import format_shape
from suanli.core.task import Task
from suanli.core.types import Preprocess
from suanli.engines import onnx_edit
from suanli.engines.onnx_probe import Answers
from suanli.engines.onnx_signature import Signature, TensorType, has_channels_first, read_signature
from suanli.models.model_folder import build_preprocess, build_task

if TYPE_CHECKING:
    import onnx

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # of operators that ONNX Runtime has
NOT_LOGITS = ("Sigmoid", "LogSoftmax")
MAX_SIDE = 4096  # px
OLD_INPUT = "rows"  # the name in graphs that older versions exported


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A complete ONNX file. In the model, too, every open size has a name."""

    path: Path
    model: onnx.ModelProto
    signature: Signature
    metadata: Mapping[str, str]

    @property
    def is_exported(self) -> bool:
        """Whether `suanli export` wrote it."""
        names = self.metadata.keys()
        return names >= {"preprocess", "task"} or (
            names >= {"preprocess", OLD_INPUT} and not self.signature.inputs[0].is_float
        )

    @property
    def is_picture_classifier(self) -> bool:
        """Whether it takes any number of pictures, and gives logits or probabilities of some classes."""
        signature = self.signature
        takes_pictures = signature.takes_pictures and signature.inputs[0].is_float and signature.may_batch
        last = onnx_edit.last_operation(self.model, signature.outputs[0].name)
        return takes_pictures and _count_classes(signature.outputs) > 0 and last not in NOT_LOGITS


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """What the user says about the pictures that a network takes."""

    size: tuple[int, int] | None = None  # height and width, where the file leaves them open
    mean: Sequence[float] | None = None  # per channel, in training, where white is 1
    std: Sequence[float] | None = None

    @property
    def any(self) -> bool:
        return self.size is not None or self.mean is not None or self.std is not None


@dataclass(frozen=True, kw_only=True)
class ImportedGraph:
    """From arrays by `preprocess.inputs` to arrays by `task.outputs`, with an axis in front that counts examples."""

    model: onnx.ModelProto
    preprocess: Preprocess
    task: Task
    batches: bool = True  # it takes any number of examples at once; else one
    has_class_names: bool = False  # those of the task are in the file; else they are numbers


def load(path: Path) -> OnnxFile:
    """Raises DamagedFile for what isn't a complete ONNX file, DataError for one that can't be run here, MachineError
    without the package onnx."""
    model = _load(path)
    _check_operators(path, model)
    signature = read_signature(path, model)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    return OnnxFile(path=path, model=model, signature=signature, metadata=metadata)


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
        _check(model)
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


def _check(model: onnx.ModelProto) -> None:
    """The package's own check, which demands shapes that runtimes don't need."""
    import onnx

    values = [value.type.tensor_type for value in (*model.graph.input, *model.graph.output)]
    shapeless = [tensor for tensor in values if tensor.elem_type and not tensor.HasField("shape")]
    for tensor in shapeless:
        tensor.shape.SetInParent()
    onnx.checker.check_model(model)
    for tensor in shapeless:
        tensor.ClearField("shape")


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    """Raises DataError for operators that no engine here has."""
    own = {function.domain for function in model.functions}
    nodes = onnx_edit.nodes_of(model.graph)
    custom = sorted({f"{n.domain}.{n.op_type}" for n in nodes if n.domain not in (*STANDARD_DOMAINS, *own)})
    if custom:
        raise DataError(
            f"{path} has operators that aren't standard: {', '.join(custom[:5])}{', …' if custom[5:] else ''}.",
            fix=f"Export it with standard operators; allowed are those of {', '.join(STANDARD_DOMAINS[1:])}.",
        )


def _count_classes(outputs: Sequence[TensorType]) -> int:
    """The length K of the single output (B, K) of floats; 0: it isn't one that may be classes."""
    shape = outputs[0].shape or ()
    if len(outputs) != 1 or not outputs[0].is_float or len(shape) != 2:
        return 0
    return shape[1] if isinstance(shape[1], int) and shape[1] > 1 else 0


# --- exported by suanli ---


def import_exported(file: OnnxFile, options: PictureOptions) -> ImportedGraph:
    """A graph that `suanli export` wrote. Raises DamagedFile where its metadata doesn't fit it."""
    if options.any:
        raise UsageError(f"{file.path} has its own size, mean and std.", fix="Leave the options out.")
    try:
        preprocess = build_preprocess(json.loads(file.metadata["preprocess"]))
        inputs = {tensor.name: tensor for tensor in file.signature.inputs}
        if OLD_INPUT in inputs and len(inputs) == len(preprocess.inputs) == 1:
            (name,) = preprocess.inputs
            _rename(file.model, {OLD_INPUT: name})
            inputs = {name: inputs[OLD_INPUT]}
        _check_inputs(preprocess, inputs)
        task = _read_task(file)
        if task.outputs.keys() != {tensor.name for tensor in file.signature.outputs}:
            raise ValueError(f"outputs {', '.join(task.outputs)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise DamagedFile(
            f"The metadata of {file.path} can't be used ({first_line(error, 200)}).", fix="Export it again."
        ) from error
    has_names = bool(_class_names(file.metadata, len(task.classes)))
    return ImportedGraph(model=file.model, preprocess=preprocess, task=task, has_class_names=has_names)


def _read_task(file: OnnxFile) -> Task:
    if "task" not in file.metadata:  # of an older version
        return _make_classification(file)
    about = json.loads(file.metadata["task"])
    return build_task(about["name"], json.loads(file.metadata.get("classes", "[]")), about["settings"])


def _check_inputs(preprocess: Preprocess, inputs: Mapping[str, TensorType]) -> None:
    for name, column in preprocess.inputs.items():
        tensor = inputs[name]
        if column.shape != tensor.column(leading=1).shape or max(column.fixed_shape, default=0) > MAX_SIDE:
            raise ValueError(f"{name} of {format_shape(column.shape)}, the input is {format_shape(tensor.shape or ())}")


def _class_names(metadata: Mapping[str, str], count: int) -> tuple[str, ...]:
    """Empty: the file has none, or none that fit."""
    try:
        names = tuple(str(name) for name in json.loads(metadata["classes"]))
    except (KeyError, ValueError, TypeError):
        return ()
    return names if len(names) == count else ()


# --- pictures ---


def import_pictures(file: OnnxFile, options: PictureOptions, *, batches: bool = True) -> ImportedGraph:
    """A graph for pictures, with what it needs in front; a classifier has a softmax behind it. Raises UsageError for
    options that don't fit it."""
    source = file.signature.inputs[0]
    height, width, channels = _picture_shape(file, options)
    is_classifier = file.is_picture_classifier
    result = file.signature.outputs[0].name
    _rename(
        file.model,
        {source.name: "suanli_input"} | ({result: "probabilities"} if is_classifier else {}),
        avoid=("image", "logits", "probabilities") if is_classifier else ("image",),
    )
    onnx_edit.prepend_pixels(
        file.model,
        "suanli_input",
        (height, width, channels),
        channels_first=has_channels_first(source),
        mean=options.mean,
        std=options.std,
    )
    preprocess: Preprocess = load_plugin("preprocess", "image")(
        height=height,
        width=width,
        channels=channels,
        mean=None if options.mean is None else tuple(options.mean),
        std=None if options.std is None else tuple(options.std),
    )
    if is_classifier:
        if onnx_edit.last_operation(file.model, "probabilities") != "Softmax":
            onnx_edit.append_softmax(file.model)
        task = _make_classification(file)
    else:
        task = _make_tensors(file.model, file.signature.outputs, leading=1)
    has_names = is_classifier and bool(_class_names(file.metadata, len(task.classes)))
    return ImportedGraph(model=file.model, preprocess=preprocess, task=task, batches=batches, has_class_names=has_names)


def _picture_shape(file: OnnxFile, options: PictureOptions) -> tuple[int, int, int]:
    """Height, width and channels of the pictures that it takes."""
    source, size = file.signature.inputs[0], options.size
    _, first, second, third = (side if isinstance(side, int) else None for side in source.shape or ())
    channels, sides = (first, (second, third)) if has_channels_first(source) else (third, (first, second))
    assert channels is not None
    if size is not None and any(side is not None and side != n for side, n in zip(sides, size, strict=True)):
        raise UsageError(f"{file.path} takes images of {format_shape(sides)}, not {size}.", fix="Leave --size out.")
    height, width = size or sides
    if height is None or width is None:
        raise UsageError(f"{file.path} leaves the size of images open.", fix="Give it: --size 224, or --size 224x160.")
    if max(height, width) > MAX_SIDE:
        raise UsageError(f"Images of {height}x{width} are too large.", fix=f"Give at most {MAX_SIDE} pixels a side.")
    _check_statistics(options, channels)
    return height, width, channels


def _check_statistics(options: PictureOptions, channels: int) -> None:
    for name, values in (("--mean", options.mean), ("--std", options.std)):
        if values is not None and len(values) != channels:
            raise UsageError(f"{name} has {len(values)} numbers; there are {channels} channels.", fix="One for each.")
    if not all(map(math.isfinite, [*(options.mean or ()), *(options.std or ())])):
        raise UsageError("--mean and --std have to be finite numbers.", fix="For example: 0.485,0.456,0.406.")
    if options.std is not None and min(options.std) <= 0:
        raise UsageError(
            "--std has to be above 0.", fix="Give what the network was trained with, such as 0.229,0.224,0.225."
        )


# --- tensors ---


def import_tensors(file: OnnxFile, *, batches: bool) -> ImportedGraph:
    """A graph that takes and gives tensors as they are. `batches`: the first axis of all counts examples."""
    has_axis = batches or file.signature.is_batch_of_one
    if not has_axis:
        onnx_edit.add_example_axis(file.model, [tensor.name for tensor in file.signature.inputs])
    columns = {tensor.name: tensor.column(leading=int(has_axis)) for tensor in file.signature.inputs}
    preprocess: Preprocess = load_plugin("preprocess", "tensors")(columns=columns)
    task = _make_tensors(file.model, file.signature.outputs, leading=int(has_axis))
    return ImportedGraph(model=file.model, preprocess=preprocess, task=task, batches=batches)


def choose_task(file: OnnxFile, graph: ImportedGraph, answers: Answers) -> ImportedGraph:
    """With the task that suits its answers: a single output (B, K) that is a softmax, or looks like one, is
    probabilities of classes; any others are tensors."""
    count = _count_classes(file.signature.outputs)
    name, column = next(iter(graph.task.outputs.items()))
    is_softmax = onnx_edit.last_operation(graph.model, name) == "Softmax" or name in answers.distributions
    if count and column.shape == (count,) and is_softmax:
        _rename(graph.model, {name: "probabilities"}, avoid=("probabilities",))
        task = _make_classification(file)
        return replace(graph, task=task, has_class_names=bool(_class_names(file.metadata, count)))
    return replace(graph, task=build_task("tensors", (), graph.task.settings | {"spreads": answers.spreads}))


def _make_tensors(model: onnx.ModelProto, outputs: Sequence[TensorType], *, leading: int) -> Task:
    """For the outputs as the model names them now."""
    names = [value.name for value in model.graph.output]
    columns = {name: tensor.column(leading=leading) for name, tensor in zip(names, outputs, strict=True)}
    task: Task = load_plugin("tasks", "tensors")(columns=columns)
    return task


def _make_classification(file: OnnxFile) -> Task:
    count = _count_classes(file.signature.outputs)
    classes = _class_names(file.metadata, count) or tuple(str(i) for i in range(count))
    return build_task("classification", classes, {})


def _rename(model: onnx.ModelProto, names: Mapping[str, str], *, avoid: Sequence[str] = ()) -> None:
    """Renames values; others that have the name of one of `avoid` get another."""
    onnx_edit.rename_values(model, {name: f"{name}_inner" for name in (*names.values(), *avoid)} | dict(names))
