"""Predicts the speed of many processes from what `suanli bench DATA --scaling` measured with a few.

    python benchmarks/scaling_model.py runs/DATA-scaling-1/scaling.json
    python benchmarks/scaling_model.py SCALING.JSON --per-host 8 --gbit 100 --latency-us 5    # between hosts

A step of n processes takes compute(share of the batch) + the exposed part of the all-reduce + the wait for the slowest.
The processes are like those of the largest measured group, each with a device (or threads) of its own.

Sources. All-reduce as a ring: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", JPDC 2009. Time of a message as latency + bytes / bandwidth: R. Hockney, "The communication challenge for
MPP", Parallel Computing 1994. Buckets that are summed during the backward pass: S. Li et al., "PyTorch Distributed",
VLDB 2020. A fixed batch (strong scaling): G. Amdahl, AFIPS 1967; a fixed share (weak scaling): J. Gustafson, CACM 1988.
The largest of n normal values: G. Blom, "Statistical Estimates and Transformed Beta-Variables", 1958.
docs/scaling.md has the formulas, and what the model leaves out.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

MOST = 1024  # processes
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes: the defaults of DistributedDataParallel
BACKWARD = 2 / 3  # of computing, assumed: two of the three matrix products of a layer


@dataclass(frozen=True)
class Link:
    """Between neighbours of a ring."""

    latency_s: float
    bytes_per_s: float


def all_reduce_s(size: float, n: int, link: Link) -> float:
    """A ring: 2 (n - 1) turns, in each of which every process sends an n-th."""
    return 2 * (n - 1) * (link.latency_s + size / n / link.bytes_per_s)


def link_of(size: dict[str, Any]) -> Link:
    """From an all-reduce of one number and one of the gradients."""
    turns, n = 2 * (size["processes"] - 1), size["processes"]
    sent_s = size["all_reduce_s"] - size["latency_s"]
    bandwidth = turns / n * size["gradient_bytes"] / sent_s if sent_s > 0 else math.inf
    return Link(size["latency_s"] / turns, bandwidth)


def exposed_s(bucket_s: list[float], backward_s: float) -> float:
    """The communication after the backward pass. Buckets fill at even intervals, the last at the end of the pass, and
    are summed one after the other."""
    end_s = 0.0
    for number, took_s in enumerate(bucket_s, start=1):
        end_s = max(end_s, backward_s * number / len(bucket_s)) + took_s
    return end_s - backward_s


def slowest(n: int) -> float:
    """The expected distance of the largest of n normal values from the mean, in standard deviations."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25))


class Model:
    def __init__(self, measured: dict[str, Any], between: Link | None = None, per_host: int = MOST) -> None:
        """Raises ValueError where only one process was measured, KeyError for a file of another version."""
        self.last = last = measured["sizes"][-1]
        if last["processes"] < 2:
            raise ValueError("only one process was measured")
        self.within, self.between, self.per_host = link_of(last), between, per_host
        self.spread = last["wait_s"] / last["compute_s"] / slowest(last["processes"])
        # On a CPU, processes of smaller groups have more threads, so they are different.
        alike = [last] if measured["shared"] else measured["sizes"]
        self.fixed_s, self.each_s = line([(max(one["local_batch"]), one["compute_s"]) for one in alike])

    def compute_s(self, examples: int) -> float:
        return self.fixed_s + self.each_s * examples

    def link(self, n: int) -> Link:
        """Each turn of a ring takes as long as the slowest link in it."""
        if self.between is None or n <= self.per_host:
            return self.within
        latency_s = max(self.within.latency_s, self.between.latency_s)
        return Link(latency_s, min(self.within.bytes_per_s, self.between.bytes_per_s))

    def step_s(self, n: int, compute_s: float) -> float:
        size, link = self.last["gradient_bytes"], self.link(n)
        buckets = [min(size, FIRST_BUCKET)]
        buckets += [min(BUCKET, size - start) for start in range(FIRST_BUCKET, size, BUCKET)]
        shown_s = exposed_s([all_reduce_s(one, n, link) for one in buckets], BACKWARD * compute_s)
        shown_s += self.last["norms"] * 3 * (n - 1) * link.latency_s  # an all-gather forward, an all-reduce back
        wait_s = self.spread * compute_s * slowest(n)
        return compute_s + shown_s + wait_s


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, neither below 0, by least squares of relative errors; through 0 for a single x."""
    weights = [1 / (y * y) for _, y in points]
    xx, xy, x1, y1 = (
        sum(w * v for w, v in zip(weights, values, strict=True))
        for values in zip(*((x * x, x * y, x, y) for x, y in points), strict=True)
    )
    total = sum(weights)
    below = total * xx - x1 * x1
    slope = (total * xy - x1 * y1) / below if len({x for x, _ in points}) > 1 else xy / xx
    slope = max(0.0, slope)
    fixed = (y1 - slope * x1) / total if len({x for x, _ in points}) > 1 else 0.0
    return (fixed, slope) if fixed >= 0 else (0.0, xy / xx)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="SCALING.JSON")
    parser.add_argument("--per-host", type=int, default=1, help="processes of a host, with --gbit")
    parser.add_argument("--gbit", type=float, help="gigabits a second between hosts; default: all as measured")
    parser.add_argument("--latency-us", type=float, default=0.0, help="between hosts, in microseconds")
    args = parser.parse_args()
    scaling = json.loads(args.file.read_text())
    between = None if args.gbit is None else Link(args.latency_us * 1e-6, args.gbit * 1e9 / 8)
    try:
        model = Model(scaling, between, args.per_host)
    except (KeyError, ValueError) as error:
        parser.error(f"{args.file} has no use here ({error}). Measure: suanli bench DATA --scaling --processes 1,2")
    link = model.within
    print(f"link as measured: {1e6 * link.latency_s:.1f} µs, {link.bytes_per_s / 1e9:.2f} GB/s\n")
    print("Checked where it was measured, with computing as measured there:")
    for one in scaling["sizes"]:
        rate = sum(one["local_batch"]) / model.step_s(one["processes"], one["compute_s"])
        measured = one["images_per_s"]["median"]
        print(
            f"{one['processes']:5} processes: {rate:.0f} images/s, measured {measured:.0f}: {rate / measured - 1:+.1%}"
        )
    batch, share = sum(model.last["local_batch"]), max(model.last["local_batch"])
    print(f"\nExpected, not measured: a fixed batch of {batch}, and a fixed share of {share} for each process")
    print("processes  images/s  efficiency     images/s  efficiency")
    for n in (1 << power for power in range(MOST.bit_length())):
        weak = model.step_s(n, model.compute_s(share))
        columns = f"{share * n / weak:11.0f} {model.compute_s(share) / weak:11.1%}"
        if n <= batch:
            strong = model.step_s(n, model.compute_s(-(-batch // n)))
            columns = f"{batch / strong:8.0f} {model.compute_s(batch) / n / strong:11.1%} {columns}"
        else:  # no example for each
            columns = f"{'–':>8} {'–':>11} {columns}"
        print(f"{n:9} {columns}")


if __name__ == "__main__":
    main()
