"""A race: which of several ways to compute a step is the fastest, found with few timed steps on a noisy machine.

The entrants run in turn, one step each a round, every other round in reverse. After the first round those leave that
are hopeless, later after each round the worse half, but for those that are about as fast as the leader. The method is
successive halving (Karnin et al., "Almost Optimal Exploration in Multi-Armed Bandits", ICML 2013). Other programs only
ever add to the time of a step, so an entrant is judged by the lower quartile of its times.

A race times nothing itself: it names the next entrant and takes the seconds of its step. So it can run on copies of a
network, on a training's own steps, and in tests on any times.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from suanli.machine import timing
from suanli.machine.timing import Gain

ROUNDS = 8  # at most
HOPELESS = 1.8  # times as slow as the leader: leaves after its first round, where more than two run
NEAR = 1.06  # times as slow as the leader: stays, even in the worse half
CLEAR = 1.3  # times as fast as the last other: has won
FINAL = 5  # rounds from which any lead over the last other counts

Entrant = TypeVar("Entrant", bound=Hashable)


class Race(Generic[Entrant]):
    def __init__(
        self, entrants: Sequence[Entrant], *, rounds: int = ROUNDS, least_rounds: int = 2, turns: float = math.inf
    ) -> None:
        """`least_rounds` run before the worse half leaves. No round begins after so many turns. Raises ValueError for
        no entrants."""
        if not entrants:
            raise ValueError("a race needs entrants")
        self.entrants = tuple(dict.fromkeys(entrants))
        self.field = list(self.entrants)  # those that are still in the race
        self._rounds, self._least_rounds, self._turns_left = rounds, least_rounds, turns
        self._seconds: dict[Entrant, list[float]] = {entrant: [] for entrant in self.field}
        self._round = 0
        self._waiting = list(self.field)  # for their turn in this round

    @property
    def turn(self) -> Entrant | None:
        """Whose step is to be timed next; None: the race is over."""
        return self._waiting[0] if self._waiting else None

    def record(self, seconds: float) -> None:
        """The entrant whose turn it was took so long."""
        self._seconds[self._waiting.pop(0)].append(max(seconds, 1e-9))
        self._turns_left -= 1
        self._end_round()

    def withdraw(self, entrant: Entrant) -> None:
        """It can't run. The last one can't be withdrawn."""
        if entrant in self.field and len(self.field) > 1:
            self.field.remove(entrant)
            self.entrants = tuple(other for other in self.entrants if other != entrant)
            if entrant in self._waiting:
                self._waiting.remove(entrant)
            self._end_round()

    def _end_round(self) -> None:
        if self._waiting:
            return
        self._round += 1
        self._let_leave()
        if len(self.field) > 1 and self._round < self._rounds and self._turns_left > 0:
            self._waiting = self.field[:: -1 if self._round % 2 else 1]

    def _let_leave(self) -> None:
        ranked = self.ranking
        behind = [math.exp(self._score(entrant) - self._score(ranked[0])) for entrant in ranked]
        if self._round < self._least_rounds and len(ranked) > 2:
            kept = [entrant for entrant, times in zip(ranked, behind, strict=True) if times < HOPELESS]
        else:
            half = math.ceil(len(ranked) / 2)
            lead = math.inf if self._round < self._least_rounds else CLEAR if self._round < FINAL else NEAR
            if len(ranked) == 2 and behind[1] < lead:
                half = 2  # too close to tell after so few rounds
            kept = [
                e for place, (e, times) in enumerate(zip(ranked, behind, strict=True)) if place < half or times < NEAR
            ]
        self.field = [entrant for entrant in self.field if entrant in kept]

    def _score(self, entrant: Entrant) -> float:
        return timing.percentile([math.log(seconds) for seconds in self._seconds[entrant]], 0.25)

    @property
    def ranking(self) -> list[Entrant]:
        """Those in the race, the fastest first; of equals, the one that entered first."""
        timed = [entrant for entrant in self.field if self._seconds[entrant]]
        return sorted(timed, key=self._score) or self.field

    @property
    def leader(self) -> Entrant:
        return self.ranking[0]

    def best(self, count: int) -> list[Entrant]:
        """The fastest of all that ran, those that left among them, the fastest first."""
        timed = [entrant for entrant in self.entrants if self._seconds[entrant]]
        return sorted(timed, key=self._score)[:count]

    def seconds(self, entrant: Entrant) -> list[float]:
        """Of each round in which it ran."""
        return self._seconds[entrant]

    def gain(self, slow: Entrant, fast: Entrant) -> Gain:
        """How many times as fast the second is, over the rounds that both ran. Raises ValueError for no such rounds."""
        both = list(zip(self._seconds[slow], self._seconds[fast], strict=False))
        return timing.gain([a for a, _ in both], [b for _, b in both])
