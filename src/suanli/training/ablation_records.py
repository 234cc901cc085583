"""What a ladder is: its rungs, their figures, and which of them there are for a plan.

The records only hold what was measured; measuring is in `ladder.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from suanli.compute.plan import PLAIN
from suanli.core.console import plural
from suanli.core.types import Difference, Json, Plan, Recipe
from suanli.machine.timing import STEADY, Gain, Spread

WARM_UP = 10  # steps at most; compiling and recording are over by then


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Training or evaluation on one rung, over the timed rounds."""

    examples_per_s: Spread
    gain: Gain  # how many times as fast as plain PyTorch, paired by round
    step_ms_p50: float  # of one training step, or one batch of evaluation
    step_ms_p95: float
    peak_memory_bytes: int | None
    share_of_ceiling: float | None
    joules_per_example: float | None
    examples_per_price: float | None  # for one unit of the price's currency

    @property
    def half_iqr(self) -> float | None:
        """Of the examples per second; None: one round has no spread."""
        return self.examples_per_s.half_iqr if self.examples_per_s.count > 1 else None

    def to_json(self, unit: str) -> dict[str, Json]:
        return {
            "examples_per_s": {"median": self.examples_per_s.median, "half_iqr": self.half_iqr},
            "ratio": {"median": self.gain.ratio, "half_iqr": self.gain.spread if self.gain.rounds > 1 else None},
            f"{unit}_ms_p50": self.step_ms_p50,
            f"{unit}_ms_p95": self.step_ms_p95,
            "peak_memory_bytes": self.peak_memory_bytes,
            "share_of_ceiling": self.share_of_ceiling,
            "joules_per_example": self.joules_per_example,
            "examples_per_price": self.examples_per_price,
        }


@dataclass(frozen=True, kw_only=True)
class Rung:
    name: str  # "plain PyTorch", "+ bf16"
    speedups: tuple[str, ...]  # all that are in use on it
    threads: int
    train: Phase | None  # None: it failed
    evaluate: Phase | None
    scores: dict[str, float]  # on the validation split, after as many steps as all others
    difference: Difference | None  # of the headline score against plain PyTorch
    again: Difference | None  # the same with another seed, where the first one is a loss
    refused: str | None
    failed: bool  # refused because it doesn't run, not because of its score

    def to_json(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "speedups": list(self.speedups),
            "threads": self.threads,
            "train": self.train and self.train.to_json("step"),
            "evaluate": self.evaluate and self.evaluate.to_json("batch"),
            "scores": self.scores,
            "difference": self.difference and self.difference.to_json(),
            "again": self.again and self.again.to_json(),
            "refused": self.refused,
            "failed": self.failed,
        }


@dataclass(frozen=True, kw_only=True)
class Ladder:
    device: str
    batch_size: int
    rounds: int
    steps: int  # that each rung was trained
    planned_steps: int  # more than `steps`: time ended before
    headline: str
    tolerance: float
    validation_examples: int
    price_per_hour: float | None
    ceiling_flops: dict[str, float] | None  # FLOP/s for each precision; None: not measured
    plan: Plan
    rungs: tuple[Rung, ...]  # plain PyTorch first
    recipe: Recipe  # what was trained

    @property
    def plain(self) -> Rung:
        return self.rungs[0]

    @property
    def full(self) -> Rung:
        """The last rung that ran: all of the plan but the speedups that failed."""
        return [rung for rung in self.rungs if not rung.failed][-1]

    def guilty(self) -> tuple[str, ...]:
        """The speedups from which on every rung is refused for its score; empty if the last isn't."""
        ran = [rung for rung in self.rungs if not rung.failed]
        sound = [number for number, rung in enumerate(ran) if rung.refused is None]
        if sound[-1] == len(ran) - 1:
            return ()
        below, first = ran[sound[-1]], ran[sound[-1] + 1]
        return tuple(name for name in first.speedups if name not in below.speedups) or first.speedups

    def remarks(self) -> Iterator[str]:
        """What a reader of the figures should know, in sentences."""
        for rung in self.rungs:
            if rung.refused:
                yield f"{rung.name} is refused: {rung.refused}"
            elif rung.again is not None:
                yield (
                    f"{rung.name} lost {self.headline} with this seed but not with another one: "
                    f"chance, so it is not refused."
                )
        compared = [rung.difference for rung in self.rungs if rung.difference is not None]
        widest = max(((d.high - d.low) / 2 for d in compared), default=0.0)
        if widest > self.tolerance:
            yield (
                f"{plural(self.validation_examples, 'validation example')} can't show a loss of "
                f"{self.tolerance:.1%}: the interval is ±{widest:.1%} wide."
            )
        if self.steps < self.planned_steps:
            yield (
                f"Time allowed {self.steps} of {self.planned_steps} steps: the learning rate had not come down, so "
                f"scores vary more."
            )
        if self.plain.train is not None and self.plain.train.examples_per_s.relative > STEADY:
            yield "Speed varied by more than a tenth between rounds: something else used the machine."

    def to_json(self) -> dict[str, Json]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "recipe"}
        return values | {"plan": asdict(self.plan), "rungs": [rung.to_json() for rung in self.rungs]}


def rungs(plan: Plan) -> list[tuple[str, Plan]]:
    """Names and plans from plain PyTorch to `plan`, each with one change more than the one before."""
    found = [("plain PyTorch", Plan(device=plan.device, speedups=(), origin=PLAIN))]
    if plan.threads not in (None, torch.get_num_threads()):
        found.append((f"+ threads={plan.threads}", replace(found[-1][1], threads=plan.threads)))
    for name in plan.speedups:
        below = found[-1][1]
        found.append((f"+ {name}", replace(below, speedups=(*below.speedups, name), threads=plan.threads)))
    return found


def visits(steps: int, rounds: int) -> list[int]:
    """How many steps each visit does: first the one that warms up, then the timed ones, whose numbers differ
    by at most one. They add up to `steps` >= 2; where these are few, there are fewer rounds."""
    rounds = min(rounds, steps - 1)
    warm_up = max(1, min(WARM_UP, steps // (rounds + 1)))
    each, more = divmod(steps - warm_up, rounds)
    return [warm_up, *(each + (number < more) for number in range(rounds))]


def shortened(recipe: Recipe, steps: int, steps_per_epoch: int) -> Recipe:
    """The recipe with a schedule of so many steps; warm-up keeps its share, and nothing stops early."""
    epochs = steps / steps_per_epoch
    change = {
        "epochs": epochs,
        "warmup_epochs": recipe.warmup_epochs * epochs / recipe.epochs,
        "early_stop": None,
    }
    return recipe.model_copy(update=change)
