"""The sides of a comparison: each trains for some steps while the others wait.

A block is some steps of one side. Blocks alternate, in reverse order every other round. suanli's side has settings of
the whole process (number of threads, precision of layers, …), which are applied before its block and restored after it.
The first step of a block isn't timed on any side: the caches contain another side's data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from suanli.compute.plan import plan_of_names, sort_speedups
from suanli.compute.step_runner import AppliedSettings, apply_settings
from suanli.core import paths
from suanli.core.registry import load
from suanli.core.types import AnyPath, Device, Plan, Step
from suanli.data.decode import decode
from suanli.machine import peak
from suanli.machine.timing import seconds
from suanli.training.loop import Loop
from suanli.training.session import Session, TrainingSpec
from suanli.training.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Side:
    steps: Iterator[object]  # each `next` is a whole step, input included
    step: Step | None = None  # suanli's, for its settings of the process

    @classmethod
    def of(cls, loop: Loop) -> Side:
        return cls(steps=loop.run(), step=loop.compute)

    def advance(self, count: int) -> None:
        for _ in range(count):
            next(self.steps)

    def block(
        self,
        count: int,
        settle: Callable[[], object] | None = None,
        *,
        untimed: int = 1,
        give_up_s: float = math.inf,
    ) -> float:
        """Seconds of `count` steps after some that aren't timed, with the settings applied; infinite, without timing
        any, where those took longer than `give_up_s`."""
        with nullcontext() if self.step is None else apply_settings(self.step):
            if seconds(partial(self.advance, untimed), settle) > give_up_s:
                return math.inf
            return seconds(partial(self.advance, count), settle)


def alternate(
    sides: Mapping[str, Side], count: int, *, rounds: int, device: Device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of a block of `count` steps of each side in each round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            took = sides[name].block(count, settler(device))
            if number >= warm_up:
                times[name].append(took)
    return times


def settler(device: Device) -> Callable[[], None] | None:
    """A function that waits for the device; None: a CPU needs none."""
    return partial(torch.cuda.synchronize, device.torch_name) if device.type == "cuda" else None


# --- suanli's side --------------------------------------------------------------------------


def plan_of(wanted: Collection[str], setup: Setup) -> Plan:
    """The plan with those of the named speedups that are useful on this device, for this network."""
    device = setup.device
    model, optimizer = copy.deepcopy((setup.module, setup.optimizer))
    step, used = replace(setup.step, model=model, optimizer=optimizer), []
    for name in sort_speedups(wanted):
        speedup = load("speedups", name)
        if speedup.why_not(device) is None and speedup.needless(step, device) is None:
            step = speedup.apply(step, device)
            used.append(name)
    return plan_of_names(",".join(used) or "none", device)


def auto_plan(setup: Setup, cache: AnyPath | None) -> Plan:
    """What `--speedups auto` chooses for this training on pictures of full size: kept, measured on copies, or raced on
    its first steps, which are trained here."""
    recipe = setup.recipe.model_copy(update={"progressive_resizing": ()})
    spec = TrainingSpec(
        recipe=recipe, prepared=setup.prepared, device=setup.device, cache=paths.cache_dir(cache), requested="auto"
    )
    session = Session(spec)
    progress = session.loop.progress
    with AppliedSettings(session.loop.compute) as settings:
        session.start(settings)
        steps, before = session.loop.run(), 0.0
        while session.is_racing and next(steps, None) is not None:
            session.after_step(progress.seconds - before, settings)
            before = progress.seconds
    return session.plan


def half_precision_flops(device: Device, cache: AnyPath | None) -> tuple[float, str]:
    """The measured peak of matrix products in bfloat16 or float16, whichever is faster, in FLOP/s, and its name.
    Float32's where the device has neither."""
    flops = peak.probe(device, paths.cache_dir(cache), decode).matmul_flops
    halves = {name: rate for name, rate in flops.items() if name in ("bfloat16", "float16")} or flops
    best = max(halves, key=lambda name: halves[name])
    return halves[best], best
