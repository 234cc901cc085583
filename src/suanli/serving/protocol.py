"""The Open Inference Protocol, version 2: tensors, requests, answers and refusals, for HTTP and gRPC alike.

Also the bytes of a tensor as the binary tensor extension has them, little-endian. Arrays are views of the request's
body, without a copy. Sources: "Open Inference Protocol" (REST) and Triton Inference Server's "Binary Tensor Data".

Not here: the bodies of HTTP (`codec`) and the messages of gRPC (`messages`). Not supported: BF16, which NumPy doesn't
have; shared memory.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

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
MAX_RANK = 8
MAX_TENSORS = 64  # of one request
MAX_ELEMENTS = 1 << 40  # of one tensor, counting a side of 0 as 1: NumPy refuses larger shapes even if they are empty
MAX_GZIP_MEMBERS = 10_000
_PIECE_BYTES = 1 << 16
MAX_STRINGS = 1 << 16  # elements of one BYTES tensor: each is a Python object and is read by itself


class Refusal(Exception):
    """Why a request gets no answer: `status` is HTTP's; `retry_after_s` says when to try again, where that helps."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


def bad_request(message: str) -> Refusal:
    return Refusal(400, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Of a request or an answer. `data` is an array of `shape`; for BYTES a list of the elements in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray | list[bytes]
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """An output that a request names."""

    name: str
    binary: bool = False
    class_count: int = 0  # more than 0: this many of the likeliest classes, as "probability:index:label"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    id: str | None = None
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()  # empty: all
    parameters: Mapping[str, object] = field(default_factory=dict)
    binary_output: bool = False  # for outputs that don't say


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    id: str | None
    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview | bytes) -> np.ndarray | list[bytes]:
    """The data of a tensor from its little-endian bytes, as a view. Raises Refusal(400) where they don't fit."""
    count = math.prod(shape)
    if datatype == "BYTES":
        elements = split_bytes(raw, name, count)
        if len(elements) != count:
            raise bad_request(f"Input {name!r} of shape {list(shape)} has {len(elements)} elements.")
        return elements
    dtype = DATATYPES[datatype]
    expected = count * dtype.itemsize
    if len(raw) != expected:
        raise bad_request(f"Input {name!r} of {datatype} {list(shape)} must have {expected} bytes, not {len(raw)}.")
    if datatype == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise bad_request(f"Input {name!r} is BOOL: its bytes are 0 or 1.")
    return np.frombuffer(raw, dtype).reshape(shape)


def to_bytes(tensor: Tensor) -> bytes:
    """The little-endian bytes of a tensor."""
    if isinstance(tensor.data, list):
        return join_bytes(tensor.data)
    return np.ascontiguousarray(tensor.data, DATATYPES[tensor.datatype]).tobytes()


def split_bytes(raw: memoryview | bytes, name: str, most: int) -> list[bytes]:
    """The elements of a BYTES tensor: each is its length in four bytes, then its content. Raises Refusal(400) for more
    than `most` elements, or bytes that end within one."""
    if most > MAX_STRINGS:
        raise bad_request(f"Input {name!r} has {most} elements; {MAX_STRINGS} of BYTES are the most.")
    elements: list[bytes] = []
    offset, end = 0, len(raw)
    while offset < end:
        if len(elements) == most:
            raise bad_request(f"Input {name!r} has more than the {most} elements of its shape.")
        if end - offset < 4:
            raise bad_request(f"Input {name!r} is cut short in the length of element {len(elements)}.")
        (length,) = struct.unpack_from("<I", raw, offset)
        offset += 4
        left = end - offset
        if length > left:
            raise bad_request(f"Element {len(elements)} of input {name!r} says {length} bytes; {left} are left.")
        elements.append(bytes(raw[offset : offset + length]))
        offset += length
    return elements


def join_bytes(elements: Sequence[bytes]) -> bytes:
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def decompress(body: bytes, max_bytes: int, *, wbits: int) -> bytes:
    """A compressed body; zlib's `wbits` says which format it may have. Raises Refusal(413), before more memory is used,
    for one that grows beyond `max_bytes`, Refusal(400) for one that is cut short or has other bytes behind its end, and
    zlib.error for another format. Gzip may have several members (RFC 1952)."""
    parts: list[bytes] = []
    left_bytes, start = max_bytes, 0
    for _ in range(MAX_GZIP_MEMBERS):
        decompressor = zlib.decompressobj(wbits)
        while not decompressor.eof:
            piece = body[start : start + _PIECE_BYTES]  # else each member would copy all that follow it
            if not piece:
                raise bad_request("The compressed body is cut short.")
            content = decompressor.decompress(piece, left_bytes + 1)
            start += len(piece) - len(decompressor.unused_data)
            left_bytes -= len(content)
            if left_bytes < 0:
                raise Refusal(413, f"The body is more than {max_bytes} bytes when it is decompressed.")
            parts.append(content)
        if start == len(body):
            return b"".join(parts)
        if body[start : start + 2] != b"\x1f\x8b" or wbits <= zlib.MAX_WBITS:
            break
    raise bad_request("The compressed body has other bytes behind its end, or too many parts.")
