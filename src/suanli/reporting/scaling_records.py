"""What scaling.json holds, and `scaling` in summary.json, as the report reads it. Like `records.py`: every field may
be absent."""

from __future__ import annotations

from suanli.reporting.speed_records import Number, Record, Spread


class Link(Record):
    latency_s: Number = None
    bytes_per_s: Number = None


class Size(Record):
    """One number of processes that was measured; seconds are those of a step."""

    processes: int | None = None
    threads: int | None = None
    local_batch: tuple[int, ...] = ()
    speedups: tuple[str, ...] = ()
    images_per_s: Spread = Spread()
    speedup: Spread = Spread()
    efficiency: Number = None
    step_s: Number = None
    compute_s: Number = None
    wait_s: Number = None
    communication_s: Number = None
    exposed_s: Number = None
    hidden_s: Number = None
    buckets: tuple[int, ...] = ()
    norms: int | None = None
    link: Link | None = None


class Expected(Record):
    processes: int | None = None
    local_batch: int | None = None
    step_s: Number = None
    exposed_s: Number = None
    wait_s: Number = None
    images_per_s: Number = None
    efficiency: Number = None


class Checked(Record):
    """What the model says of a size that was measured; the difference is a fraction of what was measured."""

    processes: int | None = None
    images_per_s: Number = None
    difference: Number = None


class Expectations(Record):
    threads: int | None = None
    per_host: int | None = None
    within: Link | None = None
    between: Link | None = None
    share: int | None = None
    strong: tuple[Expected, ...] = ()
    weak: tuple[Expected, ...] = ()
    checked: tuple[Checked, ...] = ()


class Verdict(Record):
    limited_by: str | None = None
    said: str | None = None


class Scaling(Record):
    data: str | None = None
    model: str | None = None
    device: str | None = None
    cores: int | None = None
    batch_size: int | None = None
    rounds: int | None = None
    shared: bool = False  # all processes share the cores of one CPU
    as_trained: bool = False  # one process alone, and the training that this is about
    sizes: tuple[Size, ...] = ()
    verdict: Verdict = Verdict()
    expected: Expectations | None = None
