"""What the tensors of a request mean to a model, and the tensors of its answer. No engine, no sockets.

Inputs are the columns that the model's preprocessing makes, or the raw inputs themselves as BYTES, in a tensor that is
named by their kind. Outputs are the columns that its task predicts, and texts. Where a column has names, Triton's
classification extension gives its likeliest entries as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suanli.core.errors import MachineError
from suanli.core.schema import Arrays, Column, Geometry, format_shape
from suanli.core.task import Task
from suanli.core.types import Preprocess, Raw
from suanli.serving.protocol import NAMES, InferRequest, Refusal, Tensor, bad_request

MAX_INPUTS = 4096  # of one request


def refuse_unservable(preprocess: Preprocess, task: Task) -> None:
    """Raises MachineError for a model whose inputs or outputs can't share memory or be tensors of the protocol."""
    for name, column in (*preprocess.inputs.items(), *task.outputs.items()):
        if None in column.shape:
            raise MachineError(
                f"{name} {format_shape(column.shape)} has no fixed size.",
                fix="Export the network with fixed sizes.",
            )
        if np.dtype(column.dtype) not in NAMES:
            raise MachineError(
                f"The protocol has no datatype for {name}, {column.dtype}.", fix="Export the network with another type."
            )


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor as clients see it; `shape` is that of one example."""

    name: str
    datatype: str
    shape: tuple[int, ...] = ()


class Signature:
    """The tensors that a model takes and gives. Made once, when it is loaded, since every request needs it."""

    def __init__(self, model: str, preprocess: Preprocess, task: Task) -> None:
        """`model` is its name, for messages."""
        self._model, self._preprocess, self._task = model, preprocess, task
        self._raw = preprocess.kind if preprocess.media_types or preprocess.takes_strings else None
        # The numbers of words aren't taken where the words are: clients would have to know the vocabulary.
        has_words = self._raw is not None and any(column.role == "tokens" for column in preprocess.inputs.values())
        self._columns = {} if has_words else {name: _Expected(c) for name, c in preprocess.inputs.items()}
        self._outputs = {name: _Expected(column) for name, column in task.outputs.items()}
        self._texts = tuple(name for name in task.text_outputs if name not in task.outputs)
        self.inputs = [TensorInfo(name=name, datatype=c.datatype, shape=c.shape) for name, c in self._columns.items()]
        if has_words:
            self.inputs = [TensorInfo(name=preprocess.kind, datatype="BYTES")]
        self.outputs = [
            *(TensorInfo(name=name, datatype=c.datatype, shape=c.shape) for name, c in self._outputs.items()),
            *(TensorInfo(name=name, datatype="BYTES") for name in self._texts),
        ]
        self._all = {info.name: 0 for info in self.outputs}

    # --- inputs ---

    def count_inputs(self, request: InferRequest) -> int:
        """How many examples a request holds. Raises Refusal(400), also for inputs that the model doesn't have."""
        tensors = request.inputs
        if not self._is_raw(tensors) and {tensor.name for tensor in tensors} != self._columns.keys():
            names = ", ".join(tensor.name[:40] for tensor in tensors)
            raise bad_request(f"Model {self._model} has {self._describe_inputs()}; the request has {names!r}.")
        counts = {_count(tensor) for tensor in tensors}
        if len(counts) > 1:
            sizes = ", ".join(f"{tensor.name!r} {_count(tensor)}" for tensor in tensors)
            raise bad_request(f"The inputs hold different numbers of examples: {sizes}.")
        count = counts.pop()
        if count > MAX_INPUTS:
            raise bad_request(f"{count} inputs are more than the {MAX_INPUTS} that one request may have.")
        return count

    def read_inputs(self, request: InferRequest) -> Arrays | Sequence[Raw]:
        """Encoded inputs (B, …), or raw inputs that have to be encoded. `count_inputs` has checked the names. Raises
        Refusal(400)."""
        first = request.inputs[0]
        if self._is_raw(request.inputs):
            if isinstance(first.data, list):
                return first.data
            expected = self._columns.get(first.name) if len(self._columns) == 1 else None
            if expected is None or not expected.fits(first.data):
                raws = self._preprocess.split_batch(first.data)
                if raws is None:
                    raise self._bad_tensor(first, expected, takes_raw=True)
                return raws
        inputs: dict[str, np.ndarray] = {}
        for tensor in request.inputs:
            expected = self._columns[tensor.name]
            if isinstance(tensor.data, list) or not expected.fits(tensor.data):
                raise self._bad_tensor(tensor, expected, takes_raw=False)
            expected.check_values(tensor.name, tensor.data)
            inputs[tensor.name] = tensor.data
        return inputs

    def _is_raw(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is the tensor of raw inputs, which in a raw binary request has no name."""
        return self._raw is not None and len(tensors) == 1 and tensors[0].name in (self._raw, "")

    def _describe_inputs(self) -> str:
        names = [*self._columns] if self._raw in self._columns or self._raw is None else [*self._columns, self._raw]
        if len(names) == 1:
            return f"one input, {names[0]!r}"
        return f"the inputs {', '.join(map(repr, self._columns))}" + (f", or {self._raw!r}" if self._raw else "")

    def _bad_tensor(self, tensor: Tensor, expected: _Expected | None, *, takes_raw: bool) -> Refusal:
        kinds = [] if expected is None else [f"{expected.datatype} {[-1, *expected.shape]}"]
        kinds += ["BYTES [-1]"] if takes_raw else []
        given = f"{tensor.datatype} {list(tensor.shape)}"
        return bad_request(f"Input {tensor.name!r} must be {' or '.join(kinds)}, not {given}.")

    # --- outputs ---

    def check_outputs(self, request: InferRequest) -> None:
        """Raises Refusal(400) for outputs that the model doesn't have, or of which there are no classes."""
        for output in request.outputs:
            if output.name not in self._all:
                *most, last = map(repr, self._all)
                names = f"the outputs {', '.join(most)} and {last}" if most else f"the output {last}"
                raise bad_request(f"Model {self._model} has {names}, not {output.name!r}.")
            column = self._outputs.get(output.name)
            if output.class_count and column is not None and not (column.names and column.shape):
                raise bad_request(f"Output {output.name!r} has no names that classification could give.")

    def make_outputs(
        self, request: InferRequest, predictions: Arrays, geometries: Sequence[Geometry]
    ) -> tuple[Tensor, ...]:
        """The outputs that a request names, by default all, of the task's outputs (B, …), in the coordinates of the
        inputs as they were sent."""
        counts = {output.name: output.class_count for output in request.outputs} or self._all
        asks_texts = any(name in counts for name in self._texts)
        texts = self._task.texts(predictions, geometries) if asks_texts else {}
        predictions = self._task.to_input(predictions, geometries)
        outputs = []
        for name, count in counts.items():
            if name in self._texts:
                data = [text.encode("utf-8", "replace") for text in texts[name]]
                outputs.append(Tensor(name=name, datatype="BYTES", shape=(len(data),), data=data))
            elif count:
                outputs.append(_classification(name, predictions[name], self._outputs[name].names, count))
            else:
                values = predictions[name]
                datatype = self._outputs[name].datatype
                outputs.append(Tensor(name=name, datatype=datatype, shape=values.shape, data=values))
        return tuple(outputs)


class _Expected:
    """What a column looks like in the protocol."""

    def __init__(self, column: Column) -> None:
        self.dtype, self.shape, self.names = np.dtype(column.dtype), column.fixed_shape, column.names
        self.datatype = NAMES[self.dtype]
        self._bounds, self._may_be_missing = column.bounds, column.role == "number"  # as NaN

    def fits(self, data: np.ndarray) -> bool:
        return data.dtype == self.dtype and data.shape[1:] == self.shape

    def check_values(self, name: str, data: np.ndarray) -> None:
        """Raises Refusal(400) for numbers that would harm the engine or its answers."""
        if self.dtype.kind == "f" and (np.isinf(data) if self._may_be_missing else ~np.isfinite(data)).any():
            raise bad_request(f"Input {name!r} has values that are not finite numbers.")
        if self._bounds is not None and ((data < 0) | (data >= self._bounds)).any():
            most = ", ".join(str(bound - 1) for bound in self._bounds.reshape(-1)[:10].tolist())
            raise bad_request(f"Input {name!r} has values that are not from 0 to {most}.")


def _count(tensor: Tensor) -> int:
    """How many examples a tensor holds. Raises Refusal(400)."""
    if not tensor.shape or not tensor.shape[0]:
        raise bad_request(f"Input {tensor.name!r} holds nothing: its shape is {list(tensor.shape)}.")
    return math.prod(tensor.shape) if tensor.datatype == "BYTES" else tensor.shape[0]


def _classification(name: str, values: np.ndarray, names: Sequence[str], count: int) -> Tensor:
    """The classification extension: "value:index:name" of the `count` highest of (B, …, K), best first."""
    count = min(count, values.shape[-1])
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    order = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    texts = [f"{row[i]:f}:{i}:{names[i]}" for row, highest in zip(rows, order, strict=True) for i in highest]
    return Tensor(
        name=name,
        datatype="BYTES",
        shape=(*values.shape[:-1], count),
        data=[t.encode("utf-8", "replace") for t in texts],
    )
