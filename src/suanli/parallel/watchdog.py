"""Detects a process that hangs while the others wait for it, prints where it hangs, and ends it.

Processes that train together wait for the slowest at every step, so one that hangs stops all of them. A thread in each
publishes its position. When no process has moved for too long, the others wait for those that are furthest behind:
these print the stacks of their threads and exit, and the launcher (torch's elastic agent, Slurm) restarts all from the
newest checkpoint. A process that can't even publish its position (it was stopped, or a library blocks all threads) is
named by the others, which exit instead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypedDict

from suanli.core.console import duration
from suanli.parallel.group import Group

EXIT_CODE = 75  # "try again later" in sysexits.h
BEAT_S = 2.0
PHASES = ("input", "compute", "loss")  # of a step, in order; in others it is unknown who waits for whom

Position = tuple[int, str]  # the step and the phase in it


class Beat(TypedDict):
    """What a process publishes of itself."""

    beats: int  # so far
    position: Position
    host: str
    pid: int


class Watchdog:
    """Watches from `start` to `stop`, in a thread of its own that calls `position`."""

    def __init__(self, group: Group, position: Callable[[], Position], limit_s: float) -> None:
        self._group, self._position, self._limit_s = group, position, limit_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="suanli-watchdog", daemon=True)

    def start(self) -> None:
        if self._group.store is not None:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        interval_s = min(BEAT_S, self._limit_s / 4)
        last, since, beats = self._position(), time.monotonic(), 0
        before: dict[int, Beat] = {}
        self._publish(beats, last)
        while not self._stop.wait(interval_s):
            position, beats = self._position(), beats + 1
            if position != last:
                last, since = position, time.monotonic()
            self._publish(beats, last)
            still_s = time.monotonic() - since
            if still_s < self._limit_s or last[1] not in PHASES:
                before = {}
                continue
            now = self._read_beats()
            if not before:  # a beat that has stopped shows at the second look
                before = now
                continue
            hanging = find_hanging(before, now, self._group.size)
            if hanging:
                self._exit(hanging, now, still_s)
            before = {}

    def _publish(self, beats: int, position: Position) -> None:
        beat = Beat(beats=beats, position=position, host=socket.gethostname(), pid=os.getpid())
        assert self._group.store is not None
        self._group.store.set(f"beat/{self._group.rank}", json.dumps(beat))

    def _read_beats(self) -> dict[int, Beat]:
        store, beats = self._group.store, {}
        assert store is not None
        for rank in range(self._group.size):
            if store.check([f"beat/{rank}"]):
                beat: Beat = json.loads(store.get(f"beat/{rank}"))
                beats[rank] = beat
        return beats

    def _exit(self, hanging: list[int], beats: Mapping[int, Beat], still_s: float) -> None:
        """End this process. A process that hangs prints its stack; one of the others prints which hang."""
        rank = self._group.rank
        reporter = min((r for r in beats if r not in hanging), default=rank)
        if rank in hanging:
            step, phase = self._position()
            print(
                f"suanli: process {rank} on {socket.gethostname()} has not moved for {duration(still_s)}, at step "
                f"{step}, phase {phase}. Its threads:",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        elif rank == reporter:
            where = {r: f" on {beat['host']} (pid {beat['pid']})" for r, beat in beats.items()}
            names = ", ".join(f"{r}{where.get(r, '')}" for r in hanging)
            print(f"suanli: the others wait for process {names}; all exit and are restarted.", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(2 * min(BEAT_S, self._limit_s / 4))  # so that a hanging process prints its stack before any exits
        os._exit(EXIT_CODE)


def find_hanging(before: Mapping[int, Beat], now: Mapping[int, Beat], size: int) -> list[int]:
    """Ranks of the processes that the others wait for: those whose beat has stopped or never started, else those that
    are furthest behind. Empty while one is busy with something that isn't a step."""
    silent = [r for r in range(size) if r not in now or (r in before and now[r]["beats"] == before[r]["beats"])]
    if silent:
        return silent
    positions = {rank: beat["position"] for rank, beat in now.items()}
    if any(phase not in PHASES for _, phase in positions.values()):
        return []  # it may take long, and the others wait for it
    progress = {rank: (step, PHASES.index(phase)) for rank, (step, phase) in positions.items()}
    least = min(progress.values())
    return [rank for rank, reached in progress.items() if reached == least]
