"""Several processes that know of each other, as torchrun would start them, without it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

MEMBER = Path(__file__).parent / "member.py"


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def together(
    count: int,
    arguments: Sequence[str],
    *,
    own: Callable[[int], Sequence[str]] = lambda _: (),
    timeout_s: float = 200,
) -> list[subprocess.CompletedProcess]:
    """Runs `count` Python processes with these arguments, and what `own` gives for a rank; all of them, when all have
    ended."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    if count == 1:
        common = {}
    started = []
    for rank in range(count):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} if common else {}
        environment = {**os.environ, **common, **who, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments, *own(rank)],
                stdout=-1,
                stderr=-1,
                text=True,
                env=environment,
                start_new_session=True,
            )
        )
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout_s)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return done
