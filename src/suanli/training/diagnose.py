"""What limits a training, in one sentence, what would help, and how much at most.

`diagnose` turns the shares of a step (`phases.py`) and what the caller knows (`Facts`) into a `Diagnosis`;
`Watch` decides when there is something to say. Both are functions of what they are given: nothing is
measured, tried or changed here.

Computing, the forward and backward pass, is what a step is for; everything else in it is an overhead. The
largest overhead is the limit if it takes a quarter of the step or more than computing does, else computing is.

The gain is Amdahl's bound: what a step would take if the limit vanished and nothing else changed. Where that
isn't known (how fast could the computing be? how much of it was active waiting?), it is None, unless the
device's ceiling was measured. A remedy names an option of the command line. One that changes what is learned says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from suanli.core.types import Json

if TYPE_CHECKING:
    from suanli.compute.step_clock import Shares, StepClock

# Without an overhead of this size a step is 1 / 0.75 = 1.33 times as fast, about what one good speedup brings; where
# all are smaller, computing is the better place to look.
OVERHEAD = 0.25
# Of the measured ceiling: whole networks also have operations that only move memory, so more is hardly ever reached.
NEAR_CEILING = 0.7
# Of the cores: from here on it is this process that fills them.
FULL = 0.9

FIRST_STEPS = 20  # that the first verdict is about; 3 of them are skipped by the clock
FEW_STEPS = 8  # enough where steps are long
WINDOW_STEPS = 20
WINDOW_S = 5.0

COMPUTING = ("forward", "backward", "graph")
OVERHEADS = ("input", "copy", "optimizer", "communication", "host", "idle")

HELPS: Mapping[str, tuple[str, ...]] = {  # which speedups shorten what, the most telling first
    "input": ("resident", "read_ahead"),
    "copy": ("resident", "read_ahead"),
    "computing": (
        *("bf16", "fp16", "tf32", "onednn_bf16", "channels_last"),
        *("compile", "compile_blocks", "cudnn_benchmark", "whole_batch"),
    ),
    "optimizer": ("fused_optimizer",),
    "host": ("graphs", "compile", "compile_blocks", "whole_batch"),
    "idle": ("bind_threads",),
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the caller of `diagnose` knows of the training."""

    device_type: str  # "cpu", "cuda"
    batch_size: int  # of one optimizer step
    cores: int  # that this process may use
    processes: int = 1  # that train together
    threads: int | None = None  # of an operation on the CPU
    speedups: tuple[str, ...] = ()  # in use
    dropped: Mapping[str, str] = field(default_factory=dict)  # name to reason
    offered: tuple[str, ...] = ()  # usable for this step, but neither in use nor dropped, nor excluded by one in use
    resident: bool = False  # the training split lies in the device's memory, or on a CPU in main memory
    augment: tuple[str, ...] = ()  # as spelled in the recipe
    size_setting: str | None = None  # field of the recipe that makes inputs smaller: "preprocess.size"
    share_of_ceiling: float | None = None  # FLOP/s of the whole step over what the device was measured to reach


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    shares: Mapping[str, float | None]
    step_s: float  # median
    steps: int  # that were timed
    limited_by: str  # "computing" or one of OVERHEADS
    verdict: str
    remedy: str  # what is in use against it, and what the user could do
    applied: tuple[str, ...]  # the speedups in use that shorten what limits
    gain_at_most: float | None  # how many times as fast a step could become; None: unknown

    def __str__(self) -> str:
        most = self.gain_at_most
        gain = "" if most is None else f" At most {f'{most:.2f}' if most < 10 else f'{most:,.0f}'} times as fast."
        return f"{self.verdict}. {self.remedy}{gain}"

    def to_json(self) -> dict[str, Json]:
        return asdict(self)


def diagnose(shares: Shares, facts: Facts) -> Diagnosis:
    limit, share = _limit(shares.shares)
    return Diagnosis(
        shares=shares.shares,
        step_s=shares.step_s,
        steps=shares.steps,
        limited_by=limit,
        verdict=_verdict(limit, share, shares, facts),
        remedy=_remedy(limit, shares, facts),
        applied=tuple(name for name in facts.speedups if name in HELPS.get(limit, ())),
        gain_at_most=_gain(limit, share, facts),
    )


def _limit(shares: Mapping[str, float | None]) -> tuple[str, float]:
    computing = sum(shares.get(name) or 0.0 for name in COMPUTING)
    overheads = {name: shares.get(name) or 0.0 for name in OVERHEADS}
    largest = max(overheads, key=lambda name: overheads[name])
    if overheads[largest] >= OVERHEAD or overheads[largest] > computing:
        return largest, overheads[largest]
    return "computing", computing


def _gain(limit: str, share: float, facts: Facts) -> float | None:
    # Several threads also wait actively, within what counts as computing: more than the share is lost.
    waits_actively = limit == "idle" and facts.device_type == "cpu" and facts.threads != 1
    if limit == "computing" or waits_actively:
        return max(1.0, 1 / facts.share_of_ceiling) if facts.share_of_ceiling else None
    return 1 / (1 - share) if share < 1 else None


# --- in words ---


def _verdict(limit: str, share: float, shares: Shares, facts: Facts) -> str:
    gpu = facts.device_type != "cpu"
    match limit:
        case "input":
            return f"limited by input: {_percent(share)} of the step goes into {_input_work(facts)}"
        case "copy":
            return f"limited by copying: {_percent(share)} of the step moves the batch to the device"
        case "optimizer":
            return f"limited by the optimizer: {_percent(share)} of the step updates the weights"
        case "communication":
            return f"limited by communication: {_percent(share)} of the step waits for other processes"
        case "host" if gpu:
            return f"limited by the host: {_percent(share)} of the step the device waits for Python to issue its work"
        case "host":
            return f"limited by the host: {_percent(share)} of the step is Python outside of the network"
        case "idle" if gpu:
            return f"limited by waiting: {_percent(share)} of the step the device waits for a host that waits itself"
        case "idle":
            got = _got(shares, facts)
            if facts.processes > 1:
                return f"limited by waiting: {_percent(share)} of the step is for other processes, or for a core{got}"
            return f"limited by waiting: {_percent(share)} of the step the computation waits for a core{got}"
    what = "the recorded forward and backward pass" if shares.shares.get("graph") else "the forward and backward pass"
    near = "" if facts.share_of_ceiling is None else f", at {_percent(facts.share_of_ceiling)} of the measured ceiling"
    return f"limited by computing: {_percent(share)} of the step is {what}{near}"


def _input_work(facts: Facts) -> str:
    reading = [] if facts.resident else ["reading"]
    return " and ".join(reading + (["augmentation"] if facts.augment else ["normalising the batch"]))


def _got(shares: Shares, facts: Facts) -> str:
    if shares.cores_used is None:
        return ""
    return f" (this process got {shares.cores_used:.1f} of {facts.cores} cores)"


def _remedy(limit: str, shares: Shares, facts: Facts) -> str:
    """What is in use, what isn't, and what is left to do."""
    helps = HELPS.get(limit, ())
    sentences = []
    if used := [name for name in facts.speedups if name in helps]:
        sentences.append(f"{_listed(used)} {'is' if len(used) == 1 else 'are'} in use.")
    if left_out := [name for name in helps if name in facts.dropped]:
        sentences.append(f"The plan left out {_listed(left_out)}.")
    if offered := [name for name in helps if name in facts.offered]:
        sentences.append(f"Try --speedups {','.join((*facts.speedups, offered[0]))}.")
    else:
        sentences.append(_own_remedy(limit, shares, facts))
    return " ".join(sentences)


def _own_remedy(limit: str, shares: Shares, facts: Facts) -> str:
    """What the user can do where no speedup is left."""
    larger = f"A larger batch (--batch-size {2 * facts.batch_size}), which changes what is learned,"
    match limit:
        case "input":
            return _less_input(facts)
        case "copy":
            return f"Smaller inputs{_size(facts)} would be copied sooner; that changes what is learned."
        case "optimizer":
            return f"{larger} needs fewer updates for the same examples."
        case "communication":
            return f"{larger} talks less often for the same examples."
        case "idle" if facts.processes > 1:
            return (
                f"{larger} makes the processes wait for each other less often, and each needs a core for each thread."
            )
        case "host":
            return f"{larger} gives the host fewer operations to issue for the same examples."
        case "idle":
            return _more_cores(shares, facts)
    if facts.share_of_ceiling is not None and facts.share_of_ceiling < NEAR_CEILING:
        return f"{larger} may come nearer to the ceiling."
    return f"What is left is a smaller network (--model) or smaller inputs{_size(facts)}; both change what is learned."


def _less_input(facts: Facts) -> str:
    if facts.augment:
        now = ", ".join(facts.augment)
        return f"Fewer augmentations (--set augment=…, now {now}) would cost less; that changes what is learned."
    if not facts.resident:
        return f"A faster disk, more memory, or smaller inputs{_size(facts)} would help."
    return f"Smaller inputs{_size(facts)} would cost less; that changes what is learned."


def _more_cores(shares: Shares, facts: Facts) -> str:
    if facts.device_type != "cpu":
        return "End other programs on this machine, or give this one more cores."
    threads = facts.threads or facts.cores
    if threads > facts.cores:
        return f"There are more threads than cores: use --threads {facts.cores}."
    fewer = f"use --threads {threads - 1}" if threads > 1 else ""
    if shares.cores_used is not None and shares.cores_used > FULL * facts.cores:
        return f"This process fills all cores: {fewer}." if fewer else "This process fills all cores; give it more."
    end = "Other programs use the cores: end them"
    return f"{end}, or {fewer}, so that threads don't wait for each other." if fewer else f"{end}."


def _size(facts: Facts) -> str:
    return f" (--set {facts.size_setting}=…)" if facts.size_setting else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# --- when to speak ---


class Watch:
    """Called after every step; gives a diagnosis within the first 30 steps, and again once the limit has been
    another one in two windows running, so that a step at the edge of two limits isn't called by turns.

    `steps` is the number of the run's last step, `now` the time in seconds. `facts` is asked for each window: a
    speedup may be dropped on the way.
    """

    def __init__(
        self,
        clock: StepClock,
        facts: Callable[[], Facts],
        steps: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.current: Diagnosis | None = None  # the newest with the limit that was last spoken of
        self._clock, self._facts, self._last_step, self._now = clock, facts, steps, now
        self._turned_to: str | None = None  # another limit in the last window
        self._steps = 0
        self._started_s: float | None = None

    def after_step(self, step: int) -> Diagnosis | None:
        """`step` counts from 1. None: nothing new."""
        if self._started_s is None:
            self._started_s = self._now()
        self._steps += 1
        if not self._due(step):
            return None
        self._steps, self._started_s = 0, self._now()
        shares = self._clock.window()
        return None if shares is None else self._new(diagnose(shares, self._facts()))

    def _due(self, step: int) -> bool:
        assert self._started_s is not None
        if self.current is None:
            if self._steps >= FIRST_STEPS or step == self._last_step:
                return True
            return self._steps >= FEW_STEPS and self._now() - self._started_s >= WINDOW_S
        return self._steps >= WINDOW_STEPS and self._now() - self._started_s >= WINDOW_S

    def _new(self, found: Diagnosis) -> Diagnosis | None:
        if self.current is not None and found.limited_by not in (self.current.limited_by, self._turned_to):
            self._turned_to = found.limited_by
            return None
        before, self.current, self._turned_to = self.current, found, None
        return found if before is None or before.limited_by != found.limited_by else None
