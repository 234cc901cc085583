"""What training on more processes is expected to reach: a step, from what was measured of its parts.

A step of n processes that share a batch takes

    compute(local batch) + what of the gradients' all-reduce isn't hidden + the wait for the slowest

Sources. All-reduce as a ring: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", JPDC 2009; time of a message as latency + bytes / bandwidth: R. Hockney, "The communication challenge
for MPP", Parallel Computing 1994. Buckets that are summed while the backward pass goes on: S. Li et al., "PyTorch
Distributed", VLDB 2020. Strong scaling (the batch is fixed): G. Amdahl, AFIPS 1967; weak scaling (the share of a
process is fixed): J. Gustafson, CACM 1988. The largest of n normal values: G. Blom, "Statistical Estimates and
Transformed Beta-Variables", 1958.

Pure functions of plain numbers. What this doesn't know: links that several rings share, hosts that differ, input that
all processes read from one storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

MOST = 1024  # processes that are looked at
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, as torch's DistributedDataParallel has them if nobody says otherwise
IQR_OF_NORMAL = 2 * NormalDist().inv_cdf(0.75)  # in standard deviations

Point = tuple[float, float]


# --- the link -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between neighbours of a ring: seconds until the first byte is there, and bytes a second from then on."""

    latency_s: float
    bytes_per_s: float


FREE = Link(latency_s=0.0, bytes_per_s=math.inf)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`within`: between processes of one host. With more than `per_host` processes a ring also crosses `between`."""

    within: Link
    between: Link | None = None  # None: as within
    per_host: int | None = None  # None: all on one

    def link(self, processes: int) -> Link:
        """Of a ring over so many: each of its turns takes as long as the slowest link in it."""
        if self.between is None or self.per_host is None or processes <= self.per_host:
            return self.within
        if self.per_host == 1:
            return self.between
        return Link(
            latency_s=max(self.within.latency_s, self.between.latency_s),
            bytes_per_s=min(self.within.bytes_per_s, self.between.bytes_per_s),
        )


def all_reduce_s(size: float, processes: int, link: Link) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2 (n - 1) turns, in each of which every process sends an n-th."""
    if processes == 1:
        return 0.0
    turns = 2 * (processes - 1)
    return turns * link.latency_s + turns / processes * size / link.bytes_per_s


def fit_link(measured: Sequence[Point], processes: int) -> Link:
    """From (bytes, seconds) of all-reduces over `processes`, at least two: least squares of relative errors, so that
    the small ones count as much as the large ones. Raises ValueError for fewer than two processes or points."""
    if processes < 2:
        raise ValueError("one process has no link")
    fixed_s, per_byte_s = line(measured)
    turns = 2 * (processes - 1)
    bandwidth = turns / processes / per_byte_s if per_byte_s else math.inf
    return Link(latency_s=fixed_s / turns, bytes_per_s=bandwidth)


def line(points: Sequence[Point]) -> Point:
    """Intercept and slope, neither below 0, with the least squares of relative errors. Raises ValueError for fewer
    than two different x."""
    if len({x for x, _ in points}) < 2:
        raise ValueError("a line needs two points")
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    together = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = together / sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    intercept = mean_y - slope * mean_x
    if slope < 0:
        return mean_y, 0.0
    if intercept < 0:  # then the best slope of a line through the origin
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        return 0.0, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares
    return intercept, slope


# --- the gradients --------------------------------------------------------------------------


def buckets(sizes: Iterable[int], first: int = FIRST_BUCKET, later: int = BUCKET) -> tuple[int, ...]:
    """Bytes of each bucket in which gradients are summed, in the order in which the backward pass fills them: from
    the last parameter to the first, each closed once it has reached its limit. `sizes`: bytes of each parameter."""
    filled: list[int] = []
    current = 0
    for size in reversed(list(sizes)):
        current += size
        if current >= (later if filled else first):
            filled.append(current)
            current = 0
    return tuple([*filled, current] if current else filled)


def exposed_s(bucket_s: Sequence[float], backward_s: float) -> float:
    """What of the all-reduces comes after the backward pass. Buckets are taken to fill at even distances, the last
    one at its end; they are summed one after the other."""
    late_s = -backward_s  # against the end of the backward pass
    for number, took_s in enumerate(bucket_s, start=1):
        late_s = max(late_s, backward_s * (number / len(bucket_s) - 1)) + took_s
    return max(0.0, late_s)


# --- a step ---------------------------------------------------------------------------------


def wait_s(spread_s: float, processes: int) -> float:
    """How much later than the mean the last of n processes is done, whose times are normal with a standard deviation
    of `spread_s`: Blom's approximation. Heavier tails make it more."""
    return spread_s * NormalDist().inv_cdf((processes - 0.375) / (processes + 0.25))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process does in a step, as it was measured."""

    compute: tuple[Point, ...]  # examples and the seconds of a step without communication; at least one
    backward_share: float  # of these seconds
    buckets: tuple[int, ...]  # bytes of the gradients
    relative_spread: float = 0.0  # standard deviation of these seconds over their mean
    norms: int = 0  # layers that ask the other processes: an all-gather on the way forward, an all-reduce back

    def compute_s(self, examples: float) -> float:
        """Linear between what was measured; beyond, by a fixed cost and one for each example."""
        points = sorted(self.compute)
        for (x, y), (other_x, other_y) in pairwise(points):
            if x <= examples <= other_x:
                return y + (other_y - y) * (examples - x) / (other_x - x)
        x, y = points[0] if examples < points[0][0] else points[-1]
        slope = line(points)[1] if len(points) > 1 else y / x
        return y + min(slope, y / x) * (examples - x)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of one number of processes; seconds are those of a step."""

    processes: int
    local_batch: int  # of the process that has the most
    compute_s: float
    communication_s: float  # all-reduces of the gradients, hidden or not
    exposed_s: float  # what isn't hidden of all communication
    wait_s: float
    images_per_s: float
    efficiency: float  # the rate over that of as many processes without loss

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s + self.wait_s


def expect(work: Work, cluster: Cluster, *, processes: int, batch: int, alone_s: float) -> Expected:
    """A step on `batch` examples of `processes` together; without loss it would take `alone_s` / `processes`. Raises
    ValueError for more processes than examples."""
    if not 1 <= processes <= batch:
        raise ValueError(f"{batch} examples for {processes} processes")
    local, link = -(-batch // processes), cluster.link(processes)
    compute_s = work.compute_s(local)
    bucket_s = [all_reduce_s(size, processes, link) for size in work.buckets]
    # Nothing can be computed while a layer waits for the statistics of the others; they are a few kilobytes.
    asked_s = work.norms * 3 * (processes - 1) * link.latency_s
    shown_s = exposed_s(bucket_s, work.backward_share * compute_s) + asked_s
    late_s = wait_s(work.relative_spread * compute_s, processes)
    step_s = compute_s + shown_s + late_s
    return Expected(
        processes=processes,
        local_batch=local,
        compute_s=compute_s,
        communication_s=sum(bucket_s),
        exposed_s=shown_s,
        wait_s=late_s,
        images_per_s=batch / step_s,
        efficiency=alone_s / processes / step_s,
    )


def doublings(most: int = MOST) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def strong(work: Work, cluster: Cluster, batch: int, counts: Iterable[int]) -> list[Expected]:
    """A fixed batch on more and more processes, as far as it has an example for each."""
    alone_s = work.compute_s(batch)
    return [expect(work, cluster, processes=n, batch=batch, alone_s=alone_s) for n in counts if n <= batch]


def weak(work: Work, cluster: Cluster, share: int, counts: Iterable[int]) -> list[Expected]:
    """A fixed share for each process: the batch grows with their number."""
    alone_s = work.compute_s(share)
    return [expect(work, cluster, processes=n, batch=share * n, alone_s=alone_s * n) for n in counts]
