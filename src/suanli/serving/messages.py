"""The messages of gRPC: their classes, and their conversion to requests and from answers.

The classes are made on first use from `messages.binpb`, which is `inference.proto` and `health.proto` compiled
(`make proto`). They have their own descriptor pool: generated code would tie suanli to one version of protobuf, and its
names would collide with those of a client in the same process.

Answers always use `raw_output_contents`, as Triton's do: its clients read numbers nowhere else. Not supported: BF16 and
shared memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from suanli.serving.protocol import (
    DATATYPES,
    MAX_ELEMENTS,
    MAX_RANK,
    MAX_STRINGS,
    MAX_TENSORS,
    InferRequest,
    InferResponse,
    RequestedOutput,
    Tensor,
    bad_request,
    from_bytes,
    to_bytes,
)

INFERENCE = "inference"
HEALTH = "grpc.health.v1"

# The field with the elements of a datatype where they aren't raw. FP16 has none.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


# --- the classes ---


def message_class(name: str, package: str = INFERENCE) -> Any:
    """The class of a message, such as "ModelInferRequest". Needs protobuf."""
    return _classes()[f"{package}.{name}"]


@functools.cache
def _classes() -> dict[str, Any]:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessages

    compiled = resources.files("suanli.serving").joinpath("messages.binpb").read_bytes()
    return dict(GetMessages(FileDescriptorSet.FromString(compiled).file, DescriptorPool()))


def fill_message(name: str, values: Mapping[str, Any]) -> Any:
    """A new message of this name with the values of a JSON object."""
    from google.protobuf.json_format import ParseDict

    return ParseDict(values, message_class(name)())


# --- conversion ---


def to_request(message: Any) -> InferRequest:
    """The request in a ModelInferRequest. Raw bytes are not copied. Raises Refusal(400) where it contradicts itself."""
    tensors, raws = message.inputs, message.raw_input_contents
    if not tensors:
        raise bad_request("inputs is missing: at least one tensor.")
    if len(tensors) > MAX_TENSORS or len(message.outputs) > MAX_TENSORS:
        raise bad_request(
            f"There are {len(tensors)} inputs and {len(message.outputs)} outputs; {MAX_TENSORS} are the most."
        )
    if raws and len(raws) != len(tensors):
        raise bad_request(f"raw_input_contents has {len(raws)} elements for {len(tensors)} inputs.")
    inputs = tuple(
        _read_tensor(tensor, raw) for tensor, raw in zip(tensors, raws or [None] * len(tensors), strict=True)
    )
    if len({tensor.name for tensor in inputs}) < len(inputs):
        raise bad_request("Two inputs have the same name.")
    return InferRequest(
        id=message.id or None,
        inputs=inputs,
        outputs=tuple(map(_read_output, message.outputs)),
        parameters=_read_parameters(message.parameters),
        binary_output=True,
    )


def to_message(response: InferResponse) -> Any:
    """The ModelInferResponse of an answer."""
    answer = message_class("ModelInferResponse")(
        id=response.id or "", model_name=response.model_name, model_version=response.model_version
    )
    for tensor in response.outputs:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.append(to_bytes(tensor))
    return answer


def _read_tensor(message: Any, raw: bytes | None) -> Tensor:
    name, datatype, shape = message.name, message.datatype, tuple(message.shape)
    if not name:
        raise bad_request("An input has no name.")
    if datatype not in DATATYPES and datatype != "BYTES":
        known = ", ".join((*DATATYPES, "BYTES"))
        raise bad_request(f"The datatype of input {name[:200]!r} is {datatype[:40]!r}; there are {known}.")
    if len(shape) > MAX_RANK or min(shape, default=0) < 0:
        start = list(shape[:MAX_RANK])
        raise bad_request(f"The shape of input {name[:200]!r} is {start}, not up to {MAX_RANK} numbers of 0 or more.")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise bad_request(f"The shape of input {name[:200]!r} is {list(shape)}: larger than any request.")
    parameters = _read_parameters(message.parameters)
    data: np.ndarray | list[bytes]
    if raw is None:
        data = _read_contents(name, datatype, shape, message.contents)
    elif message.HasField("contents") and message.contents.ByteSize():
        raise bad_request(f"Input {name[:200]!r} has both contents and raw_input_contents.")
    else:
        data = from_bytes(name, datatype, shape, raw)
    return Tensor(name=name, datatype=datatype, shape=shape, data=data, parameters=parameters)


def _read_contents(name: str, datatype: str, shape: tuple[int, ...], contents: Any) -> np.ndarray | list[bytes]:
    """The data of a tensor from the field of its datatype."""
    field = _CONTENTS.get(datatype)
    if field is None:
        raise bad_request(f"Input {name!r} is {datatype}, which has no field in contents: use raw_input_contents.")
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        raise bad_request(f"Input {name!r} of {datatype} {list(shape)} has {len(values)} elements in {field}.")
    if datatype == "BYTES":
        if len(values) > MAX_STRINGS:
            raise bad_request(f"Input {name!r} has {len(values)} elements; {MAX_STRINGS} of BYTES are the most.")
        return list(values)
    dtype = DATATYPES[datatype]
    if dtype.kind not in "iu" or dtype.itemsize >= 4:  # the field is as wide as the datatype
        return np.fromiter(values, dtype, len(values)).reshape(shape)
    limits = np.iinfo(dtype)
    wide = np.fromiter(values, np.int64, len(values))
    if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
        raise bad_request(f"{field} of input {name!r} doesn't fit into {datatype} ({limits.min} to {limits.max}).")
    return wide.astype(dtype).reshape(shape)


def _read_output(message: Any) -> RequestedOutput:
    classes = _read_parameters(message.parameters).get("classification", 0)
    if not message.name:
        raise bad_request("An output has no name.")
    if type(classes) is not int or classes < 0:
        raise bad_request(f"classification of output {message.name[:200]!r} must be a number of 0 or more.")
    return RequestedOutput(name=message.name, binary=True, class_count=classes)


def _read_parameters(parameters: Mapping[str, Any]) -> dict[str, object]:
    """Plain values from a map of InferParameter; None for one without a value."""
    if not parameters:
        return {}
    if "shared_memory_region" in parameters:
        raise bad_request("Shared memory is not supported: send the bytes of a tensor in raw_input_contents.")
    fields = {key: value.WhichOneof("parameter_choice") for key, value in parameters.items()}
    return {key: getattr(parameters[key], field) if field else None for key, field in fields.items()}
