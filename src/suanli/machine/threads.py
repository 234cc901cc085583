"""Python threads that call torch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def start_thread(work: Callable[[], object], *, name: str, pool: int) -> threading.Thread:
    """Starts a daemon thread in which an operation on the CPU uses `pool` threads, of its own as OpenMP has it; the
    number in all other threads stays."""
    used, ready = torch.get_num_threads(), threading.Event()

    def run() -> None:
        torch.get_num_threads()  # or the first operation would replace what is set here
        torch.set_num_threads(pool)
        ready.set()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    ready.wait()
    torch.set_num_threads(used)  # or threads that start later would begin with `pool`
    return thread
