"""The figures of processes that share each batch, as `scaling.json` holds them.

Only values: measuring is in `scaling.py`, and a report reads these classes without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, TypedDict

from pydantic import Field

from suanli.machine.timing import Spread


class ProcessRound(TypedDict):
    """What one process measured in one round."""

    steps_s: list[float]  # of the steps of all processes together
    alone_s: list[float]  # of steps of all processes at once, each by itself
    local_batch: int
    threads: int
    speedups: list[str]
    norms: int  # layers that communicate with the other processes
    gradient_bytes: int
    all_reduce_s: float  # of the gradients, by itself
    latency_s: float  # of an all-reduce of one number


@dataclass(frozen=True, kw_only=True)
class ScalingSize:
    """What one number of processes reached; seconds are those of a step."""

    processes: int
    threads: int  # CPU threads of each
    local_batch: tuple[int, ...]  # by rank
    speedups: tuple[str, ...]
    images_per_s: Spread
    speedup: Spread  # over one process with all threads
    efficiency: float
    step_s: float
    compute_s: float
    wait_s: float
    exposed_s: float
    norms: int  # layers that communicate with the other processes
    gradient_bytes: int
    all_reduce_s: float  # of the gradients, by itself
    latency_s: float  # of an all-reduce of one number


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the largest number of processes loses. The alias is the key of scaling.json."""

    limited_by: str | None  # the largest loss: a key of `lost_s`; None: nothing limits
    lost_s: Mapping[str, float] = field(default_factory=dict)  # seconds of a step
    sentences: Annotated[str, Field(alias="said")]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """All sizes of one network on one data set."""

    data: str
    model: str
    device: str
    cores: int
    batch_size: int
    rounds: int
    shared: bool  # the processes share the cores of one CPU; else each has its own device
    sizes: tuple[ScalingSize, ...]
    verdict: Verdict

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        values["verdict"]["said"] = values["verdict"].pop("sentences")
        return values
