"""Several processes that know of each other, as torchrun would start them, without it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

MEMBER = Path(__file__).parent / "member.py"
SET_FLAGS, UP = 0x8914, 1  # SIOCSIFFLAGS and IFF_UP of Linux


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


def answers(done: Sequence[subprocess.CompletedProcess]) -> list:
    """What each has printed as JSON; all must have ended well."""
    assert [p.returncode for p in done] == [0] * len(done), done[0].stderr + done[-1].stderr
    return [json.loads(p.stdout) for p in done]


def secluded(count: int, arguments: Sequence[str]) -> list[subprocess.CompletedProcess]:
    """As `together`, in a network of their own: the counters of its loopback know nobody else. Skips where the system
    allows none."""
    unshare = [shutil.which("unshare") or pytest.skip("there is no unshare"), "--net", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system makes no network for a test")
    found = subprocess.run(
        [*unshare, sys.executable, __file__, str(count), *arguments], capture_output=True, text=True, check=True
    )
    return [subprocess.CompletedProcess(*process) for process in json.loads(found.stdout)]


def _loopback_up() -> None:
    with socket.socket() as made:
        name = b"lo".ljust(16, b"\0")
        fcntl.ioctl(made, SET_FLAGS, name + struct.pack("h22x", UP))


if __name__ == "__main__":
    _loopback_up()
    done = together(int(sys.argv[1]), sys.argv[2:])
    print(json.dumps([(p.args, p.returncode, p.stdout, p.stderr) for p in done]))
