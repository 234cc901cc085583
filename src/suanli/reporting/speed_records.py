"""What the files of a run hold about speed: the plan, the diagnosis, the roofline, the bench.

Like `records.py`: every field may be absent, and an absent number isn't known.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

Number = float | None  # None and NaN: not known


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


# --- summary.json ---------------------------------------------------------------------------


class Trial(Record):
    change: str = "?"
    kept: bool = False
    reason: str = ""
    ratio: Number = None
    spread: Number = None
    rounds: int | None = None
    error: Number = None
    step_s: Number = None


class Plan(Record):
    device: str | None = None
    speedups: tuple[str, ...] = ()
    threads: int | None = None
    dropped: dict[str, str] = {}
    origin: str | None = None
    seconds: Number = None
    trials: tuple[Trial, ...] = ()


class Diagnosis(Record):
    shares: dict[str, Number] = {}
    step_s: Number = None
    steps: int | None = None
    limited_by: str | None = None
    verdict: str | None = None
    remedy: str | None = None
    applied: tuple[str, ...] = ()
    gain_at_most: Number = None


class Fallback(Record):
    step: int | None = None  # after which it happened
    said: str = ""
    speedups: tuple[str, ...] | None = None  # in use from then on


# --- roofline.json --------------------------------------------------------------------------


class Ceilings(Record):
    matmul_flops: dict[str, Number] = {}
    conv_flops: dict[str, Number] = {}
    memory_bytes_per_s: Number = None
    steady: bool | None = None


class Layer(Record):
    name: str = "?"
    kind: str = "?"
    flops: Number = None
    bytes: Number = None
    seconds: Number = None


class Roofline(Record):
    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    ceilings: Ceilings | None = None
    flops_per_example: Number = None
    layers: tuple[Layer, ...] = ()


# --- bench.json -----------------------------------------------------------------------------


class Spread(Record):
    median: Number = None
    half_iqr: Number = None


class Figures(Record):
    """Of training or of evaluation; the percentiles are of a step or of a batch."""

    examples_per_s: Spread = Spread()
    ratio: Spread = Spread()
    step_ms_p50: Number = None
    step_ms_p95: Number = None
    batch_ms_p50: Number = None
    batch_ms_p95: Number = None
    peak_memory_bytes: Number = None
    share_of_ceiling: Number = None
    joules_per_example: Number = None
    examples_per_price: Number = None


class Difference(Record):
    median: Number = None
    low: Number = None
    high: Number = None


class Rung(Record):
    name: str = "?"
    train: Figures | None = None
    evaluate: Figures | None = None
    scores: dict[str, Number] = {}
    difference: Difference | None = None
    again: Difference | None = None  # with another seed, where the first one is a loss
    refused: str | None = None
    failed: bool = False  # refused because it doesn't run, not because of its score


class Bench(Record):
    device: str | None = None
    batch_size: int | None = None
    rounds: int | None = None
    steps: int | None = None
    planned_steps: int | None = None
    validation_examples: int | None = None
    headline: str | None = None
    tolerance: Number = None
    price_per_hour: Number = None
    plan: Plan | None = None
    rungs: tuple[Rung, ...] = ()


# --- scaling.json ---------------------------------------------------------------------------


class ScalingSize(Record):
    """One number of processes; seconds are those of a step."""

    processes: int | None = None
    threads: int | None = None
    images_per_s: Spread = Spread()
    speedup: Spread = Spread()
    efficiency: Number = None
    step_s: Number = None
    compute_s: Number = None
    wait_s: Number = None
    exposed_s: Number = None
    all_reduce_s: Number = None


class ScalingVerdict(Record):
    said: str = ""


class Scaling(Record):
    data: str | None = None
    model: str | None = None
    device: str | None = None
    batch_size: int | None = None
    sizes: tuple[ScalingSize, ...] = ()
    verdict: ScalingVerdict = ScalingVerdict()
