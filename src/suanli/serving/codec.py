"""The bodies of the protocol over HTTP: requests from bytes, answers to bytes. No sockets, no models.

A body is JSON, or JSON with the raw bytes of tensors after it (the binary tensor extension, whose header
`Inference-Header-Content-Length` says where the JSON ends). A tensor is accepted only if its shape, datatype and size
agree. Sources: "Open Inference Protocol" (REST) and Triton Inference Server's "Binary Tensor Data", "Classification"
and "Raw Binary Request".
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from suanli.serving.protocol import (
    DATATYPES,
    MAX_ELEMENTS,
    MAX_RANK,
    MAX_STRINGS,
    MAX_TENSORS,
    InferRequest,
    InferResponse,
    Refusal,
    RequestedOutput,
    Tensor,
    bad_request,
    from_bytes,
    to_bytes,
)

if TYPE_CHECKING:
    from suanli.serving import bodies

# Each number becomes a Python object, thirty times as large, and meanwhile no other request is answered.
MAX_JSON_BYTES = 8_000_000
HEADER_LENGTH = "Inference-Header-Content-Length"
ELEMENTS: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}  # Python's by NumPy's kinds


# --- requests ---


def parse(body: bytes, header_length: int | None = None) -> InferRequest:
    """The request in `body`, whose first `header_length` bytes are JSON; None: all of it is.

    `header_length` 0 is a raw binary request: the body is the only element of a nameless BYTES input, and the answer
    is binary too. Raises Refusal(400), whose message names what is wrong, or Refusal(413).
    """
    if header_length is None:
        return _parse_request(body, None)
    if not 0 <= header_length <= len(body):
        raise bad_request(f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes.")
    if header_length == 0:
        raw = Tensor(name="", datatype="BYTES", shape=(1,), data=[body])
        return InferRequest(inputs=(raw,), binary_output=True)
    return _parse_request(body[:header_length], memoryview(body)[header_length:])


def parse_json(text: bytes) -> object:
    """The value of a body. Unlike Python's reader, it doesn't take NaN and Infinity, which are not JSON. Raises
    Refusal(400) or Refusal(413)."""
    if len(text) > MAX_JSON_BYTES:
        message = f"JSON of {len(text)} bytes is more than {MAX_JSON_BYTES}: send tensors as bytes after the JSON."
        raise Refusal(413, message)
    try:
        return _DECODER.decode(text.decode())
    except RecursionError:
        raise bad_request("The JSON is nested too deeply.") from None
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise bad_request(f"The body is not JSON: {str(error)[:200]}.") from None


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def _parse_request(text: bytes, raw: memoryview | None) -> InferRequest:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise bad_request(f"A request must be a JSON object, not {_json_type(values)}.")
    identity = values.get("id")
    if identity is not None and not isinstance(identity, str):
        raise bad_request(f"id must be a string, not {_json_type(identity)}.")
    if identity is not None and not _is_utf8(identity):
        raise bad_request("id is not text that UTF-8 can encode.")
    parameters = _get_object(values, "parameters")
    binary = _get_flag(parameters, "binary_data_output", False)
    return InferRequest(
        id=identity,
        inputs=_parse_inputs(values.get("inputs"), raw),
        outputs=tuple(_parse_output(item, i, binary) for i, item in enumerate(_get_list(values, "outputs"))),
        parameters=parameters,
        binary_output=binary,
    )


def _parse_inputs(items: object, raw: memoryview | None) -> tuple[Tensor, ...]:
    """`raw`: the bytes after the JSON; None: the request has none."""
    if not isinstance(items, list) or not items:
        raise bad_request("inputs is missing: a list with at least one tensor (name, shape, datatype, data).")
    if len(items) > MAX_TENSORS:
        raise bad_request(f"{len(items)} inputs are more than {MAX_TENSORS}.")
    inputs: list[Tensor] = []
    offset = 0
    for i, item in enumerate(items):
        tensor, size = _parse_input(item, i, None if raw is None else raw[offset:])
        inputs.append(tensor)
        offset += size
    if raw is not None and offset != len(raw):
        raise bad_request(f"{len(raw) - offset} bytes after the JSON belong to no input.")
    if len({tensor.name for tensor in inputs}) < len(inputs):
        raise bad_request("Two inputs have the same name.")
    return tuple(inputs)


def _parse_input(item: object, index: int, raw: memoryview | None) -> tuple[Tensor, int]:
    """A tensor, and how many of the raw bytes are its own."""
    if not isinstance(item, dict):
        raise bad_request(f"inputs[{index}] must be an object, not {_json_type(item)}.")
    name, datatype = _parse_name(item, f"inputs[{index}]"), item.get("datatype")
    shape = _parse_shape(item.get("shape"), index)
    if not isinstance(datatype, str) or (datatype not in DATATYPES and datatype != "BYTES"):
        known = ", ".join((*DATATYPES, "BYTES"))
        raise bad_request(f"The datatype of input {name!r} is {_abbreviate(datatype)}; there are {known}.")
    parameters = _get_object(item, "parameters")
    size = parameters.get("binary_data_size")
    data: np.ndarray | list[bytes]
    if size is None:
        size, data = 0, _parse_data(name, datatype, shape, item.get("data"))
    elif raw is None:
        raise bad_request(f"Input {name!r} has binary_data_size, but the request has no header {HEADER_LENGTH}.")
    elif "data" in item:
        raise bad_request(f"Input {name!r} has both data and binary_data_size.")
    elif type(size) is not int or not 0 <= size <= len(raw):
        raise bad_request(f"binary_data_size of input {name!r} is {_abbreviate(size)}; {len(raw)} bytes are left.")
    else:
        data = from_bytes(name, datatype, shape, raw[:size])
    return Tensor(name=name, datatype=datatype, shape=shape, data=data, parameters=parameters), size


def _parse_shape(values: object, index: int) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(side) is int and side >= 0 for side in values):
        raise bad_request(
            f"The shape of inputs[{index}] must be a list of numbers of 0 or more, not {_abbreviate(values)}."
        )
    if len(values) > MAX_RANK:
        raise bad_request(f"The shape of inputs[{index}] has {len(values)} dimensions; {MAX_RANK} are the most.")
    if math.prod(max(side, 1) for side in values) > MAX_ELEMENTS:
        raise bad_request(f"The shape of inputs[{index}] is {_abbreviate(values)}: larger than any request.")
    return tuple(values)


def _parse_data(name: str, datatype: str, shape: tuple[int, ...], values: object) -> np.ndarray | list[bytes]:
    """The data of a tensor from JSON: nested lists, or one flat list in row-major order."""
    if not isinstance(values, list):
        raise bad_request(f"Input {name!r} has no data: a list in row-major order, nested or flat.")
    items, sides = _flatten(values, name)
    if len(items) != math.prod(shape):
        raise bad_request(f"Input {name!r} of shape {list(shape)} has {len(items)} elements.")
    if len(sides) > 1 and sides != (shape if items else shape[: len(sides)]):  # lists end at the first 0
        raise bad_request(f"Input {name!r} of shape {list(shape)} has data of shape {list(sides)}.")
    kinds: set[type] = set(map(type, items))
    if datatype == "BYTES":
        return _encode_strings(name, items, kinds)
    if kinds - ELEMENTS[DATATYPES[datatype].kind]:  # checked here, since NumPy would convert anything
        raise bad_request(f"The data of input {name!r} is not {datatype}.")
    return _to_array(name, datatype, items).reshape(shape)


def _flatten(values: list[Any], name: str) -> tuple[list[Any], tuple[int, ...]]:
    """The elements of nested lists and their shape. Goes level by level, which needs little more memory than the lists
    themselves."""
    sides = [len(values)]
    while any(isinstance(item, list) for item in values):
        if len(sides) == MAX_RANK:
            raise bad_request(f"The data of input {name!r} is nested more than {MAX_RANK} deep.")
        lengths = {len(item) if isinstance(item, list) else -1 for item in values}
        if len(lengths) > 1:
            raise bad_request(f"The data of input {name!r} is not an array: its lists have different lengths.")
        sides.append(lengths.pop())
        values = list(chain.from_iterable(values))
    return values, tuple(sides)


def _encode_strings(name: str, items: list[Any], kinds: set[type]) -> list[bytes]:
    if kinds - {str}:
        raise bad_request(f"Elements of input {name!r} must be strings; send raw bytes after the JSON.")
    if len(items) > MAX_STRINGS:
        raise bad_request(f"Input {name!r} has {len(items)} elements; {MAX_STRINGS} of BYTES are the most.")
    try:
        return [text.encode() for text in items]
    except UnicodeEncodeError:
        raise bad_request(f"An element of input {name!r} is not text that UTF-8 can encode.") from None


def _to_array(name: str, datatype: str, items: list[Any]) -> np.ndarray:
    """Raises Refusal(400) for numbers that the datatype can't hold, such as 1e999."""
    dtype = DATATYPES[datatype]
    if dtype.kind in "ui" and items:
        limits = np.iinfo(dtype)
        if min(items) < limits.min or max(items) > limits.max:
            raise bad_request(f"The data of input {name!r} doesn't fit into {datatype} ({limits.min} to {limits.max}).")
    try:
        with np.errstate(over="ignore"):
            array = np.array(items, np.float64).astype(dtype) if dtype.kind == "f" else np.array(items, dtype)
    except OverflowError:  # an integer that is larger than any float
        array = np.array(np.inf)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise bad_request(f"The data of input {name!r} doesn't fit into {datatype}.")
    return array


def _parse_output(item: object, index: int, binary: bool) -> RequestedOutput:
    if not isinstance(item, dict):
        raise bad_request(f"outputs[{index}] must be an object, not {_json_type(item)}.")
    parameters = _get_object(item, "parameters")
    classes = parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        raise bad_request(f"classification of outputs[{index}] must be a number of 0 or more.")
    binary = _get_flag(parameters, "binary_data", binary)
    return RequestedOutput(name=_parse_name(item, f"outputs[{index}]"), binary=binary, class_count=classes)


def _parse_name(item: Mapping[str, object], where: str) -> str:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise bad_request(f"{where} has no name.")
    if not _is_utf8(name):
        raise bad_request(f"The name of {where} is not text that UTF-8 can encode.")
    return name[:200]


def _is_utf8(text: str) -> bool:
    """Whether the text can be sent back: JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _get_object(item: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = item.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_request(f"{key} must be an object, not {_json_type(value)}.")
    return value


def _get_list(item: Mapping[str, object], key: str) -> list[object]:
    value = item.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise bad_request(f"{key} must be a list of at most {MAX_TENSORS}.")
    return value


def _get_flag(parameters: Mapping[str, object], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise bad_request(f"{key} must be true or false.")
    return value


def _abbreviate(value: object) -> str:
    """For a message, however much a client sent and however deeply it is nested."""
    return reprlib.repr(value)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- answers ---


def render(response: InferResponse, request: InferRequest) -> tuple[list[bytes], int | None]:
    """The parts of the answer's body, and the length of the JSON at its start; None: all of it is JSON.

    Where every output is binary, as for a raw binary request, the JSON has only names and shapes.
    """
    binary = {output.name: output.binary for output in request.outputs}
    outputs: list[bodies.ResponseOutput] = []
    parts: list[bytes] = []
    for tensor in response.outputs:
        output: bodies.ResponseOutput = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if binary.get(tensor.name, request.binary_output):
            raw = to_bytes(tensor)
            output["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        elif isinstance(tensor.data, list):
            output["data"] = [element.decode("utf-8", "replace") for element in tensor.data]
        else:
            output["data"] = tensor.data.ravel().tolist()
        outputs.append(output)
    body: bodies.InferResponse = {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "outputs": outputs,
    }
    if response.id is not None:
        body["id"] = response.id
    head = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return ([head, *parts], len(head)) if parts else ([head], None)
