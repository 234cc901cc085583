"""Ctrl-C and SIGTERM as a wish that is granted at the next safe place."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`by` is the signal that asked to stop, once one did."""

    signal: int | None = None

    def wait(self, seconds: float) -> None:
        """Until it is asked for, at most so long."""
        end = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Collects SIGINT and SIGTERM while the block runs; a second Ctrl-C stops at once."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(number: int, _: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal is None:
            stop.signal = number
            os.write(2, b"\nstopping after this step, saving the checkpoint ...\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
