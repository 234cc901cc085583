"""Ctrl-C and SIGTERM as a wish that is granted at the next safe place."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """`by` is the signal that asked to stop, once one did."""

    by: int | None = None

    def wait(self, seconds: float) -> None:
        """Until it is asked for, at most so long."""
        end = time.monotonic() + seconds
        while self.by is None and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Collects SIGINT and SIGTERM while the block runs; a second Ctrl-C stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(number: int, _: FrameType | None) -> None:
        if stop.by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.by is None:
            stop.by = number
            os.write(2, b"\nstopping after this step, saving the checkpoint ...\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
