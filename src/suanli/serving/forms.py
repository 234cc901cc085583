"""The bodies that people and programs send over HTTP: read whole and within a size, then as JSON or a form.

/predict takes a form with files, one file or text as it is, or texts or rows in JSON. Not here: the bodies of the
protocol's requests for inference (`codec`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from suanli.core.errors import BadInput, UsageError
from suanli.core.types import Preprocess, Raw
from suanli.serving.codec import parse_json
from suanli.serving.protocol import Refusal, bad_request, decompress

MAX_FILES = 256  # of one request
_WBITS = {b"gzip": 31, b"deflate": 15}  # zlib's, by content encoding


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, decompressed. Raises Refusal(413) for one that is too large, (499) where the client leaves, (415)
    or (400) where it can't be decompressed.

    Starlette's `stream` isn't used: it costs as much time as the whole reading of a small request.
    """
    headers = request.scope["suanli.headers"]
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:15]) > max_bytes:
        raise Refusal(413, f"The body is larger than {max_bytes} bytes.")
    parts: list[bytes] = []
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Refusal(499, "The client has left.")
        parts.append(message["body"])
        if request.scope.get("suanli.too_large") or sum(map(len, parts)) > max_bytes:
            raise Refusal(413, f"The body is larger than {max_bytes} bytes.")
        more = message["more_body"]
    body = b"".join(parts)
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding == b"identity":
        return body
    if encoding not in _WBITS:
        raise Refusal(415, f"The content encoding {encoding.decode('latin-1')[:40]} can't be read here.")
    try:
        return decompress(body, max_bytes, wbits=_WBITS[encoding])
    except zlib.error as error:
        raise bad_request(f"The body can't be decompressed: {error}.") from None


async def read_object(request: Request, max_bytes: int) -> Mapping[str, object]:
    """The JSON object of a body that may be empty. Raises Refusal(400) for another value."""
    body = await read_body(request, max_bytes)
    values = parse_json(body) if body else {}
    if not isinstance(values, dict):
        raise bad_request("The body must be a JSON object, or empty.")
    return values


async def read_inputs(body: bytes, content_type: str, preprocess: Preprocess) -> tuple[list[str], list[Raw]]:
    """Names and raw inputs in a body of /predict. Raises Refusal(400) or (415)."""
    media_type, _, _ = content_type.partition(";")
    media_type = media_type.strip().lower()
    if not body:
        raise bad_request("The body is empty.")
    if media_type == "multipart/form-data":
        named = await _read_form(body, content_type, preprocess)
    elif media_type == "application/json":
        named = [(f"#{i}", raw) for i, raw in enumerate(_read_json(body, preprocess))]
    else:
        allowed = preprocess.media_types
        if not allowed or not (media_type in ("", "application/octet-stream") or media_type.startswith(allowed)):
            raise Refusal(415, f"{media_type[:100]} can't be read here.")
        named = _split("#0", body, preprocess)
    if len(named) > MAX_FILES:
        raise bad_request(f"{len(named)} inputs are more than {MAX_FILES}.")
    return [name for name, _ in named], [raw for _, raw in named]


def _split(name: str, content: bytes, preprocess: Preprocess) -> list[tuple[str, Raw]]:
    try:
        return [*preprocess.split_upload(name, content)]
    except BadInput as error:
        raise bad_request(error.message) from None


def _read_json(body: bytes, preprocess: Preprocess) -> Sequence[Raw]:
    try:
        return preprocess.list_json(parse_json(body))
    except BadInput as error:
        raise bad_request(f"{error.message} {error.fix}".strip()) from None
    except UsageError as error:
        raise Refusal(415, error.message) from None


async def _read_form(body: bytes, content_type: str, preprocess: Preprocess) -> list[tuple[str, Raw]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        headers = Headers({"content-type": content_type})
        parser = MultiPartParser(headers, stream(), max_files=MAX_FILES, max_fields=MAX_FILES, max_part_size=1 << 20)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise bad_request(f"The form can't be read: {str(error)[:200]}.") from None
    named: list[tuple[str, Raw]] = []
    try:
        for _, part in form.multi_items():
            if isinstance(part, UploadFile):
                named += _split(part.filename or f"#{len(named)}", await part.read(), preprocess)
            elif preprocess.takes_strings:
                named.append((f"#{len(named)}", part))
    finally:
        await form.close()
    if not named:
        raise bad_request("The form has no file.")
    return named


def read_top(query: Mapping[str, str]) -> int | None:
    """Raises Refusal(400). None: not given."""
    top = query.get("top") or None
    if top is not None and (not top.isdecimal() or not 1 <= int(top[:9]) <= 10_000):
        raise bad_request("top must be a number from 1 to 10000.")
    return None if top is None else int(top[:9])


def read_threshold(query: Mapping[str, str]) -> float | None:
    """Raises Refusal(400). None: not given."""
    if not (text := query.get("threshold")):
        return None
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise bad_request("threshold must be a number from 0 to 1.")
    return threshold
