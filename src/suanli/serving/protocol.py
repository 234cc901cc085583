"""The Open Inference Protocol, version 2: requests from bytes, answers to bytes. No sockets, no models.

A request is JSON, or JSON with the tensors' raw bytes behind it (the binary tensor extension, whose header
`Inference-Header-Content-Length` says where the JSON ends). Raw bytes are not copied: arrays are views of the body.
What comes from outside is believed only after its shape, datatype and number of bytes agree. Sources: "Open Inference
Protocol" (REST) and Triton Inference Server's "Binary Tensor Data", "Classification" and "Raw Binary Request".

What this doesn't do: BF16, which NumPy hasn't; shared memory; tensors of several models.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from suanli.core.types import Json

DATATYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
ELEMENTS: dict[str, set[type]] = {
    "b": {bool},
    "u": {int},
    "i": {int},
    "f": {int, float},
}  # Python's types by NumPy's kinds
MAX_RANK = 8
MAX_TENSORS = 64  # of one request
MAX_ELEMENTS = 1 << 40  # of one tensor, as if no side were 0: NumPy refuses larger shapes even where they are empty
MAX_STRINGS = 1 << 16  # elements of one BYTES tensor: each is an object, and is read by itself
MAX_JSON_BYTES = (
    8_000_000  # an object of Python's for each number: thirty times as much memory, and nobody else answers
)
HEADER_LENGTH = "Inference-Header-Content-Length"


class Refusal(Exception):
    """Why a request gets no answer: `status` is HTTP's, `retry_after_s` says when it may."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


def bad_request(message: str) -> Refusal:
    return Refusal(400, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Of a request or an answer. `data` is an array of `shape`; for BYTES the elements in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray | list[bytes]
    parameters: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """An output that a request names."""

    name: str
    binary: bool = False
    class_count: int = 0  # more than 0: so many of the likeliest classes, as "value:index:label"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    id: str | None = None
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()  # empty: all
    parameters: Mapping[str, Json] = field(default_factory=dict)
    binary_output: bool = False  # for outputs that don't say


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    id: str | None
    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]


# --- from bytes ---


def parse(body: bytes, header_length: int | None = None) -> InferRequest:
    """The request in `body`, whose first `header_length` bytes are JSON; None: all of it is.

    `header_length` 0 is a raw binary request: the body is the only element of a nameless BYTES input, and the answer
    is binary too. Raises Refusal(400), whose message names what is wrong.
    """
    if header_length is None:
        return _parse_request(body, None)
    if not 0 <= header_length <= len(body):
        raise bad_request(f"{HEADER_LENGTH} is {header_length}, but the body has {len(body)} bytes.")
    if header_length == 0:
        raw = Tensor(name="", datatype="BYTES", shape=(1,), data=[body])
        return InferRequest(inputs=(raw,), binary_output=True)
    return _parse_request(body[:header_length], memoryview(body)[header_length:])


def _parse_request(text: bytes, raw: memoryview | None) -> InferRequest:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise bad_request(f"A request is a JSON object, not {_json_type(values)}.")
    identity = values.get("id")
    if identity is not None and not isinstance(identity, str):
        raise bad_request(f"id is a string, not {_json_type(identity)}.")
    if identity is not None and not _is_utf8(identity):
        raise bad_request("id is not text that UTF-8 can write.")
    parameters = _get_object(values, "parameters")
    binary = _get_flag(parameters, "binary_data_output", False)
    return InferRequest(
        id=identity,
        inputs=_parse_inputs(values.get("inputs"), raw),
        outputs=tuple(_parse_output(item, i, binary) for i, item in enumerate(_get_list(values, "outputs"))),
        parameters=parameters,
        binary_output=binary,
    )


def parse_json(text: bytes) -> Any:
    """What a body says. NaN and Infinity are not JSON, though Python's reader takes them by default."""
    if len(text) > MAX_JSON_BYTES:
        raise Refusal(413, f"JSON of {len(text)} bytes is more than {MAX_JSON_BYTES}: send tensors as bytes behind it.")
    try:
        return _DECODER.decode(text.decode())
    except RecursionError:
        raise bad_request("The JSON is nested too deeply.") from None
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise bad_request(f"The body is not JSON: {str(error)[:200]}.") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def _parse_inputs(items: Any, binary: memoryview | None) -> tuple[Tensor, ...]:
    if not isinstance(items, list) or not items:
        raise bad_request("inputs is missing: a list with at least one tensor (name, shape, datatype, data).")
    if len(items) > MAX_TENSORS:
        raise bad_request(f"{len(items)} inputs are more than {MAX_TENSORS}.")
    found: list[Tensor] = []
    at = 0
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise bad_request(f"inputs[{i}] is an object, not {_json_type(item)}.")
        name, datatype, shape = (
            _parse_name(item, f"inputs[{i}]"),
            item.get("datatype"),
            _parse_shape(item.get("shape"), i),
        )
        if not isinstance(datatype, str) or (datatype not in DATATYPES and datatype != "BYTES"):
            known = ", ".join((*DATATYPES, "BYTES"))
            raise bad_request(f"The datatype of input {name!r} is {_abbreviate(datatype)}; there are {known}.")
        parameters = _get_object(item, "parameters")
        size = parameters.get("binary_data_size")
        data: np.ndarray | list[bytes]
        if size is None:
            data = _parse_data(name, datatype, shape, item.get("data"))
        elif binary is None:
            raise bad_request(f"Input {name!r} has binary_data_size, but the request has no header {HEADER_LENGTH}.")
        elif "data" in item:
            raise bad_request(f"Input {name!r} has both data and binary_data_size.")
        elif type(size) is not int or not 0 <= size <= len(binary) - at:
            raise bad_request(
                f"binary_data_size of input {name!r} is {_abbreviate(size)}; {len(binary) - at} bytes are left."
            )
        else:
            data = from_bytes(name, datatype, shape, binary[at : at + size])
            at += size
        found.append(Tensor(name=name, datatype=datatype, shape=shape, data=data, parameters=parameters))
    if binary is not None and at != len(binary):
        raise bad_request(f"{len(binary) - at} bytes behind the JSON belong to no input.")
    if len({tensor.name for tensor in found}) < len(found):
        raise bad_request("Two inputs have one name.")
    return tuple(found)


def _parse_shape(values: Any, index: int) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise bad_request(f"The shape of inputs[{index}] is a list of numbers of 0 or more, not {_abbreviate(values)}.")
    if len(values) > MAX_RANK:
        raise bad_request(f"The shape of inputs[{index}] has {len(values)} dimensions; {MAX_RANK} are the most.")
    if math.prod(max(v, 1) for v in values) > MAX_ELEMENTS:
        raise bad_request(f"The shape of inputs[{index}] is {_abbreviate(values)}: larger than any request.")
    return tuple(values)


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview | bytes) -> np.ndarray | list[bytes]:
    """The data of a tensor from its little-endian bytes, as a view. Raises Refusal(400) where they don't fit."""
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = split_bytes(raw, name, count)
        if len(elements) != count:
            raise bad_request(f"Input {name!r} of shape {list(shape)} has {len(elements)} elements.")
        return elements
    dtype = DATATYPES[datatype]
    if count * dtype.itemsize != len(raw):
        wanted = count * dtype.itemsize
        raise bad_request(f"Input {name!r} of {datatype} {list(shape)} is {wanted} bytes, not {len(raw)}.")
    if datatype == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise bad_request(f"Input {name!r} is BOOL: its bytes are 0 or 1.")
    return np.frombuffer(raw, dtype).reshape(shape)


def split_bytes(raw: memoryview | bytes, name: str, most: int) -> list[bytes]:
    """Elements of a BYTES tensor: each is its length in four bytes and its content. More than `most` are refused."""
    if most > MAX_STRINGS:
        raise bad_request(f"Input {name!r} has {most} elements; {MAX_STRINGS} of BYTES are the most.")
    elements: list[bytes] = []
    at, end = 0, len(raw)
    while at < end:
        if len(elements) == most:
            raise bad_request(f"Input {name!r} has more than the {most} elements of its shape.")
        if end - at < 4:
            raise bad_request(f"Input {name!r} is cut short in the length of element {len(elements)}.")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if length > end - at:
            raise bad_request(f"Element {len(elements)} of input {name!r} says {length} bytes; {end - at} are left.")
        elements.append(bytes(raw[at : at + length]))
        at += length
    return elements


def join_bytes(elements: Sequence[bytes]) -> bytes:
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def _parse_data(name: str, datatype: str, shape: tuple[int, ...], values: Any) -> np.ndarray | list[bytes]:
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
    if kinds - ELEMENTS[DATATYPES[datatype].kind]:  # before NumPy sees it: it would make something of anything
        raise bad_request(f"The data of input {name!r} is not {datatype}.")
    return _to_array(name, datatype, items).reshape(shape)


def _flatten(values: list[Any], name: str) -> tuple[list[Any], tuple[int, ...]]:
    """The elements of nested lists and their shape. Level by level, which holds little more than the lists do."""
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
        raise bad_request(f"Elements of input {name!r} are strings; raw bytes go behind the JSON.")
    if len(items) > MAX_STRINGS:
        raise bad_request(f"Input {name!r} has {len(items)} elements; {MAX_STRINGS} of BYTES are the most.")
    try:
        return [text.encode() for text in items]
    except UnicodeEncodeError:
        raise bad_request(f"An element of input {name!r} is not text that UTF-8 can write.") from None


def _to_array(name: str, datatype: str, items: list[Any]) -> np.ndarray:
    """Raises Refusal(400) for numbers that the datatype doesn't hold, 1e999 too."""
    dtype = DATATYPES[datatype]
    if dtype.kind in "ui" and items:
        limits = np.iinfo(dtype)
        if min(items) < limits.min or max(items) > limits.max:
            raise bad_request(f"The data of input {name!r} doesn't fit into {datatype} ({limits.min} to {limits.max}).")
    try:
        with np.errstate(over="ignore"):
            found = np.array(items, np.float64).astype(dtype) if dtype.kind == "f" else np.array(items, dtype)
    except OverflowError:  # an integer that is larger than any float
        found = np.array(np.inf)
    if dtype.kind == "f" and not np.isfinite(found).all():
        raise bad_request(f"The data of input {name!r} doesn't fit into {datatype}.")
    return found


def _parse_output(item: Any, index: int, binary: bool) -> RequestedOutput:
    if not isinstance(item, dict):
        raise bad_request(f"outputs[{index}] is an object, not {_json_type(item)}.")
    parameters = _get_object(item, "parameters")
    classes = parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        raise bad_request(f"classification of outputs[{index}] is a number of 0 or more.")
    binary = _get_flag(parameters, "binary_data", binary)
    return RequestedOutput(name=_parse_name(item, f"outputs[{index}]"), binary=binary, class_count=classes)


def _parse_name(item: Mapping[str, Any], where: str) -> str:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise bad_request(f"{where} has no name.")
    if not _is_utf8(name):
        raise bad_request(f"The name of {where} is not text that UTF-8 can write.")
    return name[:200]


def _is_utf8(text: str) -> bool:
    """Whether it can be sent back: JSON may hold one half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _get_object(item: Mapping[str, Any], key: str) -> Mapping[str, Json]:
    found = item.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise bad_request(f"{key} is an object, not {_json_type(found)}.")
    return found


def _get_list(item: Mapping[str, Any], key: str) -> list[Any]:
    found = item.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or len(found) > MAX_TENSORS:
        raise bad_request(f"{key} is a list of at most {MAX_TENSORS}.")
    return found


def _get_flag(parameters: Mapping[str, Json], key: str, otherwise: bool) -> bool:
    found = parameters.get(key, otherwise)
    if not isinstance(found, bool):
        raise bad_request(f"{key} is true or false.")
    return found


def _abbreviate(value: Any) -> str:
    """For a message: however much a client sent, and however deeply nested."""
    return reprlib.repr(value)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def decompress(body: bytes, most_bytes: int, *, wbits: int) -> bytes:
    """A compressed body; `wbits` is zlib's, and says how it may be compressed. Raises Refusal(413) for one that grows
    beyond the limit, without making it, (400) for one that is cut short, and zlib.error for one in another form."""
    inflating = zlib.decompressobj(wbits)
    found = inflating.decompress(body, most_bytes + 1)
    if len(found) > most_bytes:
        raise Refusal(413, f"The body is more than {most_bytes} bytes when it is decompress.")
    if not inflating.eof:
        raise bad_request("The compressed body is cut short.")
    return found


# --- to bytes ---


def render(response: InferResponse, request: InferRequest) -> tuple[list[bytes], int | None]:
    """The parts of the answer's body, and how long the JSON in front is; None: all of it is JSON.

    Where every output is binary, a raw binary request included, only names and shapes are JSON.
    """
    binary = {wanted.name: wanted.binary for wanted in request.outputs}
    outputs: list[Json] = []
    parts: list[bytes] = []
    for tensor in response.outputs:
        output: dict[str, Json] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if binary.get(tensor.name, request.binary_output):
            raw = to_bytes(tensor)
            output["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        elif isinstance(tensor.data, list):
            output["data"] = [element.decode("utf-8", "replace") for element in tensor.data]
        else:
            output["data"] = tensor.data.ravel().tolist()
        outputs.append(output)
    values: dict[str, Json] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id is not None:
        values["id"] = response.id
    values["outputs"] = outputs
    head = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return ([head, *parts], len(head)) if parts else ([head], None)


def to_bytes(tensor: Tensor) -> bytes:
    """The little-endian bytes of a tensor."""
    if isinstance(tensor.data, list):
        return join_bytes(tensor.data)
    return np.ascontiguousarray(tensor.data, DATATYPES[tensor.datatype]).tobytes()
