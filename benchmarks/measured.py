"""A command as a process of its own: how long it took from its start to its end, and how much memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    seconds: float
    memory_bytes: int  # the peak of the process, or of the largest one that it started and waited for
    output: str
    errors: str


def run_measured(command: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Ends this program where the command fails."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{texts[0][-2000:]}\n{texts[1][-4000:]}")
    return Measured(seconds=took, memory_bytes=usage.ru_maxrss * 1024, output=texts[0], errors=texts[1])
