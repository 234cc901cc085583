"""The figures of an ablation: what each change of a plan brings, as `bench.json` holds it.

Only values: measuring is in `ablation.py`, and a report reads these classes without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from suanli.core.console import plural
from suanli.core.task import format_score
from suanli.core.types import Difference, Plan, Positive
from suanli.machine.timing import STEADY


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The median over the rounds of one figure."""

    median: float
    half_iqr: float | None  # half the interquartile range; None: one round has no spread


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The cost of training or of evaluation with one variant, over the timed rounds."""

    rounds: int = 1  # that were timed
    examples_per_s: Estimate
    ratio: Estimate  # how many times as fast as plain PyTorch, paired by round
    peak_memory_bytes: int | None
    share_of_ceiling: float | None  # FLOP/s over what the device was measured to reach in that precision
    joules_per_example: float | None
    examples_per_price: float | None  # for one unit of the price's currency


@dataclass(frozen=True, kw_only=True)
class TrainingFigures(Figures):
    step_ms_p50: float
    step_ms_p95: float

    @property
    def percentiles_ms(self) -> tuple[float, float]:
        """Of one training step: p50 and p95."""
        return self.step_ms_p50, self.step_ms_p95


@dataclass(frozen=True, kw_only=True)
class EvaluationFigures(Figures):
    batch_ms_p50: float
    batch_ms_p95: float

    @property
    def percentiles_ms(self) -> tuple[float, float]:
        """Of one batch: p50 and p95."""
        return self.batch_ms_p50, self.batch_ms_p95


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same training, computed with a part of the plan."""

    name: str  # "plain PyTorch", "+ bf16"
    speedups: tuple[str, ...]  # all that are in use
    threads: int
    train: TrainingFigures | None  # None: it failed
    evaluate: EvaluationFigures | None
    scores: Mapping[str, float]  # on the validation split, after as many steps as all others
    difference: Difference | None  # of the primary metric to plain PyTorch's
    again: Difference | None  # the same with another seed, where the first one is a loss
    refused: str | None  # why
    failed: bool  # refused because it doesn't run, not because of its score

    @property
    def verdict(self) -> str:
        """ "failed", "refused", or nothing."""
        if self.failed:
            return "failed"
        return "" if self.refused is None else "refused"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """All variants of one training, from plain PyTorch to the full plan. The aliases are the keys of bench.json."""

    device: str
    batch_size: int
    rounds: int
    steps: int  # that each variant was trained
    planned_steps: int  # more than `steps`: time ended before
    metric: Annotated[str, Field(alias="headline")]
    tolerance: float  # the loss that is allowed, in the metric's unit
    unit: str = "fraction"
    validation_examples: int
    price_per_hour: float | None
    ceiling_flops: Mapping[str, Positive] | None  # FLOP/s for each precision; None: not measured
    plan: Plan
    variants: Annotated[tuple[Variant, ...], Field(alias="rungs")]  # plain PyTorch first

    @property
    def plain(self) -> Variant:
        return self.variants[0]

    @property
    def full(self) -> Variant:
        """The last variant that ran: all of the plan but the speedups that failed."""
        return [variant for variant in self.variants if not variant.failed][-1]

    def harmful_speedups(self) -> tuple[str, ...]:
        """The speedups from which on every variant is refused for its score; empty if the last isn't."""
        ran = [variant for variant in self.variants if not variant.failed]
        accepted = [number for number, variant in enumerate(ran) if variant.refused is None]
        if accepted[-1] == len(ran) - 1:
            return ()
        last_accepted, first_refused = ran[accepted[-1]], ran[accepted[-1] + 1]
        added = tuple(name for name in first_refused.speedups if name not in last_accepted.speedups)
        return added or first_refused.speedups

    @property
    def widest_interval(self) -> float:
        """Half the width of the widest 95 % interval of a difference; 0 where none was compared."""
        halves = [(d.high - d.low) / 2 for variant in self.variants if (d := variant.difference) is not None]
        return max(halves, default=0.0)

    def remarks(self) -> Iterator[str]:
        """What a reader of the figures should know, in sentences."""
        for variant in self.variants:
            if variant.refused:
                yield f"{variant.name} is rejected: {variant.refused}"
            elif variant.again is not None:
                yield (
                    f"{variant.name} lost {self.metric} with this seed but not with another one: "
                    f"chance, so it is not rejected."
                )
        if self.widest_interval > self.tolerance:
            yield (
                f"{plural(self.validation_examples, 'validation example')} can't show a loss of "
                f"{format_score(self.tolerance, self.unit)}: the interval is "
                f"±{format_score(self.widest_interval, self.unit)} wide."
            )
        if self.steps < self.planned_steps:
            yield (
                f"Time allowed {self.steps} of {self.planned_steps} steps: the learning rate had not come down, so "
                f"scores vary more."
            )
        if self.plain.train is not None and _varies(self.plain.train.examples_per_s):
            yield "Speed varied by more than a tenth between rounds: something else used the machine."

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        values["headline"], values["rungs"] = values.pop("metric"), values.pop("variants")
        return values


def _varies(rate: Estimate) -> bool:
    return rate.half_iqr is not None and rate.half_iqr > STEADY * abs(rate.median)
