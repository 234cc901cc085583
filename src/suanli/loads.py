"""Load on a server in words and numbers: what is asked of the generator, what came of it, and the figures of that.

Two kinds of load. **Closed loop**: N clients, each sends its next request when it has the answer to the last; this
finds a server's throughput, and hides its bad moments, because nobody asks while it stalls. **Open loop**: requests
are due at moments that were settled beforehand (Poisson or evenly spaced), and each latency counts from the moment at
which the request was due, not from when it could be sent; so a stall shows in every request that it held up
(G. Tene, "How NOT to Measure Latency": coordinated omission). Connections are bounded: a request that finds none free
waits, and that counts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from suanli.errors import SuanliError, UsageError
from suanli.measure import percentile, spread
from suanli.types import Json

MOST_REQUESTS = 3_000_000  # of one stretch: a hundred megabytes of latencies
MOST_CONNECTIONS = 4096
MOST_SECONDS = 3600.0
TIMEOUT_S = 10.0  # a request without an answer by then has failed
LAG_MS = 5.0  # a generator that is later than this in one case of a hundred was a limit itself
BUSY = 0.9  # so was one that computed for this share of the time
HELD = 2.0  # times the 99th percentile of the least load
LOST = 0.01  # of the offered requests


class ServerGone(SuanliError):
    """Nothing listens where requests go, or no more."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Requests, and where they go."""

    url: str  # of the server; the path is in the requests
    requests: tuple[bytes, ...]  # whole HTTP/1.1 requests, sent in turn

    @classmethod
    def of(cls, url: str, bodies: Sequence[bytes], headers: Mapping[str, str] | None = None) -> Target:
        """POST requests to `url`, one for each of `bodies`. Raises UsageError for no such address."""
        parts = address(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if not bodies or any(end in line for line in lines for end in "\r\n"):
            raise UsageError(f"There is nothing to send to {url}.", fix="Give a body, and headers of one line each.")
        head = "\r\n".join(lines).encode("latin-1", "replace")
        return cls(url=url, requests=tuple(b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(b), b) for b in bodies))


def address(url: str) -> SplitResult:
    """The parts of an http or https address. Raises UsageError for anything else."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port that is no number
        pass
    raise UsageError(f"{url!r} is no address of a server.", fix="Such as http://127.0.0.1:8000.")


@dataclass(frozen=True, kw_only=True)
class Load:
    """One stretch of requests. Raises UsageError for what can't be."""

    rate_per_s: float | None  # None: closed loop
    connections: int  # at most; in a closed loop, the clients
    seconds: float
    arrivals: Literal["poisson", "even"] = "poisson"
    seed: int = 0
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= MOST_CONNECTIONS:
            raise UsageError(f"{self.connections} connections can't be.", fix=f"Give 1 to {MOST_CONNECTIONS}.")
        for seconds in (self.seconds, self.timeout_s):
            if not 0 < seconds <= MOST_SECONDS:
                raise UsageError(f"{seconds:g} s can't be.", fix=f"Give more than 0 and at most {MOST_SECONDS:g}.")
        if self.rate_per_s is not None and not 0 < self.rate_per_s * self.seconds <= MOST_REQUESTS:
            raise UsageError(
                f"{self.rate_per_s:g} requests per second for {self.seconds:g} s can't be offered.",
                fix=f"Give a rate above 0 and at most {MOST_REQUESTS:,} requests in all.",
            )

    def moments(self, start: float) -> Iterator[float]:
        """When requests of an open loop are due, in order, from `start` on."""
        assert self.rate_per_s is not None
        draw, due, number = random.Random(self.seed), start, 0
        while True:
            number += 1
            due = (
                due + draw.expovariate(self.rate_per_s)
                if self.arrivals == "poisson"
                else start + number / self.rate_per_s
            )
            if due >= start + self.seconds:
                return
            yield due


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What came of a load. Latencies are in whole microseconds; in an open loop they count from the moment at which
    a request was due."""

    rate_per_s: float | None
    seconds: float
    offered: int  # requests that were due; in a closed loop, that were sent
    answered_s: float  # from its beginning until the last answer, at least `seconds`
    accepted_us: Sequence[int]
    refused_us: Sequence[int]
    refused_sent_us: Sequence[int]  # of the same, from when it began to be sent
    without_retry_after: int  # of the refused
    errors: dict[str, int]
    said: str  # the text of the first error that came with one
    waited: int  # requests that found no free connection
    lag_ms_p99: float  # how late the generator was, at its own schedule
    lag_ms_max: float
    cpu_share: float  # of one core, that the generator took

    @property
    def answered_per_s(self) -> float:
        """A server that is behind at the end of a load goes on at its own pace, which is its throughput."""
        return len(self.accepted_us) / self.answered_s


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one load, all its rounds together. None where there is nothing to tell of."""

    offered_per_s: float
    answered_per_s: float
    answered_half_iqr: float  # of the rounds
    refused_per_s: float
    errors_per_s: float
    p50_ms: float | None  # of accepted requests of all rounds, as are the next
    p95_ms: float | None
    p99_ms: float | None
    p99_half_iqr_ms: float | None  # of the rounds' own 99th percentiles
    max_ms: float | None
    refused_p99_ms: float | None  # time to the refusal
    refused_max_ms: float | None
    refused_sent_p99_ms: float | None  # from when the request began to be sent
    refused_sent_max_ms: float | None
    requests: int
    errors: dict[str, int]
    without_retry_after: int
    waited: int
    seconds: float
    rounds: int
    lag_ms_p99: float
    lag_ms_max: float
    cpu_share: float
    limited: bool  # the generator didn't keep up, so the server might be better than this

    def to_json(self) -> dict[str, Json]:
        return asdict(self)


def figures(rounds: Sequence[Stretch]) -> Figures:
    """Of rounds of one load. Raises ValueError for none."""
    accepted = [us for one in rounds for us in one.accepted_us]
    refused = [us for one in rounds for us in one.refused_us]
    refused_sent = [us for one in rounds for us in one.refused_sent_us]
    tails = [percentile(one.accepted_us, 0.99) / 1000 for one in rounds if one.accepted_us]
    seconds = sum(one.seconds for one in rounds)
    errors = sum((Counter(one.errors) for one in rounds), Counter[str]())
    lag_ms = percentile([one.lag_ms_p99 for one in rounds], 0.5)
    busy = percentile([one.cpu_share for one in rounds], 0.5)
    return Figures(
        offered_per_s=sum(one.offered for one in rounds) / seconds,
        answered_per_s=len(accepted) / sum(one.answered_s for one in rounds),
        answered_half_iqr=spread([one.answered_per_s for one in rounds]).half_iqr,
        refused_per_s=len(refused) / seconds,
        errors_per_s=errors.total() / seconds,
        p50_ms=_ms(accepted, 0.5),
        p95_ms=_ms(accepted, 0.95),
        p99_ms=_ms(accepted, 0.99),
        p99_half_iqr_ms=spread(tails).half_iqr if tails else None,
        max_ms=_ms(accepted, 1.0),
        refused_p99_ms=_ms(refused, 0.99),
        refused_max_ms=_ms(refused, 1.0),
        refused_sent_p99_ms=_ms(refused_sent, 0.99),
        refused_sent_max_ms=_ms(refused_sent, 1.0),
        requests=sum(one.offered for one in rounds),
        errors=dict(errors),
        without_retry_after=sum(one.without_retry_after for one in rounds),
        waited=sum(one.waited for one in rounds),
        seconds=seconds,
        rounds=len(rounds),
        lag_ms_p99=lag_ms,
        lag_ms_max=max(one.lag_ms_max for one in rounds),
        cpu_share=busy,
        limited=lag_ms > LAG_MS or busy > BUSY,
    )


def held(loads: Sequence[Figures]) -> Figures | None:
    """The largest of some offered loads that a server holds, as it does all below: the 99th percentile is within
    twice that of the least, and hardly any request is refused or fails. None: it doesn't even hold the least."""
    found = None
    ordered = sorted(loads, key=lambda one: one.offered_per_s)
    for one in ordered:
        least_ms = ordered[0].p99_ms
        lost = one.refused_per_s + one.errors_per_s
        if least_ms is None or one.p99_ms is None or one.p99_ms > HELD * least_ms or lost > LOST * one.offered_per_s:
            break
        found = one
    return found


def _ms(values_us: Sequence[int], share: float) -> float | None:
    return percentile(values_us, share) / 1000 if values_us else None
