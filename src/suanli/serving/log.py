"""What a server says while it runs: one line an event on standard error, as JSON where programs read it.

{"time": "2026-11-26T09:00:00.000Z", "level": "info", "event": "model ready", "model": "digits", …}
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal, TextIO

from suanli.core.types import Json

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
            if not line.isprintable():  # what a client sent could move a terminal's cursor, or begin a line of its own
                line = json.dumps(values, default=str)
        else:
            told = " ".join(f"{key}={_quote(value)}" for key, value in fields.items())
            line = f"{now:%H:%M:%S} {'' if level == 'info' else level + ': '}{what} {told}".rstrip()
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more; the server goes on
                self._style = "none"


class _LibraryErrors(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)  # warnings are about what clients sent
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        told = f"{record.getMessage().strip()}: {error!r}" if error is not None else record.getMessage().strip()
        self._log.error("library", library=record.name, reason=told[:500])


@contextlib.contextmanager
def log_library_errors(log: Log) -> Iterator[None]:
    """What goes wrong in the libraries of a server is told in its log, and nothing of them beside it."""
    handler = _LibraryErrors(log)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _quote(value: Json) -> str:
    """On one line, whatever a client put into it."""
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=True)
