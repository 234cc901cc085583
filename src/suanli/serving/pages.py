"""The pages for people, `/` and `/health`, and what they load from `/page/NAME`.

Plain files from `page/`, read once and kept. There is no template: everything that changes comes from
`/status` and `/predict`, so one entity tag serves every visit. The headers let a page load and ask this server
and nothing else: no script or style inside the page, no frame around it, no address that it could send to.

What this doesn't do: routes and methods (see `http`).
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
    """The page or file of a request's path. A browser keeps it and asks each time whether its tag still holds; the
    answer to that is a 304 without content."""
    path = request.scope["path"].rstrip("\n")  # which a route takes, too
    content, media_type, tag = files()[path]
    headers = {"Content-Type": media_type, "ETag": tag, "Cache-Control": "no-cache", **SECURITY}
    known = [known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:  # by the weak comparison of RFC 9110, 13.1.2
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)


@cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Content, media type and entity tag by path. No path of a file is ever made of a request."""
    found = {}
    for file in resources.files("suanli").joinpath(FOLDER).iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            path = {"page.html": "/", "health.html": "/health"}.get(file.name, f"/page/{file.name}")
            found[path] = (content, media_type, f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"')
    return found
