"""The options of a training in three records: what is learned, how it is computed, and, in `prepare.py`, where the data
is. Nothing in the second one changes what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from suanli.core.types import AnyPath, Json, Recipe, Tracker
from suanli.parallel.launch import RESTARTS

CHECKPOINT_EVERY_S = 60.0
HANG_S = 300.0  # without a step, until processes that wait for each other are ended


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What is learned."""

    recipe: str | Recipe | None = None  # None: the shipped one that suits the data
    changes: Mapping[str, object] = field(default_factory=dict)  # fields of the recipe that the user set
    weights: AnyPath | None = None  # to start from
    target_accuracy: float | None = None  # choose the cheapest training that is known to reach this fraction
    time_budget: str | float | None = None  # choose the best training that is done in time: seconds, or "5m"

    @property
    def given(self) -> list[str]:
        """The options that the user gave, by name."""
        others = {name: getattr(self, name) for name in ("recipe", "weights", "target_accuracy", "time_budget")}
        return [*self.changes, *(name for name, value in others.items() if value is not None)]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How it is computed, by the names of the command line."""

    device: str = "auto"
    speedups: str = "auto"
    threads: int | None = None
    nproc: str | int | None = None
    balance: bool = False
    shard: bool | None = None  # None: as the run that is resumed
    max_restarts: int = RESTARTS
    hang_timeout_s: float = HANG_S
    checkpoint_every_s: float = CHECKPOINT_EVERY_S
    track: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How often to save, whom to report to, and what the summary keeps of before."""

    trackers: Sequence[type[Tracker]] = ()
    checkpoint_every_s: float = CHECKPOINT_EVERY_S
    hang_s: float = HANG_S
    target_score: float | None = None  # that the user asked for
    shard: bool = False  # was requested, also where there is one process now
    processes: dict[str, Json] | None = None  # that train together, as preflight saw them; None: there is one
    prepare_s: float | None = None  # that preparing the data took; None: unknown
    earlier_s: float = 0.0  # of training before an interruption
    fallbacks: Sequence[Mapping[str, object]] = ()  # before an interruption
