"""Messages and progress while a verb works. All of it goes to standard error: standard output is for the verb's
result, so that `--json` and pipes stay clean.

A terminal gets colours and a live progress bar, a pipe a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_quiet = False
_mute = False
_console: Console | None = None


def console() -> Console:
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(stderr=True, highlight=False, soft_wrap=True)
    return _console


@contextmanager
def hide_progress() -> Iterator[None]:
    """Prints no progress and no remarks while the block runs; warnings and errors are still printed."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def mute() -> None:
    """Prints only errors from now on, in a process whose training another process reports."""
    global _quiet, _mute
    _quiet = _mute = True


def is_muted() -> bool:
    return _mute


def say(text: str) -> None:
    """Prints a remark about what is being done."""
    if not _quiet:
        console().print(text, markup=False)


def warn(text: str) -> None:
    """Prints what the user should know and may want to change."""
    from rich.text import Text

    if _mute:
        return
    console().print(Text.assemble(("warning: ", "yellow"), text))


class Progress:
    """Shows how far a long piece of work is. A context manager; `update(done, note)` reports progress."""

    PLAIN_INTERVAL_S = 5.0

    def __init__(self, title: str, total: float) -> None:
        self.title, self.total = title, total
        self._started = self._printed = time.monotonic()
        self._bar = None
        if not _quiet and console().is_terminal and sys.stderr.isatty():
            from rich import progress as rp

            self._bar = rp.Progress(
                rp.TextColumn("{task.description}"),
                rp.BarColumn(bar_width=28),
                rp.TaskProgressColumn(),
                rp.TimeRemainingColumn(compact=True),
                rp.TextColumn("{task.fields[note]}"),
                console=console(),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            _shown.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None and self in _shown:
            self._bar.stop()
            _shown.remove(self)

    def update(self, done: float, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if _quiet or now - self._printed < self.PLAIN_INTERVAL_S:
            return
        self._printed = now
        left = (now - self._started) * (self.total - done) / max(done, 1e-9)
        say(f"{self.title}: {100 * done / max(self.total, 1e-9):.0f} %, {duration(left)} left {note}".rstrip())


_shown: list[Progress] = []


def stop_progress() -> None:
    """Ends all bars, before an error is printed: one in a generator would otherwise end, and be drawn, after it."""
    for progress in [*_shown]:
        progress.__exit__()


def duration(seconds: float) -> str:
    """Seconds for people: '0.4 s', '48 s', '3 min 05 s', '2 h 10 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(count: float, noun: str, many: str | None = None) -> str:
    """ "1 example", "1,204 examples", "2 classes", "0.5 epochs"."""
    number = f"{int(count):,}" if count == int(count) else f"{count:g}"
    return f"{number} {noun if count == 1 else many or noun + 's'}"


def size(count: float) -> str:
    """Bytes for people, in powers of ten: '512 B', '1.2 MB', '3.4 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
