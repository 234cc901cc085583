"""The log of a server: one line for each event on standard error, in JSON where it isn't a terminal.

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

Style = Literal["auto", "json", "text", "none"]


class Log:
    """Safe to use from several threads. `requests`: whether every request gets a line, and not only failed ones."""

    def __init__(self, style: Style = "auto", *, requests: bool = False, stream: TextIO | None = None) -> None:
        self.requests = requests
        self._stream = stream if stream is not None else sys.stderr
        self._style = style if style != "auto" else "text" if self._stream.isatty() else "json"
        self._lock = threading.Lock()

    def event(self, what: str, **fields: object) -> None:
        self._write("info", what, fields)

    def warning(self, what: str, **fields: object) -> None:
        self._write("warning", what, fields)

    def error(self, what: str, **fields: object) -> None:
        self._write("error", what, fields)

    def _write(self, level: str, what: str, fields: dict[str, object]) -> None:
        if self._style == "none":
            return
        now = datetime.now(UTC)
        if self._style == "json":
            time = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            values: dict[str, object] = {"time": time, "level": level, "event": what} | fields
            line = json.dumps(values, ensure_ascii=False, default=str)
            if not line.isprintable():  # text from a client could move a terminal's cursor or forge a line
                line = json.dumps(values, default=str)
        else:
            details = " ".join(f"{key}={_quote(value)}" for key, value in fields.items())
            line = f"{now:%H:%M:%S} {'' if level == 'info' else level + ': '}{what} {details}".rstrip()
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # the reader is gone; the server goes on
                self._style = "none"


class _LibraryErrors(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)  # their warnings are about bad clients
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        reason = f"{record.getMessage().strip()}: {error!r}" if error is not None else record.getMessage().strip()
        self._log.error("library", library=record.name, reason=reason[:500])


@contextlib.contextmanager
def log_library_errors(log: Log) -> Iterator[None]:
    """Meanwhile, errors that a library logs go to this log, and nothing that libraries log goes elsewhere."""
    handler = _LibraryErrors(log)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _quote(value: object) -> str:
    """One line, even where a client sent line breaks."""
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=True)
