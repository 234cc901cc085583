"""What the tensors of a request mean to a model, and the tensors of its answer. Pure functions, without an engine.

A model has one input, named by its kind of data, and two outputs: `probabilities`, or with Triton's classification
extension the likeliest classes as text, and `label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from suanli.core.types import Preprocess
from suanli.serving.protocol import NAMES, InferRequest, Tensor, bad_request

MAX_INPUTS = 4096  # of one request


def single_input(request: InferRequest, *, model: str, name: str) -> Tensor:
    """The only input tensor of a request; `name` is what the model calls it. Raises Refusal(400)."""
    if len(request.inputs) != 1 or request.inputs[0].name not in (name, ""):
        names = ", ".join(tensor.name[:40] for tensor in request.inputs)
        raise bad_request(f"Model {model} has one input, {name!r}; the request has {names!r}.")
    return request.inputs[0]


def count_inputs(tensor: Tensor) -> int:
    """How many inputs a tensor holds. Raises Refusal(400)."""
    if not tensor.shape or not tensor.shape[0]:
        raise bad_request(f"Input {tensor.name!r} holds nothing: its shape is {list(tensor.shape)}.")
    inputs = math.prod(tensor.shape) if tensor.datatype == "BYTES" else tensor.shape[0]
    if inputs > MAX_INPUTS:
        raise bad_request(f"{inputs} inputs are more than the {MAX_INPUTS} that one request may have.")
    return inputs


def check_outputs(request: InferRequest, *, model: str) -> None:
    for output in request.outputs:
        if output.name not in ("probabilities", "label"):
            raise bad_request(f"Model {model} has the outputs 'probabilities' and 'label', not {output.name!r}.")


def rows_in(tensor: Tensor, preprocess: Preprocess, row_shape: tuple[int, ...], row_dtype: str) -> np.ndarray | None:
    """The data of a tensor (B, *row_shape) where it is rows already; None where it must be encoded. Raises Refusal(400)
    for a tensor that is neither."""
    data = tensor.data
    if isinstance(data, list):
        return None
    # Any number can be a pixel or a measurement, but not any number is a word's id: looking it up could crash.
    takes_rows = np.dtype(row_dtype).kind == "f" or row_dtype == "uint8"
    if data.dtype == row_dtype and data.shape[1:] == row_shape and takes_rows:
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise bad_request(f"Input {tensor.name!r} has values that are not finite numbers.")
        return data
    if preprocess.kind != "image" or data.dtype != np.uint8 or data.ndim != 4:
        expected = f"{NAMES[np.dtype(row_dtype)]} {[-1, *row_shape]} or " if takes_rows else ""
        raise bad_request(
            f"Input {tensor.name!r} must be {expected}BYTES [-1], not {tensor.datatype} {list(tensor.shape)}."
        )
    return None


def output_tensors(request: InferRequest, probabilities: np.ndarray, classes: Sequence[str]) -> tuple[Tensor, ...]:
    """The outputs that a request names, by default all, of probabilities (B, K)."""
    outputs = []
    counts = {output.name: output.class_count for output in request.outputs} or {"probabilities": 0, "label": 0}
    for name, count in counts.items():
        if name == "label":
            labels = [classes[i].encode() for i in probabilities.argmax(1)]
            outputs.append(Tensor(name=name, datatype="BYTES", shape=(len(labels),), data=labels))
        elif count:
            outputs.append(_classification(probabilities, classes, count))
        else:
            outputs.append(Tensor(name=name, datatype="FP32", shape=probabilities.shape, data=probabilities))
    return tuple(outputs)


def _classification(probabilities: np.ndarray, classes: Sequence[str], count: int) -> Tensor:
    """The classification extension: "probability:index:label" of the `count` likeliest classes, best first."""
    count = min(count, probabilities.shape[1])
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    texts = [
        f"{row[i]:f}:{i}:{classes[i]}".encode()
        for row, likeliest in zip(probabilities, order, strict=True)
        for i in likeliest
    ]
    return Tensor(name="probabilities", datatype="BYTES", shape=(len(order), count), data=texts)
