"""Which speedups are in use on this device, and why the others aren't."""

from __future__ import annotations

from suanli.errors import MachineError, unknown
from suanli.plugins import load, load_all, names
from suanli.types import Device, Plan, Step


def choose(requested: str, device: Device) -> Plan:
    """The plan for "auto" (every speedup that is usable here), "none", or a list "bf16,channels_last".

    Raises UsageError for an unknown name and MachineError for one that is named but unusable:
    only "auto" may pass one over, and it writes down why.
    """
    if requested == "none":
        return Plan(device=device.torch_name, speedups=())
    if requested == "auto":
        reasons = {n: s.why_not(device) for n, s in load_all("speedups").items()}
        usable = [n for n, reason in reasons.items() if reason is None]
        dropped = {n: reason for n, reason in reasons.items() if reason is not None}
        return Plan(device=device.torch_name, speedups=_in_order(usable), dropped=dropped)
    chosen = [n.strip() for n in requested.split(",") if n.strip()]
    for name in chosen:
        if name not in names("speedups"):
            raise unknown("speedup", name, [*names("speedups"), "auto", "none"])
        reason = load("speedups", name).why_not(device)
        if reason is not None:
            raise MachineError(
                f"The speedup {name!r} is not usable on {device.name}: {reason}",
                fix="Leave it out, or use --speedups auto.",
            )
    return Plan(device=device.torch_name, speedups=_in_order(chosen))


def apply(plan: Plan, step: Step, device: Device) -> Step:
    for name in plan.speedups:
        step = load("speedups", name).apply(step, device)
    return step


def _in_order(chosen: list[str]) -> tuple[str, ...]:
    return tuple(sorted(set(chosen), key=lambda n: (load("speedups", n).stage, n)))
