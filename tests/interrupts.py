"""Signals in the process of the tests."""

from __future__ import annotations

import signal


def send(number: int) -> None:
    """Calls the handler of a signal as Python does. A real one to this process, which has loaded every engine, ended it
    by SIGSEGV now and then where the processor has AMX; processes of their own get real signals in other tests."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


def press_ctrl_c() -> None:
    send(signal.SIGINT)
