"""What `model/engines/engines.json` holds about the search for the fastest engine.

Like `records.py`: every field may be absent, and an absent number isn't known.
"""

from __future__ import annotations

from suanli.reporting.speed_records import Difference, Number, Record


class Pace(Record):
    """Calls with one batch size and one number of threads."""

    batch: int | None = None
    threads: int | None = None
    p50_s: Number = None
    p95_s: Number = None
    p99_s: Number = None
    joules: Number = None  # of one input


class Candidate(Record):
    engine: str = "?"
    precision: str = "?"
    state: str = "?"
    reason: str = ""
    kept: tuple[str, ...] = ()
    score: Number = None
    difference: Difference | None = None
    drift: Number = None
    build_s: Number = None
    load_s: Number = None
    size_bytes: Number = None
    memory_bytes: Number = None
    speeds: tuple[Pace, ...] = ()
    best: bool = False  # none of the others is as good in every respect


class Found(Record):
    candidates: tuple[Candidate, ...] = ()  # the reference first
    chosen: Candidate | None = None
    goal: str | None = None
    examples: int | None = None  # of the exam
    of_examples: int | None = None  # that there are
    labelled: bool | None = None
    tolerance: Number = None
    graph: str | None = None  # why there is no ONNX graph
    budget_s: Number = None
    seconds: Number = None


class Machine(Record):
    device: str | None = None
    cores: int | None = None


class Engines(Record):
    machine: Machine = Machine()
    headline: str | None = None
    found: Found = Found()
