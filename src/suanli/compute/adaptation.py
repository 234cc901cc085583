"""Which plan computes the next step of a training that is running.

A training that is too short for trials on copies races its plans on its own first steps. Later it watches: where steps
become much slower than they were, or threads wait for cores, other programs use the machine, and the training tries
what is fast beside them, such as fewer threads. It tries again from time to time, and goes back when the cores are
free.

An `Adaptation` times nothing and changes nothing itself: it takes the seconds of each step and decides how the next one
is computed. So tests can give it any times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.compute.plan_race import process_part
from suanli.compute.race import CLEAR, Race
from suanli.machine import timing
from suanli.machine.timing import Gain

SLOWER = 1.3  # times as long as a step of this plan takes usually: worth a second look
WAITING = 0.12  # of the time that threads waited for a core: the same
LEAST_STEPS, WINDOW_S = 2, 1.5  # steps and seconds, at least, that such a judgement needs
ASKED_EVERY_S = 1.0  # of training: what the kernel says of other programs
FREE = 0.3  # cores that others keep busy: fewer means that the cores are free
WORTH_CHANGING = 0.1  # a smaller gain brings no change
LOOK_TURN_S = 0.2  # of steps in each turn of a second look: other programs are scheduled in slices
LOOK_ROUNDS = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 4.0, 60.0  # of training between two looks, doubled while they bring nothing
MOST_STEPS = 4  # of a turn, where a step is short
KEPT = 2  # of a race, for the race on pictures of another size


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is computed."""

    speedups: tuple[str, ...]
    threads: int | None = None  # None: torch's default

    @property
    def process(self) -> tuple[object, ...]:
        """What shows its effect only from the second step on."""
        return (*process_part(self.speedups), self.threads)


PLAIN_WAY = Way(speedups=())


@dataclass(frozen=True, kw_only=True)
class Change:
    """What changed for good."""

    way: Way
    gain: Gain | None  # against what was before: plain PyTorch after a race; None: unknown
    race: Race[Way] | None  # the first one, where plans raced
    busy: bool = False  # because of other programs


class Adaptation:
    def __init__(
        self,
        planned: Way,
        *,
        entrants: Sequence[Way] = (),
        plain: Way = PLAIN_WAY,
        beside_others: Callable[[Way], Sequence[Way]] = lambda _: (),
        waiting: Callable[[], float] = lambda: 0.0,
        others: Callable[[], float | None] = lambda: None,
        turn_s: float = 0.0,
        turns: float = math.inf,
    ) -> None:
        """`entrants` race at first, where there are two or more; `plain` among them is plain PyTorch.
        `beside_others` gives the ways that may be faster than one on a busy machine; `waiting` the share of the time
        since its last call that threads waited for cores; `others` how many cores other programs kept busy since then
        (None: unknown). A turn of a race takes `turn_s` at least, and a race has so many `turns` at most."""
        self.planned = self.way = planned  # the best on a quiet machine; that of the next step
        self._beside_others, self._waiting, self._others = beside_others, waiting, others
        self._turn_s, self._most_turns = turn_s, turns
        self._entrants, self._plain = sorted(entrants, key=lambda way: str(way.process)), plain
        self._size = 1.0
        self._turns: _Turns | None = None
        self._proof: Race[Way] | None = None
        self._race: Race[Way] | None = None  # of plans, the newest
        self._first_race: Race[Way] | None = None
        self._usual_s: dict[tuple[Way, float], float] = {}
        self._window: deque[float] = deque(maxlen=50)
        self._since_look_s, self._since_asked_s = FIRST_PAUSE_S, 0.0
        self._pause_s = FIRST_PAUSE_S
        self._waited = False  # threads waited for cores when it was last asked
        self._before, self._before_s = planned, 0.0  # of a second look: the way that it is compared with
        self._others_then: float | None = None  # cores that others kept busy then

    def start(self, size: float) -> None:
        """The first step comes, on pictures whose sides are multiplied by `size`."""
        self._size = size
        if len(self._entrants) > 1:
            self._begin(Race(self._entrants, turns=self._most_turns), self._turn_s)

    @property
    def is_racing(self) -> bool:
        """Whether the plan itself isn't decided yet."""
        return self._turns is not None and self._turns.race in (self._race, self._proof)

    def record(self, seconds: float, size: float) -> Change | None:
        """A step of `way` took so long, and the next one comes, on pictures of this size. Returns what changed for
        good; `way` may change without that, for the turns of a race."""
        change = None
        if self._turns is None:
            self._watch(seconds)
        else:
            self._turns.record(seconds)
            if self._turns.race.turn is None:
                change = self._end(self._turns.race)
        if size != self._size:
            self._change_size(size)
        if self._turns is not None and self._turns.race.turn is not None:
            self.way = self._turns.race.turn
        return change

    def withdraw(self) -> Change | None:
        """The way that was to be tried can't be used. Returns what that changes for good."""
        assert self._turns is not None
        race = self._turns.race
        race.withdraw(self.way)
        if race.turn is None:
            return self._end(race)
        self.way = race.turn
        return None

    def _change_size(self, size: float) -> None:
        """What is fast on small pictures needn't be on large ones, so the best of the last race run again."""
        self._size = size
        self._window.clear()
        if self._race is None or (self._turns is None and self.way != self.planned):
            return
        best, self._turns = [way for way in self._race.best(KEPT + 1) if way != self._plain][:KEPT], None
        if len(best) > 1 and self._plain != self.planned:
            self._begin(Race(best, rounds=LOOK_ROUNDS), self._turn_s)
        else:
            self.way = self.planned

    def _begin(self, race: Race[Way], turn_s: float, *, look: bool = False) -> None:
        if not look:
            self._race, self._proof = race, None
            self._first_race = self._first_race or race
        self._turns = _Turns(race, turn_s)
        assert race.turn is not None
        self.way = race.turn

    def _end(self, race: Race[Way]) -> Change | None:
        self._turns = None
        if race is self._race:
            return self._end_race(race)
        if race is self._proof:
            plain, leader = race.entrants
            gain = race.gain(plain, leader)
            return self._decide(leader if gain.proven else plain, gain)
        return self._end_look(race)

    def _end_race(self, race: Race[Way]) -> Change | None:
        """The winner must be faster than plain PyTorch beyond doubt, else both run on fresh rounds."""
        plain, leader = self._plain, race.leader
        if plain not in race.entrants or leader == plain:
            return self._decide(leader, None)
        gain = race.gain(plain, leader)
        if gain.ratio > CLEAR:
            return self._decide(leader, gain)
        self._proof = Race([plain, leader], rounds=LOOK_ROUNDS)
        self._turns = _Turns(self._proof, self._turn_s)
        return None

    def _decide(self, way: Way, gain: Gain | None) -> Change:
        self.way = self.planned = way
        self._window.clear()
        return Change(way=way, gain=gain, race=self._first_race)

    # --- on a busy machine ---

    def _watch(self, seconds: float) -> None:
        self._window.append(seconds)
        self._since_look_s += seconds
        self._since_asked_s += seconds
        typical = self._typical()
        if typical is None:
            return
        key = self.way, self._size
        usual = self._usual_s[key] = min(self._usual_s.get(key, typical), typical)
        if self._since_look_s < self._pause_s or self._since_asked_s < ASKED_EVERY_S:
            return
        self._since_asked_s = 0.0
        waits, others = self._waiting() > WAITING, self._others()
        if waits and not self._waited:
            self._window.clear()  # to compare with steps since then
        elif self.way == self.planned:
            if waits or typical > SLOWER * usual:
                self._look([*self._beside_others(self.planned), *([] if waits else [self._plain])], typical, others)
        elif self._may_be_free(others):
            self._look([self.planned, *self._beside_others(self.planned)], typical, others)
        self._waited = waits

    def _typical(self) -> float | None:
        """The median seconds of the last steps; None where they are too few to tell."""
        total, count = 0.0, 0
        for seconds in reversed(self._window):
            total, count = total + seconds, count + 1
            if total >= WINDOW_S and count >= LEAST_STEPS:
                return timing.percentile(list(self._window)[-count:], 0.5)
        return None

    def _may_be_free(self, others: float | None) -> bool:
        """Whether it pays to try the planned way again: beside a busy program its steps may take many times as long."""
        if others is None or self._since_look_s > LONGEST_PAUSE_S:
            return True
        return others < FREE or self._others_then is None or abs(others - self._others_then) > 0.5

    def _look(self, ways: Sequence[Way], typical_s: float, others: float | None) -> None:
        """Try other ways, to compare them with the last steps of this one. Where steps are slow though nothing else
        uses the cores, plain PyTorch is among them: perhaps the plan was a product of noise."""
        entrants = [way for way in dict.fromkeys(ways) if way != self.way]
        if entrants:
            self._before, self._before_s, self._others_then = self.way, typical_s, others
            self._begin(Race(entrants, rounds=LOOK_ROUNDS), LOOK_TURN_S, look=True)

    def _end_look(self, race: Race[Way]) -> Change | None:
        gain = timing.gain([self._before_s] * len(race.seconds(race.leader)), race.seconds(race.leader))
        self._since_look_s = 0.0
        self._window.clear()
        if gain.ratio - 1 <= max(gain.spread, WORTH_CHANGING):
            self.way = self._before
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return None
        self.way, self._pause_s = race.leader, FIRST_PAUSE_S
        return Change(way=race.leader, gain=gain, race=None, busy=race.leader != self.planned)


class _Turns:
    """The turns of a race, each made of steps of a training. The first step of a turn isn't timed where its way is new
    or changes what shows its effect only later."""

    def __init__(self, race: Race[Way], turn_s: float) -> None:
        self.race, self._turn_s = race, turn_s
        self._seen: set[Way] = set()
        self._process: tuple[object, ...] | None = None
        self._steps: list[float] = []
        self._skip = True

    def record(self, seconds: float) -> None:
        way = self.race.turn
        assert way is not None
        if self._skip:
            self._skip = False
        else:
            self._steps.append(seconds)
        self._seen.add(way)
        self._process = way.process
        if self._steps and (sum(self._steps) >= self._turn_s or len(self._steps) == MOST_STEPS):
            self.race.record(timing.spread(self._steps).median)
            self._steps = []
            after = self.race.turn
            self._skip = after is not None and (after not in self._seen or after.process != self._process)
