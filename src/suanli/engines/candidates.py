"""What a search for engines found: every candidate with its figures, and which of them is the best for a goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from suanli.core.types import Difference, Json
from suanli.machine.timing import percentile

GOALS = ("latency", "throughput", "size", "energy")
CLEARLY = 1.1  # times as fast has one thread to be; the report has the same rule
CLOSE = 1.02  # times the least: as good


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Calls of one engine with one batch size and one number of threads, all rounds together."""

    batch: int
    threads: int
    calls: int
    p50_s: float
    p95_s: float
    p99_s: float
    joules: float | None  # of one input; None: no counter can be read

    @property
    def per_s(self) -> float:
        return self.batch / self.p50_s


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One engine in one precision, and all that was found about it."""

    engine: str
    precision: str
    state: str = "waiting"  # "accepted", "refused", "lost", "impossible", "no time"
    reason: str = ""
    kept: tuple[str, ...] = ()  # nodes that its lower precision left alone
    score: float | None = None  # the primary metric, on the evaluation examples
    difference: Difference | None = None  # to the reference's
    drift: float | None = None  # mean total variation distance (0 to 1) to the reference's answers
    build_s: float | None = None
    load_s: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    speeds: tuple[Speed, ...] = ()
    best: bool = False  # none of the others is as good in every respect

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}" + (f" (rescued, {len(self.kept)} kept)" if self.kept else "")

    def latency(self) -> Speed | None:
        """With one input: with all threads, unless one alone is clearly faster, for larger batches want all."""
        alone = [s for s in self.speeds if s.batch == 1]
        most = max((s.threads for s in alone), default=1)
        return min(alone, key=lambda s: s.p50_s * (CLEARLY if s.threads < most else 1), default=None)

    def throughput(self) -> Speed | None:
        return max(self.speeds, key=lambda s: s.per_s, default=None)

    def cost(self, goal: str) -> float:
        """What `goal` wants least of; infinite where it isn't known."""
        if goal == "size":
            return math.inf if self.size_bytes is None else self.size_bytes
        if goal == "energy":
            return min((s.joules for s in self.speeds if s.joules is not None), default=math.inf)
        speed = self.latency() if goal == "latency" else self.throughput()
        return math.inf if speed is None else speed.p50_s / speed.batch


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search came to."""

    candidates: tuple[Candidate, ...]  # the reference first
    chosen: Candidate
    goal: str
    examples: int  # of the exam
    of_examples: int  # that there are
    labelled: bool
    tolerance: float
    graph: str | None  # why there is no ONNX graph; None: there is
    budget_s: float
    seconds: float

    def to_json(self) -> dict[str, Json]:
        return asdict(self)


def compute_speed(batch: int, threads: int, seconds: Sequence[float], joules: Sequence[float | None]) -> Speed:
    """From the seconds of every call, and the joules of one input in every turn."""
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
    )


def mark_best(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The Pareto set of latency, throughput, size and score is marked."""

    def wants(candidate: Candidate) -> tuple[float, ...]:
        score = 0.0 if candidate.score is None else candidate.score
        return (*(candidate.cost(goal) for goal in ("latency", "throughput", "size")), -score)

    usable = [c for c in candidates if c.state == "accepted" and c.speeds]
    return [
        replace(c, best=c in usable and not any(_beats(wants(other), wants(c)) for other in usable)) for c in candidates
    ]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def choose(candidates: Sequence[Candidate], goal: str, tolerance: float, max_latency_s: float | None) -> Candidate:
    """The least costly within the tolerance, and within `max_latency_s` (95th percentile) if any is; of those that are
    as good up to the spread, one that keeps float32."""
    accepted = [c for c in candidates if c.state == "accepted" and c.speeds]
    # A loss that isn't proven may be one all the same: what measured more than tolerated isn't chosen.
    accepted = [c for c in accepted if c.difference is None or c.difference.median >= -tolerance]
    if max_latency_s is not None:
        quick = [c for c in accepted if (speed := c.latency()) is not None and speed.p95_s <= max_latency_s]
        accepted = quick or accepted
    least = min(c.cost(goal) for c in accepted)
    close = [c for c in accepted if c.cost(goal) <= least * CLOSE]
    return min(close, key=lambda c: (c.precision != "float32", c.cost(goal)))
