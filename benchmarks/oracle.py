"""The fastest of all the plans that make sense for a training here, to judge the planner by.

At most 32 plans are tried: each way of choosing one or none of each group in CHOICES, with all threads and with half
of them, as far as the device can use them and the network has a use for them. What is in ALWAYS is in all of them.
Blocks of steps of all plans alternate, and the slower half leaves after each stage. The order of the best few is still
noise: they have to be measured again before anything is compared with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch

from sides import Side, plan_of, settler
from suanli.core.types import Device, Plan
from suanli.machine.device import available_memory_bytes
from suanli.training.setup import Setup

CHOICES = (("allocator",), ("graphs",), ("channels_last",), ("bf16", "fp16", "onednn_bf16"))
ALWAYS = ("fused_optimizer", "tf32", "cudnn_benchmark", "resident")
MOST = 32
BEST = 3  # that are left in the end
# A block isn't timed if the step before it took longer than so many times the fastest step, plus so many seconds.
HOPELESS, ALLOWANCE_S = 3.0, 0.5


def label(plan: Plan) -> str:
    """The speedups and, where they aren't torch's own number, the threads: equal for equal plans."""
    names = "+".join(plan.speedups) or "none"
    return names if plan.threads in (None, torch.get_num_threads()) else f"{names}, threads {plan.threads}"


def combinations(setup: Setup) -> dict[str, Plan]:
    """The plans to try, by their labels."""
    threads = [None]
    if setup.device.type == "cpu" and torch.get_num_threads() > 1:
        threads.append(torch.get_num_threads() // 2)
    plans: dict[str, Plan] = {}
    for wanted in product(*((None, *names) for names in CHOICES)):
        plan = plan_of([*ALWAYS, *filter(None, wanted)], setup)
        plans |= {label(p): p for p in (replace(plan, threads=count) for count in threads)}
    # What acts with a delay changes rarely from one trial to the next.
    ordered = sorted(plans.items(), key=lambda item: ("allocator" in item[1].speedups, item[1].threads is not None))
    if len(ordered) > MOST:
        raise ValueError(f"{len(ordered)} combinations are more than the {MOST} that were promised")
    return dict(ordered)


def race(setup: Setup, plans: Mapping[str, Plan], *, count: int, budget_s: float) -> dict[str, list[float]]:
    """Seconds of blocks of `count` steps of each plan, the fastest plan first. Plans that left have fewer blocks; an
    infinite one wasn't timed, since the step before it took far too long.

    A plan's fastest block counts, since whatever disturbs makes it slower. Each stage gets an equal part of what is
    left of `budget_s`, but never less than a round, and the first, in which one disturbed block could decide, two.
    """

    @lru_cache(maxsize=_room(setup))
    def side(name: str) -> Side:
        return Side.of(setup.trial(plans[name]))

    field, times = list(plans), {name: list[float]() for name in plans}
    stages = max(1, math.ceil(math.log2(len(plans) / BEST)))
    ranked: list[str] = []  # those that left, the fastest first
    began = time.perf_counter()
    for stage in range(stages):
        started, rounds = time.perf_counter(), 0
        stage_s = (budget_s - (started - began)) / (stages - stage)
        least = 2 if stage == 0 else 1
        while rounds < least or (time.perf_counter() - started) * (rounds + 1) / rounds < stage_s:
            for name in field if rounds % 2 == 0 else field[::-1]:
                fastest_s = min((min(taken, default=math.inf) for taken in times.values()), default=math.inf)
                limit_s = HOPELESS * fastest_s / count + ALLOWANCE_S
                times[name].append(side(name).block(count, settler(setup.device), give_up_s=limit_s))
            rounds += 1
        by_speed = sorted(field, key=lambda name: min(times[name]))
        left = max(BEST, math.ceil(len(field) / 2))
        ranked = [*by_speed[left:], *ranked]
        field = [name for name in field if name in by_speed[:left]]  # in the order of trials
    return {name: times[name] for name in (*sorted(field, key=lambda name: min(times[name])), *ranked)}


def _room(setup: Setup) -> int:
    """How many copies may be kept, in half of the free memory: weights, gradients and two states of the optimizer."""
    device: Device = setup.device
    copy_bytes = 4 * sum(p.numel() * p.element_size() for p in setup.module.parameters())
    free = available_memory_bytes(device)
    return MOST if free is None else max(1, min(MOST, free // 2 // copy_bytes))
