"""Notices a process that hangs while the others wait for it, shows where it is, and ends it.

Processes that train together wait for the slowest at every step, so one that hangs holds up all of them. A thread in
each tells the others how far it is. Where nobody has moved for too long, those that are furthest behind are the ones
that the others wait for: they show the stacks of their threads and end, and whoever started the processes (torch's
elastic agent, Slurm) starts them anew from the newest checkpoint. A process that can't even tell how far it is (it was
stopped, or a library lets no thread run) is named by the others, who end instead.
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

from suanli.core.console import duration
from suanli.parallel.group import Group

EXIT_CODE = 75  # "try again later" in sysexits.h
BEAT_S = 2.0
PHASES = ("input", "compute", "loss")  # of a step, in order; in any other there is no telling who waits for whom

Position = tuple[int, str]  # the step and the phase in it


class Watchdog:
    """Runs from `start` to `stop`. `position` is asked from another thread."""

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
        every = min(BEAT_S, self._limit_s / 4)
        last, since, beats = self._position(), time.monotonic(), 0
        before: dict[int, dict[str, object]] = {}
        self._tell(beats, last)
        while not self._stop.wait(every):
            now, beats = self._position(), beats + 1
            if now != last:
                last, since = now, time.monotonic()
            self._tell(beats, last)
            still_s = time.monotonic() - since
            if still_s < self._limit_s or last[1] not in PHASES:
                before = {}
                continue
            seen = self._others()
            if not before:  # whose beat doesn't go on shows at the next look
                before = seen
                continue
            hanging = find_hanging(before, seen, self._group.size)
            if hanging:
                self._end(hanging, seen, still_s)
            before = {}

    def _tell(self, beats: int, position: Position) -> None:
        beat = {"beats": beats, "position": position, "host": socket.gethostname(), "pid": os.getpid()}
        assert self._group.store is not None
        self._group.store.set(f"beat/{self._group.rank}", json.dumps(beat))

    def _others(self) -> dict[int, dict[str, object]]:
        store, found = self._group.store, {}
        assert store is not None
        for rank in range(self._group.size):
            if store.check([f"beat/{rank}"]):
                found[rank] = json.loads(store.get(f"beat/{rank}"))
        return found

    def _end(self, hanging: list[int], seen: Mapping[int, Mapping[str, object]], still_s: float) -> None:
        """Ends this process. It shows its stack if it is one of those that hang; of the others, one tells who does."""
        rank = self._group.rank
        telling = min((r for r in seen if r not in hanging), default=rank)
        if rank in hanging:
            step, phase = self._position()
            print(
                f"suanli: process {rank} on {socket.gethostname()} has not moved for {duration(still_s)}, at step "
                f"{step}, phase {phase}. Its threads:",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        elif rank == telling:
            where = {r: f" on {beat['host']} (pid {beat['pid']})" for r, beat in seen.items()}
            names = ", ".join(f"{r}{where.get(r, '')}" for r in hanging)
            print(f"suanli: the others wait for process {names}; all end and start anew.", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(2 * min(BEAT_S, self._limit_s / 4))  # whose stack is wanted shows it before the first one ends
        os._exit(EXIT_CODE)


def find_hanging(
    before: Mapping[int, Mapping[str, object]], now: Mapping[int, Mapping[str, object]], size: int
) -> list[int]:
    """Ranks of the processes that the others wait for: those whose beat has stopped or never came, else those that are
    furthest behind. None, where one is busy with something that isn't a step."""
    silent = [r for r in range(size) if r not in now or (r in before and now[r]["beats"] == before[r]["beats"])]
    if silent:
        return silent
    positions: dict[int, Position] = {rank: tuple(beat["position"]) for rank, beat in now.items()}  # type: ignore[arg-type,misc]
    if any(phase not in PHASES for _, phase in positions.values()):
        return []  # it does something that takes its time, and the others wait for it
    places = {rank: (step, PHASES.index(phase)) for rank, (step, phase) in positions.items()}
    least = min(places.values())
    return [rank for rank, place in places.items() if place == least]
