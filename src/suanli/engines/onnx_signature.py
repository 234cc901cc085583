"""What an ONNX graph takes and gives: names, types and shapes, with a name for every size that is left open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from suanli.core.errors import DataError
from suanli.core.schema import Column

if TYPE_CHECKING:
    import onnx

CHANNELS = (1, 3)  # of pictures
FLOATS = ("float32", "float16", "float64")
TYPES = (*FLOATS, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))

UNNAMED = ("", "?", "-1", "None")  # what exporters write for a size without a name, or a number below 1

Dimension: TypeAlias = int | str  # a size, or the name of one that is left open; equal names are equal sizes


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """One input or output."""

    name: str
    dtype: str  # NumPy's name
    shape: tuple[Dimension, ...] | None  # None: the file doesn't say

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def is_picture(self) -> bool:
        """Whether it may be pictures: floats (B, C, H, W) or (B, H, W, C), with one or three channels."""
        shape = self.shape or ()
        return len(shape) == 4 and self.is_float and (has_channels_first(self) or shape[3] in CHANNELS)

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the open sizes are these."""
        return tuple(sizes[side] if isinstance(side, str) else side for side in self.shape or ())

    def column(self, *, leading: int) -> Column:
        """Without the first `leading` axes, which don't belong to one example."""
        sides = tuple(None if isinstance(side, str) else side for side in (self.shape or ())[leading:])
        return Column(shape=sides, dtype=self.dtype, role="value")


def has_channels_first(picture: TensorType) -> bool:
    return (picture.shape or ())[1:2] in ((1,), (3,))


@dataclass(frozen=True, kw_only=True)
class Signature:
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    @property
    def tensors(self) -> tuple[TensorType, ...]:
        return (*self.inputs, *self.outputs)

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """The names of those that inputs leave open, in order."""
        return tuple(dict.fromkeys(s for tensor in self.inputs for s in tensor.shape or () if isinstance(s, str)))

    def with_ranks(self, ranks: Mapping[str, int]) -> Signature:
        """With so many open sizes of the outputs whose shapes the file doesn't say."""
        outputs = [
            replace(tensor, shape=tuple(f"{tensor.name}_{axis}" for axis in range(ranks[tensor.name])))
            if tensor.shape is None
            else tensor
            for tensor in self.outputs
        ]
        return replace(self, outputs=tuple(outputs))

    @property
    def takes_pictures(self) -> bool:
        return len(self.inputs) == 1 and self.inputs[0].is_picture

    @property
    def may_batch(self) -> bool:
        """Whether the first axis of every input and output is open, so that it may count examples."""
        firsts = {tensor.shape[0] if tensor.shape else None for tensor in self.inputs}
        return all(isinstance(first, str) for first in firsts) and all(
            tensor.shape is None or (tensor.shape and isinstance(tensor.shape[0], str)) for tensor in self.outputs
        )

    @property
    def is_batch_of_one(self) -> bool:
        """Whether the first axis of every input and output is fixed to one example."""
        return all(tensor.shape is not None and tensor.shape[:1] == (1,) for tensor in self.tensors)


def read_signature(path: Path, model: onnx.ModelProto) -> Signature:
    """Names, in the model itself, every size that is left open: exporters write no name, "?", -1 or 0 for them. Raises
    DataError for inputs and outputs that aren't tensors of numbers."""
    weights = {tensor.name for tensor in model.graph.initializer}  # which old files list among the inputs
    ends = [[v for v in model.graph.input if v.name not in weights], list(model.graph.output)]
    inputs, outputs = (tuple(_read_tensor(path, value) for value in values) for values in ends)
    for what, tensors in (("input", inputs), ("output", outputs)):
        if not tensors:
            raise DataError(f"{path} has no {what}.", fix="Export the network again.")
    if any(side <= 0 for value in model.graph.value_info for side in _sizes(value)):
        del model.graph.value_info[:]  # only hints
    for tensor in inputs:
        if tensor.shape is None:
            raise DataError(
                f"{path} doesn't say which shape its input {tensor.name} has.",
                fix="Export it with the shapes of its inputs; sizes may be left open.",
            )
    return Signature(inputs=inputs, outputs=outputs)


def _read_tensor(path: Path, value: onnx.ValueInfoProto) -> TensorType:
    import onnx

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise DataError(
            f"{value.name} of {path} is a {(kind or 'value of no type').removesuffix('_type')}, not a tensor.",
            fix="Export the network with tensors alone (of scikit-learn: zipmap=False).",
        )
    tensor = value.type.tensor_type
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, ValueError):
        dtype = "nothing known"
    if dtype not in TYPES:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise DataError(f"{value.name} of {path} is {name}.", fix=f"Allowed are: {', '.join(TYPES)}.")
    if not tensor.HasField("shape"):
        return TensorType(name=value.name, dtype=dtype, shape=None)
    return TensorType(name=value.name, dtype=dtype, shape=tuple(_name_sizes(value)))


def _name_sizes(value: onnx.ValueInfoProto) -> list[Dimension]:
    sides: list[Dimension] = []
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if dim.dim_value <= 0 and dim.dim_param in UNNAMED:
            dim.dim_param = "batch" if axis == 0 else f"{value.name}_{axis}"
        sides.append(dim.dim_param or dim.dim_value)
    return sides


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]


def format_inputs(tensors: Sequence[TensorType]) -> str:
    """Such as "x float32 (batch, 3, height, width)"."""
    return ", ".join(f"{t.name} {t.dtype} ({', '.join(map(str, t.shape or ()))})" for t in tensors)
