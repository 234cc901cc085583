"""The web pages `/` and `/health`, and the files that they load from `/page/NAME`.

They are plain files from the folder `page`, read once. They have no template: everything that changes comes from
`/status` and `/predict`, so that a file keeps its entity tag. The headers allow a page to load files from this server
and to send requests to it, and nothing else: no inline script or style, no frame around it, no other address.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

FOLDER = "serving/page"
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def answer(request: Request) -> Response:
    """The page or file of a request's path, or 304 without content if the browser has it already: it keeps files, and
    asks each time whether they have changed."""
    path = request.scope["path"].rstrip("\n")  # a route ignores a line break at the end
    content, media_type, tag = files()[path]
    headers = {"Content-Type": media_type, "ETag": tag, "Cache-Control": "no-cache", **SECURITY}
    tags = [value.strip().removeprefix("W/") for value in request.headers.get("if-none-match", "").split(",")]
    if tag in tags or "*" in tags:  # by the weak comparison of RFC 9110, 13.1.2
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)


@cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Content, media type and entity tag by path. A request can name only these, never a path on disk."""
    by_path = {}
    for file in resources.files("suanli").joinpath(FOLDER).iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            path = {"page.html": "/", "health.html": "/health"}.get(file.name, f"/page/{file.name}")
            by_path[path] = (content, media_type, f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"')
    return by_path
