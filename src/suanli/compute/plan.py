"""Plans without measuring: which speedups a device can use, their order, and how they change a step.

`planner.py` chooses a plan by measuring.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import torch

from suanli.core.errors import MachineError, UsageError, unknown
from suanli.core.registry import load, load_all, names
from suanli.core.types import Device, Plan, Setting, Speedup, Step
from suanli.machine.device import cores

PLAIN, SHORT_LIST, RACED = "plain", "short list", "raced"  # origins of plans
ORDER_OF_SUMS = 1e-3  # relative error of float32 where only the order of the sums differs
# The same on an NVIDIA GPU, where PyTorch by default computes convolutions in TF32, with 11 bits: another order gave
# 0.0014 in a small network, and the error grows with depth.
ORDER_IN_TF32 = 1e-2


def plain_plan(device: Device, threads: int | None = None) -> Plan:
    """PyTorch with its defaults: the plan without speedups."""
    return Plan(device=device.torch_name, speedups=(), threads=threads, origin=PLAIN)


def plan_of_names(requested: str, device: Device, threads: int | None = None) -> Plan:
    """The plan for "none" or a list "bf16,channels_last".

    Raises UsageError for an unknown name or two that exclude each other, and MachineError for one that can't be used
    here: only "auto" may skip one, and it records why.
    """
    if requested == "none":
        return plain_plan(device, threads)
    chosen = [n.strip() for n in requested.split(",") if n.strip()]
    for name in chosen:
        if name not in names("speedups"):
            raise unknown("speedup", name, [*names("speedups"), "auto", "none"])
    _refuse_two_of_a_group(chosen)
    for name in chosen:
        if (reason := load("speedups", name).why_not(device)) is not None:
            raise _unusable(name, device, reason)
    return Plan(device=device.torch_name, speedups=sort_speedups(chosen), threads=threads)


def check_threads(threads: int | None) -> None:
    """Raise UsageError for a number of threads that can't be right."""
    if threads is not None and not 1 <= threads <= 4 * cores():
        raise UsageError(f"--threads can't be {threads}.", fix=f"This machine has {cores()} cores.")


def check_request(requested: str, device: Device, threads: int | None) -> None:
    """Raise what planning would raise for these options, before data is decoded."""
    check_threads(threads)
    if requested != "auto":
        plan_of_names(requested, device, threads)


def usable_speedups(device: Device) -> tuple[dict[str, Speedup], dict[str, str]]:
    """The speedups that could be tried here, in order, and the reasons why the others can't."""
    speedups = {s.name: s for s in sorted(load_all("speedups").values(), key=lambda s: (s.stage, s.name))}
    reasons = {name: s.why_not(device) for name, s in speedups.items()}
    return (
        {name: s for name, s in speedups.items() if reasons[name] is None},
        {name: reason for name, reason in reasons.items() if reason is not None},
    )


def apply_plan(plan: Plan, step: Step, device: Device) -> Step:
    """The step, changed by the plan's speedups and threads. Raises MachineError for a speedup that this step has no
    use for."""
    for name in plan.speedups:
        speedup: Speedup = load("speedups", name)
        if (reason := speedup.needless(step, device)) is not None:
            raise _unusable(name, device, reason)
        step = speedup.apply(step, device)
    if plan.threads is not None:
        step = replace(step, settings=(_thread_setting(plan.threads), *step.settings))
    return step


def switch_plan(current: Plan, new: Plan, plain: Step, device: Device) -> Step:
    """The `plain` step, whose network has been changed by the current plan, changed by the new one instead. Raises
    ValueError where a speedup can't be turned on or off between two steps, and MachineError as `apply_plan` does."""
    if fixed := [n for n in {*current.speedups, *new.speedups} if not load("speedups", n).switchable]:
        raise ValueError(f"{', '.join(sorted(fixed))} can't be turned on or off between two steps")
    for name in reversed(current.speedups):
        load("speedups", name).undo(plain)
    return apply_plan(new, plain, device)


@cache
def _thread_setting(count: int) -> Setting:
    """The same object for each count, so that two steps with the same number of threads have the same setting."""
    return partial(use_threads, count)


def error_tolerance(speedups: Iterable[str], device: Device) -> float:
    """The relative error that these speedups may cause together."""
    order = ORDER_IN_TF32 if "tfloat32" in device.fast_dtypes else ORDER_OF_SUMS
    return max([order, *(float(load("speedups", name).tolerance) for name in speedups)])


def sort_speedups(chosen: Iterable[str]) -> tuple[str, ...]:
    """The names in the order in which the speedups are applied, each once."""
    return tuple(sorted(set(chosen), key=lambda n: (load("speedups", n).stage, n)))


def fewer_threads(current: int | None) -> list[int]:
    """The numbers of threads to try in place of `current` (None: torch's default): as many as there are cores, where a
    container's quota leaves fewer than torch believes, then half of that down to one."""
    now = current or torch.get_num_threads()
    count = cores() if cores() < now else now // 2
    counts = []
    while count >= 1:
        counts.append(count)
        count //= 2
    return counts


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Operations on the CPU use `count` threads while the block runs."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_two_of_a_group(chosen: list[str]) -> None:
    taken: dict[str, str] = {}
    for name in chosen:
        group = load("speedups", name).group
        if group is not None and taken.setdefault(group, name) != name:
            raise UsageError(f"The speedups {taken[group]!r} and {name!r} exclude each other.", fix="Name one of them.")


def _unusable(name: str, device: Device, reason: str) -> MachineError:
    return MachineError(
        f"The speedup {name!r} is not usable on {device.name}: {reason}.",
        fix="Leave it out, or use --speedups auto.",
    )
