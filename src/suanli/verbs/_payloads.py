"""Requests for a model that is served: what it takes is asked of the server, and the tensors are made up or read.

By the Open Inference Protocol with its binary tensor extension, so any server that speaks both can be asked. Pixels,
numbers and texts are made from a seed: they look like nothing, but cost what real ones of their size cost.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote

import numpy as np

from suanli.errors import DataError, UsageError
from suanli.loads import ServerGone, address
from suanli.serving.protocol import DATATYPES, HEADER_LENGTH, join_bytes
from suanli.suffixes import IMAGE_SUFFIXES
from suanli.types import AnyPath, Json

BODIES = 16  # that differ, so that nothing answers from memory
MOST_BYTES = 1 << 28  # of all bodies together
MOST_ROWS = 4096
LIMIT_S = 10.0
WORDS = "a the one was is not very good bad film plot actor scene story time end it and but with for of"
TEXT_WORDS = 60


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is sent, and to which model."""

    url: str  # where requests go
    model: str
    version: str | None
    platform: str | None
    engine: str | None  # where the server tells
    precision: str | None
    told: str  # a request in words
    headers: Mapping[str, str]
    bodies: tuple[bytes, ...]


def payload(url: str, headers: Mapping[str, str], *, rows: int, files: Sequence[AnyPath]) -> Asked:
    """Requests of `rows` inputs each for the model at `url`: a server's address, with /v2/models/NAME or
    /v2/models/NAME/versions/V behind it where it has several.

    Raises ServerGone where nothing answers, UsageError where it isn't clear which model is meant or how large its
    inputs are, DataError for a server that doesn't speak the protocol, or files that can't be read.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise UsageError(f"{rows} inputs can't be in a request.", fix=f"Give 1 to {MOST_ROWS}.")
    parts = address(url)
    path = _model_path(parts, headers)
    about = _json(parts, "GET", path, headers)
    try:
        (given,) = about["inputs"]
        name, datatype, shape = str(given["name"]), str(given["datatype"]), [int(n) for n in given["shape"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{url} doesn't say what its one input is.", fix="A server of the Open Inference Protocol is needed."
        ) from error
    if files:
        datatype, shape, datas = "BYTES", [rows], _of_files(files, rows)
    else:
        shape = _closed(shape, rows, datatype)
        datas = [
            _made_up(datatype, shape, seed)
            for seed in range(max(1, min(BODIES, MOST_BYTES // _bytes(datatype, shape))))
        ]
    bodies, header_length = _bodies(name, datatype, shape, datas)
    engine, precision = _engine(parts, path, headers)
    return Asked(
        url=f"{parts.scheme}://{parts.netloc}{path}/infer",
        model=unquote(path.split("/")[3]),
        version=unquote(path.split("/")[5]) if path.count("/") > 3 else _newest(about),
        platform=about.get("platform"),
        engine=engine,
        precision=precision,
        told=f"{datatype} {shape}" + (" of files" if files else ""),
        headers={**headers, "Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)},
        bodies=tuple(bodies),
    )


# --- tensors ---


def _closed(shape: Sequence[int], rows: int, datatype: str) -> list[int]:
    """The shape of a request: the first number is the batch where it is open."""
    if not shape or any(n < 1 for n in shape[1:]):
        raise UsageError(f"The model leaves the size of its inputs open ({list(shape)}).", fix="Give --files.")
    if shape[0] >= 1 and rows not in (1, shape[0]):
        raise UsageError(f"The model takes {shape[0]} inputs at a time, not {rows}.", fix="Leave --rows out.")
    if datatype != "BYTES" and datatype not in DATATYPES:
        raise UsageError(f"Inputs of the type {datatype} can't be made up.", fix="Give --files.")
    closed = [rows if shape[0] < 1 else shape[0], *shape[1:]]
    if _bytes(datatype, closed) > MOST_BYTES:
        raise UsageError(f"A request of {closed} {datatype} is too large.", fix="Give fewer --rows.")
    return closed


def _bytes(datatype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * (400 if datatype == "BYTES" else DATATYPES[datatype].itemsize)


def _made_up(datatype: str, shape: Sequence[int], seed: int) -> bytes:
    random = np.random.default_rng(seed)
    if datatype == "BYTES":
        return join_bytes(
            [" ".join(random.choice(WORDS.split(), TEXT_WORDS)).encode() for _ in range(math.prod(shape))]
        )
    dtype = DATATYPES[datatype]
    if dtype.kind == "f":
        return random.random(shape, np.float32).astype(dtype).tobytes()
    most = 2 if dtype.kind == "b" else 128 if datatype == "INT8" else 256
    return random.integers(0, most, shape).astype(dtype).tobytes()


def _of_files(files: Sequence[AnyPath], rows: int) -> list[bytes]:
    """Tensors of `rows` files each, as they are; every file is in at least one."""
    paths: list[Path] = []
    for given in files:
        path = Path(given).expanduser()
        inside = (p for p in path.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
        paths += sorted(inside) if path.is_dir() else [path]
    try:
        sizes = sum(path.stat().st_size for path in paths)
        if not paths or sizes * max(1, rows / len(paths)) > MOST_BYTES:
            raise UsageError(f"The files have {sizes:,} bytes.", fix=f"Give at least 1 and at most {MOST_BYTES:,}.")
        contents = cycle([path.read_bytes() for path in paths])
    except OSError as error:
        raise DataError(f"{error.filename} can't be read ({error.strerror}).", fix="Name files of pictures.") from error
    return [join_bytes(list(islice(contents, rows))) for _ in range(math.ceil(len(paths) / rows))]


def _bodies(name: str, datatype: str, shape: Sequence[int], datas: Sequence[bytes]) -> tuple[list[bytes], int]:
    """Whole bodies, and how long the JSON is in front of each: spaces make it as long in all."""
    heads = [
        json.dumps(
            {
                "inputs": [
                    {
                        "name": name,
                        "datatype": datatype,
                        "shape": list(shape),
                        "parameters": {"binary_data_size": len(data)},
                    }
                ],
                "parameters": {"binary_data_output": True},
            },
            separators=(",", ":"),
        ).encode()
        for data in datas
    ]
    length = max(map(len, heads))
    return [head.ljust(length) + data for head, data in zip(heads, datas, strict=True)], length


# --- what the server tells ---


def _model_path(parts: SplitResult, headers: Mapping[str, str]) -> str:
    """The path of the model that is meant."""
    path = parts.path.rstrip("/").removesuffix("/infer")
    if path.startswith("/v2/models/"):
        return path
    if path not in ("", "/v2"):
        raise UsageError(f"{path} is no path of a model.", fix="Give http://host:port/v2/models/NAME.")
    index = _json(parts, "POST", "/v2/repository/index", headers)
    names = sorted({str(one["name"]) for one in index if one.get("state", "READY") == "READY"})
    if len(names) != 1:
        raise UsageError(
            f"The server has {len(names)} models ({', '.join(names) or 'none is ready'}).",
            fix="Give one: http://host:port/v2/models/NAME.",
        )
    return f"/v2/models/{quote(names[0], safe='')}"


def _newest(about: Mapping[str, Json]) -> str | None:
    versions = about.get("versions") or [None]
    version = versions[-1]
    return None if version is None else str(version)


def _engine(parts: SplitResult, path: str, headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Engine and precision, which suanli's own servers tell."""
    try:
        models = _json(parts, "GET", "/status", headers)["models"]
        model = next(one for one in models if one["name"] == unquote(path.split("/")[3]))
        return str(model["engine"]), str(model["precision"])
    except (DataError, KeyError, TypeError, StopIteration):
        return None, None


def _json(parts: SplitResult, method: str, path: str, headers: Mapping[str, str]) -> Json:
    """What a path answers. Raises DataError where that is no JSON or no success."""
    connection = connected(parts, LIMIT_S)
    try:
        connection.request(method, path, body=b"{}" if method == "POST" else None, headers=dict(headers))
        response = connection.getresponse()
        text = response.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise ServerGone(
            f"No answer from {parts.netloc} ({str(error) or type(error).__name__}).",
            fix="Start the server first, or check the address.",
        ) from error
    finally:
        connection.close()
    if response.status != 200:
        said = text[:300].decode(errors="replace").strip()
        key = " Set SUANLI_API_KEY." if response.status in (401, 403) else ""
        raise DataError(f"{method} {path} is answered by {response.status}: {said}", fix=f"Check the address.{key}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{method} {path} is not answered by JSON.", fix="Check the address.") from error


def connected(parts: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    """A connection to an address of `loads.address`, which opens with the first request."""
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, port, timeout=timeout_s)


def key_headers() -> dict[str, str]:
    """The header with the key of $SUANLI_API_KEY, as `suanli serve` reads it; none where there is no key."""
    key = os.environ.get("SUANLI_API_KEY", "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}
