"""Times engines in turn, so that what slows the machine slows all of them alike.

Every round gives each engine a short turn with each batch size and number of threads; every other round goes through
the engines backwards. An engine that is far behind the best in all that the goal is about gets no further turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from suanli.core.console import Progress
from suanli.engines.candidates import Candidate, compute_speed
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine.timing import percentile

BATCHES = (1, 16, 64)  # for throughput, with all threads
TURN_S = 0.25  # of one engine in each round
ROUNDS = 5
WARM_UP = 2  # calls that don't count
SLOW_S = 2.0  # a turn may take as long to make more calls
FAR_BEHIND = 1.5  # times the best engine's time

Cell = tuple[int, int]  # batch size, number of threads


@dataclass
class Runner:
    """A candidate whose engine is loaded in a sandbox, with the times of its calls."""

    candidate: Candidate
    sandbox: Sandbox
    times: dict[Cell, list[float]] = field(default_factory=dict)
    joules: dict[Cell, list[float | None]] = field(default_factory=dict)  # per input, of each turn
    racing: bool = True

    def result(self) -> Candidate:
        speeds = [compute_speed(*cell, times, self.joules[cell]) for cell, times in sorted(self.times.items())]
        return replace(self.candidate, speeds=tuple(speeds))


@dataclass(frozen=True, kw_only=True)
class EngineTimer:
    examples: Path  # a folder of examples
    batches: bool  # whether one call may hold several
    threads: int  # all that there are
    input_s: float  # the reference's time per input, roughly
    goal: str

    def time(self, runners: Sequence[Runner], room_s: float) -> None:
        """Time the runners for at most `room_s` seconds, but each at least once. The first is the reference, which
        gets a turn in every round: gains are relative to it."""
        until = time.monotonic() + room_s
        cells = self._choose_cells(len(runners), room_s)
        with Progress("Timing", ROUNDS) as progress:
            for number in range(ROUNDS):
                racing = [r for r in runners if r.racing]
                started = time.monotonic()
                for cell in cells:
                    if number == 0 and cell != cells[0] and time.monotonic() > until:
                        cells = [timed for timed in cells if timed < cell]
                        break
                    for runner in racing if number % 2 == 0 else racing[::-1]:
                        self._take_turn(runner, *cell)
                self._drop_slow(runners, cells)
                progress.update(number + 1)
                if time.monotonic() + (time.monotonic() - started) > until:
                    break

    def _choose_cells(self, runners: int, room_s: float) -> list[Cell]:
        """As many as one round has time for: first one input, then a few, with all threads."""
        sizes = BATCHES if self.batches else BATCHES[:1]
        cells: list[Cell] = []
        spent = 0.0
        for batch, threads in dict.fromkeys((*((size, self.threads) for size in sizes), (sizes[0], 1), (sizes[-1], 1))):
            calls = self._warm_up(batch) + self._least_calls(batch)
            turn_s = max(TURN_S, calls * batch * self.input_s * self.threads / threads)  # hardly any engine is slower
            spent += runners * turn_s
            if not cells or spent <= room_s:
                cells.append((batch, threads))
        return sorted(cells)

    def _least_calls(self, batch: int) -> int:
        """How many calls a turn has: the tail of latencies needs more, a slow network gets fewer."""
        return max(2, min(20 if batch == 1 else 3, int(SLOW_S / (batch * self.input_s))))

    def _warm_up(self, batch: int) -> int:
        return WARM_UP if batch * self.input_s < SLOW_S else 1

    def _take_turn(self, runner: Runner, batch: int, threads: int) -> None:
        if not runner.racing:
            return
        warm_up, least = self._warm_up(batch), self._least_calls(batch)
        try:
            reply = runner.sandbox.ask(
                60 + 10 * batch * self.input_s * self.threads / threads * (warm_up + least),
                "time",
                threads=threads,
                examples=str(self.examples),
                batch=batch,
                for_s=TURN_S,
                warm_up=warm_up,
                least=least,
            )
        except SandboxError as error:
            runner.racing = False
            runner.times.clear()
            runner.candidate = replace(runner.candidate, state="lost", reason=f"while it was timed: {error}")
            return
        runner.times.setdefault((batch, threads), []).extend(reply["seconds"])
        joules = None if reply["joules"] is None else reply["joules"] / (batch * len(reply["seconds"]))
        runner.joules.setdefault((batch, threads), []).append(joules)

    def _drop_slow(self, runners: Sequence[Runner], cells: Sequence[Cell]) -> None:
        racing = [r for r in runners if r.racing]
        if not racing:
            return
        relevant = [cell for cell in cells if (cell[0] == 1) == (self.goal == "latency")] or cells
        best = {cell: min(percentile(r.times[cell], 0.5) for r in racing) for cell in relevant}
        for runner in racing[1:]:
            runner.racing = any(percentile(runner.times[cell], 0.5) <= FAR_BEHIND * best[cell] for cell in relevant)
