"""What people send to /predict: a form with files, one picture or text as it is, or texts in JSON."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from suanli.serving import protocol
from suanli.serving.protocol import Refusal, bad_request

FILES = 256  # of one request


async def read_inputs(body: bytes, kind: str, wanted: str) -> tuple[list[str], list[bytes | str]]:
    """Names and raw inputs of a request by people. Raises Refusal(400), or (415)."""
    media, _, _ = kind.partition(";")
    media = media.strip().lower()
    if not body:
        raise bad_request("The body is empty.")
    if media == "multipart/form-data":
        return await _read_form(body, kind, wanted)
    if media == "application/json":
        values = protocol.parse_json(body)
        texts = values.get("inputs") if isinstance(values, dict) else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise bad_request('The body is {"inputs": ["a text", …]}.')
        if wanted == "image":
            raise Refusal(415, "This model reads pictures: send files, as multipart/form-data, or one as it is.")
        if len(texts) > FILES:
            raise bad_request(f"{len(texts)} texts are more than {FILES}.")
        return [f"#{i}" for i in range(len(texts))], texts
    if media == "application/x-www-form-urlencoded" and wanted == "image":  # what curl says of --data-binary
        media = ""
    if media in ("", "application/octet-stream") or media.split("/")[0] == {"image": "image"}.get(wanted, "text"):
        return ["#0"], [body]
    raise Refusal(415, f"{media[:100]} can't be read here.")


async def _read_form(body: bytes, kind: str, wanted: str) -> tuple[list[str], list[bytes | str]]:
    async def stream() -> Any:
        yield body

    try:
        form = Headers({"content-type": kind})
        parser = MultiPartParser(form, stream(), max_files=FILES, max_fields=FILES, max_part_size=1 << 20)
        parts = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise bad_request(f"The form can't be read: {str(error)[:200]}.") from None
    names: list[str] = []
    raws: list[bytes | str] = []
    try:
        for _, part in parts.multi_items():
            if isinstance(part, UploadFile):
                names.append(part.filename or f"#{len(names)}")
                raws.append(await part.read())
            elif wanted == "text":
                names.append(f"#{len(names)}")
                raws.append(part)
    finally:
        await parts.close()
    if not raws:
        raise bad_request("The form has no file.")
    return names, raws
