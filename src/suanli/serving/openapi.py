"""What the server answers over HTTP, as an OpenAPI document: for people, and for programs that make or test clients."""

from __future__ import annotations

from suanli import __version__
from suanli.types import Json


def document() -> dict[str, Json]:
    return {"openapi": "3.1.0", "info": {"title": "suanli", "version": __version__}, "paths": {}}
