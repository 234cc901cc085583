"""Times engines in turn, so that what slows the machine slows all of them alike.

Every round gives each engine a short turn with each batch size and number of threads; every other round goes through
the engines backwards. An engine that is far behind the best in all that the goal is about gets no further turns.

Taking turns is not enough where another program keeps a core busy: that slows an engine that computes with all threads
up to 50 times, one with one thread not at all, and libraries differ in how their threads wait. So a turn in which
threads waited for a core doesn't count, as long as every engine has another one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from suanli.core.console import Progress, plural, warn
from suanli.engines.candidates import Candidate, compute_speed
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine.timing import percentile

BATCHES = (1, 16, 64)  # for throughput, with all threads
TURN_S = 0.25  # of one engine in each round
ROUNDS = 5
MOST_ROUNDS = 10  # where other programs disturb
WARM_UP = 2  # calls that don't count
SLOW_S = 2.0  # a turn may take as long to make more calls
FAR_BEHIND = 1.5  # times the best engine's time
# A turn in which threads waited for a core for a larger share of their time. On a quiet machine it was at most 0.08, of
# all engines; beside a process that burned one of two cores, 0.34 to 0.52 with two threads and at most 0.04 with one.
DISTURBED = 0.2

Cell = tuple[int, int]  # batch size, number of threads


@dataclass(frozen=True, kw_only=True)
class Turn:
    seconds: list[float]  # of each call
    joules: float | None  # per input
    waited: float  # share of their time that threads waited for a core

    @property
    def is_quiet(self) -> bool:
        return self.waited <= DISTURBED


@dataclass
class Runner:
    """A candidate whose engine is loaded in a sandbox, with its turns."""

    candidate: Candidate
    sandbox: Sandbox
    turns: dict[Cell, list[Turn]] = field(default_factory=dict)
    racing: bool = True

    def is_quiet(self, cell: Cell) -> bool:
        return any(turn.is_quiet for turn in self.turns.get(cell, ()))

    def median_s(self, cell: Cell) -> float:
        return percentile([s for turn in self._counted(cell) for s in turn.seconds], 0.5)

    def result(self, disturbed: Collection[Cell]) -> Candidate:
        speeds = []
        for cell in sorted(self.turns):
            turns = self._counted(cell)
            seconds = [s for turn in turns for s in turn.seconds]
            joules = [turn.joules for turn in turns]
            speeds.append(compute_speed(*cell, seconds, joules, disturbed=cell in disturbed))
        return replace(self.candidate, speeds=tuple(speeds))

    def _counted(self, cell: Cell) -> list[Turn]:
        return [turn for turn in self.turns[cell] if turn.is_quiet] or self.turns[cell]


@dataclass(frozen=True, kw_only=True)
class EngineTimer:
    examples: Path  # a folder of examples
    batches: bool  # whether one call may hold several
    threads: int  # all that there are
    input_s: float  # the reference's time per input, roughly
    goal: str

    def time(self, runners: Sequence[Runner], room_s: float) -> set[Cell]:
        """Time the runners for at most `room_s` seconds, but each at least once. The first is the reference, which
        gets a turn in every round: gains are relative to it. Gives the cells whose times can't be compared."""
        until = time.monotonic() + room_s
        cells = self._choose_cells(len(runners), room_s)
        with Progress("Timing", ROUNDS) as progress:
            for number in range(MOST_ROUNDS):
                racing = [r for r in runners if r.racing]
                started = time.monotonic()
                for cell in cells:
                    if number == 0 and cell != cells[0] and time.monotonic() > until:
                        cells = [timed for timed in cells if timed < cell]
                        break
                    for runner in racing if number % 2 == 0 else racing[::-1]:
                        self._take_turn(runner, *cell)
                self._drop_slow(runners, cells)
                progress.update(min(number + 1, ROUNDS))
                if number + 1 >= ROUNDS and not self._find_disturbed(runners):
                    break
                if time.monotonic() + (time.monotonic() - started) > until:
                    break
        disturbed = self._find_disturbed(runners)
        if not disturbed:
            return disturbed
        if disturbed >= {cell for r in runners if r.racing for cell in r.turns}:
            warn("Other programs use this machine and slow down every engine: without them, another may be the best.")
            return set()
        what = ", ".join(f"{plural(threads, 'thread')} with batches of {batch}" for batch, threads in sorted(disturbed))
        warn(f"Other programs use this machine, so some times can't be compared and don't count: {what}.")
        return disturbed

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
            runner.turns.clear()
            runner.candidate = replace(runner.candidate, state="lost", reason=f"while it was timed: {error}")
            return
        joules = None if reply["joules"] is None else reply["joules"] / (batch * len(reply["seconds"]))
        turn = Turn(seconds=reply["seconds"], joules=joules, waited=reply["waited"])
        runner.turns.setdefault((batch, threads), []).append(turn)

    def _drop_slow(self, runners: Sequence[Runner], cells: Sequence[Cell]) -> None:
        racing = [r for r in runners if r.racing]
        if not racing:
            return
        relevant = [cell for cell in cells if (cell[0] == 1) == (self.goal == "latency")] or cells
        relevant = [cell for cell in relevant if all(r.is_quiet(cell) for r in racing)]
        best = {cell: min(r.median_s(cell) for r in racing) for cell in relevant}
        for runner in racing[1:]:
            runner.racing = not best or any(runner.median_s(cell) <= FAR_BEHIND * best[cell] for cell in relevant)

    def _find_disturbed(self, runners: Sequence[Runner]) -> set[Cell]:
        """The cells in which an engine that is still racing had no quiet turn."""
        racing = [r for r in runners if r.racing]
        return {cell for r in racing for cell in r.turns if not r.is_quiet(cell)}
