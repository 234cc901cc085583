"""What a server says while it runs: one line an event on standard error, as JSON where programs read it.

{"time": "2026-11-26T09:00:00.000Z", "level": "info", "event": "model ready", "model": "digits", …}
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Literal, TextIO

from suanli.types import Json

Style = Literal["auto", "json", "text", "none"]


class Log:
    """Safe to use from several threads. `requests`: each request is a line too, not only those that failed."""

    def __init__(self, style: Style = "auto", *, requests: bool = False, stream: TextIO | None = None) -> None:
        self.requests = requests
        self._stream = stream if stream is not None else sys.stderr
        self._style = style if style != "auto" else "text" if self._stream.isatty() else "json"
        self._lock = threading.Lock()

    def event(self, what: str, **fields: Json) -> None:
        self._write("info", what, fields)

    def warning(self, what: str, **fields: Json) -> None:
        self._write("warning", what, fields)

    def error(self, what: str, **fields: Json) -> None:
        self._write("error", what, fields)

    def _write(self, level: str, what: str, fields: dict[str, Json]) -> None:
        if self._style == "none":
            return
        now = datetime.now(UTC)
        if self._style == "json":
            time = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            values: dict[str, Json] = {"time": time, "level": level, "event": what} | fields
            line = json.dumps(values, ensure_ascii=False, default=str)
        else:
            told = " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())
            line = f"{now:%H:%M:%S} {'' if level == 'info' else level + ': '}{what} {told}".rstrip()
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more; the server goes on
                self._style = "none"


def _quoted(value: Json) -> str:
    """On one line, whatever a client put into it."""
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=True)
