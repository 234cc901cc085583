"""The pages for people, `/` and `/health`, and what they load from `/page/NAME`.

Plain files from `templates/serve`, read once and kept. There is no template: everything that changes comes from
`/status` and `/predict`, so one entity tag serves every visit. The headers let a page load and ask this server
and nothing else: no script or style inside the page, no frame around it, no address that it could send to.

What this does not do: routes, methods and sending, which belong to `http.py`.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

FOLDER = "templates/serve"
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


def page(name: str) -> tuple[bytes, str] | None:
    """Content and media type of a request's path: "/", "/health" or "/page/NAME". None: there is no such page."""
    return _pages().get(name)


def headers(name: str) -> dict[str, str]:
    """The headers of that page's answer, but for its length. A browser keeps a page and asks each time whether
    its tag still holds (`is_current`); the answer to that is a 304 with these headers and no content.

    Raises KeyError where there is no such page.
    """
    _, media_type = _pages()[name]
    return {"Content-Type": media_type, "ETag": _tags()[name], "Cache-Control": "no-cache", **SECURITY}


def is_current(name: str, if_none_match: str) -> bool:
    """Whether an If-None-Match header names the page as it is, by the weak comparison of RFC 9110, 13.1.2."""
    if if_none_match.strip() == "*":
        return name in _tags()
    return _tags().get(name) in [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]


@cache
def _pages() -> dict[str, tuple[bytes, str]]:
    """Every page by its path. Only what lies in the folder can be asked for: no path is ever made of a request."""
    found = {}
    for file in resources.files("suanli").joinpath(FOLDER).iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            found[f"/page/{file.name}"] = (file.read_bytes(), media_type)
    found["/"] = found.pop("/page/page.html")
    found["/health"] = found.pop("/page/health.html")
    return found


@cache
def _tags() -> dict[str, str]:
    return {
        name: f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"' for name, (content, _) in _pages().items()
    }
