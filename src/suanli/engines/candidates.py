"""The result of a search for engines: every candidate with its figures, and which of them is the best for a goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from suanli.core.types import Count, Difference, Positive, PositiveCount
from suanli.engines.subject import Origin
from suanli.machine.timing import percentile

GOALS = ("latency", "throughput", "size", "energy")
CLEARLY_FASTER = 1.1  # what one thread alone has to be to win over all threads; the report has the same rule
TIE = 1.02  # costs up to this many times the lowest count as equal


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of one engine with one batch size and one number of threads, all rounds together."""

    batch: PositiveCount
    threads: PositiveCount
    calls: Count
    p50_s: Positive
    p95_s: Positive
    p99_s: Positive
    joules: Positive | None  # per input; None: no counter can be read
    disturbed: bool = False  # other programs had the cores, and those of other engines may have had them less

    @property
    def per_s(self) -> float:
        return self.batch / self.p50_s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over the examples, with its 95 % interval."""

    name: str  # what was measured, such as an output
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One engine in one precision, and all that was measured of it."""

    engine: str
    precision: str
    state: str = "waiting"  # "accepted", "refused", "lost", "impossible", "no time"
    reason: str = ""
    kept: tuple[str, ...] = ()  # nodes of the graph that stay in float32
    score: float | None = None  # the primary metric, on the evaluation examples
    difference: Difference | None = None  # the gain in it over the reference's
    drift: float | None = None  # mean distance (0 to about 1) to the reference's answers, by the task
    drifts: tuple[Estimate, ...] = ()  # where no labels were there: the distance due to each output
    agreement: Estimate | None = None  # likewise: the share of answers that decide as the reference's do
    build_s: float | None = None
    load_s: float | None = None
    size_bytes: Count | None = None
    memory_bytes: Count | None = None
    speeds: tuple[Speed, ...] = ()
    best: bool = False  # in the Pareto set of latency, throughput, size and score

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}" + (f" ({len(self.kept)} layers in float32)" if self.kept else "")

    def measured_loss(self) -> float:
        """Of the score; without labels, the share of answers that decide otherwise than the reference's."""
        if self.difference is not None:
            return -self.difference.median
        return 0.0 if self.agreement is None else 1 - self.agreement.value

    def latency(self) -> Speed | None:
        """With one input: with all threads, which larger batches need, unless one thread alone is clearly faster."""
        single = _comparable([s for s in self.speeds if s.batch == 1])
        most = max((s.threads for s in single), default=1)
        return min(single, key=lambda s: s.p50_s * (CLEARLY_FASTER if s.threads < most else 1), default=None)

    def throughput(self) -> Speed | None:
        return max(_comparable(self.speeds), key=lambda s: s.per_s, default=None)

    def cost(self, goal: str) -> float:
        """What `goal` minimises: seconds or joules per input, or bytes; infinite where it isn't known."""
        if goal == "size":
            return math.inf if self.size_bytes is None else self.size_bytes
        if goal == "energy":
            return min((s.joules for s in self.speeds if s.joules is not None), default=math.inf)
        speed = self.latency() if goal == "latency" else self.throughput()
        return math.inf if speed is None else speed.p50_s / speed.batch


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    candidates: tuple[Candidate, ...]  # the reference first
    chosen: Candidate
    goal: str
    examples: int  # on which answers were compared
    of_examples: int  # that there were
    labelled: bool
    tolerance: float  # the loss of the primary metric that is accepted, in its unit
    graph: str | None  # why there is no ONNX graph; None: there is
    budget_s: float
    seconds: float
    origin: Origin | None = None  # of the examples; None: of an older version

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def _comparable(speeds: Sequence[Speed]) -> Sequence[Speed]:
    """Those that nothing disturbed; all of them where there is none: then all engines were disturbed."""
    return [speed for speed in speeds if not speed.disturbed] or speeds


def compute_speed(
    batch: int,
    threads: int,
    seconds: Sequence[float],
    joules: Sequence[float | None],
    *,
    disturbed: bool = False,
) -> Speed:
    """From the seconds of every call, and the joules per input of every turn."""
    known = [j for j in joules if j is not None]
    p50, p95, p99 = (percentile(seconds, share) for share in (0.5, 0.95, 0.99))
    return Speed(
        batch=batch,
        threads=threads,
        calls=len(seconds),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        joules=percentile(known, 0.5) if known else None,
        disturbed=disturbed,
    )


def mark_best(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, with `best` set for the Pareto set of latency, throughput, size and score."""

    def costs(candidate: Candidate) -> tuple[float, ...]:
        return (*(candidate.cost(goal) for goal in ("latency", "throughput", "size")), candidate.measured_loss())

    usable = [c for c in candidates if c.state == "accepted" and c.speeds]
    return [
        replace(c, best=c in usable and not any(_beats(costs(other), costs(c)) for other in usable)) for c in candidates
    ]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def choose(candidates: Sequence[Candidate], goal: str, tolerance: float, max_latency_s: float | None) -> Candidate:
    """The candidate of lowest cost within the tolerance, and within `max_latency_s` (95th percentile) if any is. Of
    those within TIE of the lowest, one in float32 is preferred."""
    accepted = [c for c in candidates if c.state == "accepted" and c.speeds]
    # The search refuses proven losses only; here the measured loss has to be within the tolerance, too.
    accepted = [c for c in accepted if c.measured_loss() <= tolerance]
    if max_latency_s is not None:
        fast_enough = [c for c in accepted if (speed := c.latency()) is not None and speed.p95_s <= max_latency_s]
        accepted = fast_enough or accepted
    lowest = min(c.cost(goal) for c in accepted)
    ties = [c for c in accepted if c.cost(goal) <= lowest * TIE]
    return min(ties, key=lambda c: (c.precision != "float32", c.cost(goal)))
