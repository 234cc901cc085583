"""Groups of 1, 2, … processes that measure by turns, for `suanli bench --scaling`.

A group is started for each size, all of them at once. A round is asked for by a line on every process's standard input
and answered by a line on its standard output (`scaling.py`); until then a group waits without computing, so none
disturbs another. A process that ends or is silent ends all of them, with the last that it said.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from suanli import errors, hardware
from suanli.console import Progress
from suanli.errors import MachineError, SuanliError
from suanli.types import Json

ANSWER_S = 900.0  # for a round, or for getting ready with a plan
STOP_S = 10.0  # for a process to end
STARTER = ("WORLD_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "SLURM_STEP")  # variables that say who a process is


def measured(counts: Sequence[int], wanted: Mapping[str, Json], rounds: int) -> dict[int, list[Mapping[str, Json]]]:
    """What the groups say, by their size: of each round one answer."""
    told: dict[int, list[Mapping[str, Json]]] = {count: [] for count in counts}
    with ExitStack() as stack, Progress("Scaling", len(counts) * (1 + rounds)) as progress:
        groups = {}
        for place, count in enumerate(counts):  # one after the other: a plan is measured meanwhile
            groups[count] = stack.enter_context(group(count, wanted))
            groups[count].answer()
            progress.update(place + 1, f"{count} ready")
        for number in range(rounds):
            for place, count in enumerate(counts if number % 2 == 0 else counts[::-1]):
                groups[count].ask()
                told[count].append(groups[count].answer())
                progress.update(len(counts) * (1 + number) + place + 1, f"round {number + 1}")
    return told


class Members:
    """The processes of one group."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[bytes]]) -> None:
        self._processes, self._said = processes, said

    def ask(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(b"round\n")
                process.stdin.flush()
            except BrokenPipeError:
                continue  # `answer` tells that it has ended

    def answer(self) -> Mapping[str, Json]:
        """What the first process says, once all have said something. Raises what one of them raised, MachineError
        where one ended or is silent."""
        first: Mapping[str, Json] = {}
        for rank, line in self._lines():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise self._lost(rank) from error
            if "error" in value:
                raise getattr(errors, value["kind"], SuanliError)(value["error"], fix=value["fix"])
            if rank == 0:
                first = value
        return first

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """One line of each process, as they come."""
        until = time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(until - time.monotonic())
                if not ready:
                    count = len(self._processes)
                    raise MachineError(f"A group of {count} was silent for {ANSWER_S:g} s.", fix="Give fewer --steps.")
                for key, _ in ready:
                    process = self._processes[key.data]
                    assert process.stdout is not None
                    selector.unregister(process.stdout)
                    yield key.data, process.stdout.readline()

    def _lost(self, rank: int) -> MachineError:
        stream = self._said[rank]
        stream.seek(0)
        lines = stream.read().decode(errors="replace").strip().splitlines()
        why = f" It said: {lines[-1].strip()[:300]}" if lines else ""
        count = len(self._processes)
        return MachineError(
            f"Process {rank} of {count} ended before it had measured.{why}",
            fix="Where memory ran out, give fewer --processes or a smaller --batch-size.",
        )


@contextmanager
def group(count: int, wanted: Mapping[str, Json]) -> Iterator[Members]:
    """So many processes that know of each other; they end with the block."""
    threads = max(1, hardware.cores() // count)
    argument = json.dumps({**wanted, "threads": threads})
    command = [sys.executable, "-m", "suanli.scaling", argument]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plain = {k: v for k, v in os.environ.items() if k != "RANK" and not k.startswith(STARTER)}
    plain["OMP_NUM_THREADS"] = str(threads)
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                who = _who(rank, count, port) if count > 1 else {}
                pipe = subprocess.PIPE
                started.append(
                    subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said[rank], bufsize=0, env=plain | who)
                )
            yield Members(started, said)
        except BaseException:
            for process in started:  # the others may wait for one that is gone
                process.kill()
            raise
        finally:
            _end(started)


def _who(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """A process that waits for a line ends when there will be none; one that computes is ended."""
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
    until = time.monotonic() + STOP_S
    for process in started:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
