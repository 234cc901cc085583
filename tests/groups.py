"""Runs several processes as one group, with the variables that torchrun would set."""

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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_group(
    count: int,
    arguments: Sequence[str],
    *,
    own: Callable[[int], Sequence[str]] = lambda _: (),
    timeout_s: float = 200,
) -> list[subprocess.CompletedProcess]:
    """Runs `count` Python processes with these arguments, and those that `own` gives for a rank. Returns when all have
    ended."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    if count == 1:
        common = {}
    processes = []
    for rank in range(count):
        own_variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} if common else {}
        environment = {**os.environ, **common, **own_variables, "OMP_NUM_THREADS": "1"}
        processes.append(
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
        for process in processes:
            out, err = process.communicate(timeout=timeout_s)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return done


def read_outputs(done: Sequence[subprocess.CompletedProcess]) -> list:
    """What each process printed, as JSON. All must have succeeded."""
    assert [p.returncode for p in done] == [0] * len(done), done[0].stderr + done[-1].stderr
    return [json.loads(p.stdout) for p in done]


def run_in_own_network(count: int, arguments: Sequence[str]) -> list[subprocess.CompletedProcess]:
    """As `run_group`, in a network of their own, whose loopback counters count nothing else. Skips the test where the
    system doesn't allow one."""
    unshare = [shutil.which("unshare") or pytest.skip("there is no unshare"), "--net", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system doesn't allow a network for a test")
    result = subprocess.run(
        [*unshare, sys.executable, __file__, str(count), *arguments], capture_output=True, text=True, check=True
    )
    return [subprocess.CompletedProcess(*process) for process in json.loads(result.stdout)]


def _bring_loopback_up() -> None:
    with socket.socket() as any_socket:
        name = b"lo".ljust(16, b"\0")
        fcntl.ioctl(any_socket, SET_FLAGS, name + struct.pack("h22x", UP))


if __name__ == "__main__":
    _bring_loopback_up()
    done = run_group(int(sys.argv[1]), sys.argv[2:])
    print(json.dumps([(p.args, p.returncode, p.stdout, p.stderr) for p in done]))
