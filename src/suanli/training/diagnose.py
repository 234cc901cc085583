"""What limits a training, in one sentence, what would help, and by how much at most.

`diagnose` turns the shares of a step (`step_clock.py`) and what the caller knows (`Facts`) into a `Diagnosis`; `Watch`
decides when there is news. Nothing is measured, tried or changed here.

Computing, the forward and backward pass, is the purpose of a step; all else in it is overhead. The limit is the
largest overhead if it takes at least a quarter of the step, or more time than computing; otherwise it is computing.

The gain is Amdahl's bound: the speed-up if the limit vanished and nothing else changed. It is None where that isn't
known: how fast computing could be (unless the device's peak was measured), or how much of it was busy waiting. A
remedy names an option of the command line, and says so if it changes what is learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suanli.compute.step_clock import Shares, StepClock

# Of a step. Without an overhead of this size a step is 1 / 0.75 = 1.33 times as fast, about what one good speedup
# brings; where all overheads are smaller, computing is the better place to look.
LARGE_OVERHEAD = 0.25
# Of the measured ceiling. Networks also have operations that only move memory, so they hardly ever come closer.
NEAR_CEILING = 0.7
# Of the cores. Above it, this process is the one that fills them.
FULL = 0.9

FIRST_STEPS = 20  # of the first diagnosis; the clock skips 3 of them
FEW_STEPS = 8  # of the first diagnosis where steps are long
WINDOW_STEPS = 20  # at least, between two diagnoses
WINDOW_S = 5.0  # at least, between two diagnoses

COMPUTING = ("forward", "backward", "graph")
OVERHEADS = ("input", "copy", "optimizer", "communication", "host", "idle")

HELPFUL: Mapping[str, tuple[str, ...]] = {  # the speedups that shorten each phase, the most effective first
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
    """What the caller of `diagnose` knows about the training."""

    device_type: str  # "cpu", "cuda"
    batch_size: int  # of one optimizer step
    cores: int  # that this process may use
    processes: int = 1  # that train together
    threads: int | None = None  # of an operation on the CPU
    speedups: tuple[str, ...] = ()  # in use
    dropped: Mapping[str, str] = field(default_factory=dict)  # name to reason
    offered: tuple[str, ...] = ()  # usable for this step, not tried yet, and not excluded by one in use
    resident: bool = False  # the training split lies in the device's memory, or on a CPU in main memory
    augment: tuple[str, ...] = ()  # as spelled in the recipe
    size_setting: str | None = None  # setting of the recipe that makes inputs smaller: "preprocess.size"
    share_of_ceiling: float | None = None  # FLOP/s of a step, as a share of the device's measured peak


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    shares: Mapping[str, float | None]
    step_s: float  # median
    steps: int  # that were timed
    limited_by: str  # "computing" or one of OVERHEADS
    verdict: str
    remedy: str  # what is in use against it, and what the user could do
    applied: tuple[str, ...]  # the speedups in use that shorten the limiting phase
    gain_at_most: float | None  # the most that a step could gain: 2.0 is twice as fast; None: unknown

    def __str__(self) -> str:
        most = self.gain_at_most
        gain = "" if most is None else f" At most {f'{most:.2f}' if most < 10 else f'{most:,.0f}'} times as fast."
        return f"{self.verdict}. {self.remedy}{gain}"

    def to_json(self) -> dict[str, object]:
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
        applied=tuple(name for name in facts.speedups if name in HELPFUL.get(limit, ())),
        gain_at_most=_gain(limit, share, facts),
    )


def _limit(shares: Mapping[str, float | None]) -> tuple[str, float]:
    computing = sum(shares.get(name) or 0.0 for name in COMPUTING)
    overheads = {name: shares.get(name) or 0.0 for name in OVERHEADS}
    largest = max(overheads, key=lambda name: overheads[name])
    if overheads[largest] >= LARGE_OVERHEAD or overheads[largest] > computing:
        return largest, overheads[largest]
    return "computing", computing


def _gain(limit: str, share: float, facts: Facts) -> float | None:
    # Several threads also wait busily, which counts as computing: more than the share is lost.
    busy_waiting = limit == "idle" and facts.device_type == "cpu" and facts.threads != 1
    if limit == "computing" or busy_waiting:
        return max(1.0, 1 / facts.share_of_ceiling) if facts.share_of_ceiling else None
    return 1 / (1 - share) if share < 1 else None


# --- in words ---


def _verdict(limit: str, share: float, shares: Shares, facts: Facts) -> str:
    gpu = facts.device_type != "cpu"
    match limit:
        case "input":
            return f"limited by input: {_percent(share)} of the step goes into {_input_work(facts)}"
        case "copy":
            return f"limited by copying: {_percent(share)} of the step goes into moving the batch to the device"
        case "optimizer":
            return f"limited by the optimizer: {_percent(share)} of the step goes into updating the weights"
        case "communication":
            return f"limited by communication: {_percent(share)} of the step is waiting for other processes"
        case "host" if gpu:
            return f"limited by the host: for {_percent(share)} of the step the device waits for Python to issue work"
        case "host":
            return f"limited by the host: {_percent(share)} of the step is Python outside the network"
        case "idle" if gpu:
            return (
                f"limited by waiting: for {_percent(share)} of the step the device waits for a host that waits itself"
            )
        case "idle":
            other = "other processes or " if facts.processes > 1 else ""
            return (
                f"limited by waiting: {_percent(share)} of the step is waiting for {other}a core{_cores(shares, facts)}"
            )
    passes = "the captured forward and backward pass" if shares.shares.get("graph") else "the forward and backward pass"
    near = "" if facts.share_of_ceiling is None else f", at {_percent(facts.share_of_ceiling)} of the measured ceiling"
    return f"limited by computing: {_percent(share)} of the step is {passes}{near}"


def _input_work(facts: Facts) -> str:
    reading = [] if facts.resident else ["reading"]
    return " and ".join(reading + (["augmentation"] if facts.augment else ["normalising the batch"]))


def _cores(shares: Shares, facts: Facts) -> str:
    if shares.cores_used is None:
        return ""
    return f" (this process got {shares.cores_used:.1f} of {facts.cores} cores)"


def _remedy(limit: str, shares: Shares, facts: Facts) -> str:
    """Which speedups are in use against the limit, which aren't, and what else would help."""
    helpful = HELPFUL.get(limit, ())
    sentences = []
    if used := [name for name in facts.speedups if name in helpful]:
        sentences.append(f"{_join(used)} {'is' if len(used) == 1 else 'are'} in use.")
    if dropped := [name for name in helpful if name in facts.dropped]:
        sentences.append(f"The plan left out {_join(dropped)}.")
    if offered := [name for name in helpful if name in facts.offered]:
        sentences.append(f"Try --speedups {','.join((*facts.speedups, offered[0]))}.")
    else:
        sentences.append(_advise(limit, shares, facts))
    return " ".join(sentences)


def _advise(limit: str, shares: Shares, facts: Facts) -> str:
    """What the user can change where no speedup is left."""
    larger = f"A larger batch (--batch-size {2 * facts.batch_size}), which changes what is learned,"
    match limit:
        case "input":
            return _less_input(facts)
        case "copy":
            return f"Smaller inputs{_size(facts)} would be copied faster; that changes what is learned."
        case "optimizer":
            return f"{larger} needs fewer updates for the same examples."
        case "communication":
            return f"{larger} communicates less often for the same examples."
        case "idle" if facts.processes > 1:
            return f"{larger} makes the processes wait for each other less often. Each needs one core per thread."
        case "host":
            return f"{larger} gives the host fewer operations to issue for the same examples."
        case "idle":
            return _more_cores(shares, facts)
    if facts.share_of_ceiling is not None and facts.share_of_ceiling < NEAR_CEILING:
        return f"{larger} may come nearer to the ceiling."
    return f"What remains is a smaller network (--model) or smaller inputs{_size(facts)}; both change what is learned."


def _less_input(facts: Facts) -> str:
    if facts.augment:
        current = ", ".join(facts.augment)
        return f"Fewer augmentations (--set augment=…, now {current}) would cost less; that changes what is learned."
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


def _join(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# --- when to report ---


class Watch:
    """Called after every step; gives a diagnosis within the first 30 steps, and again once another limit has lasted
    for two windows: a step between two limits would otherwise be reported again and again.

    `steps` is the number of the run's last step, `now` the time in seconds. `facts` is called for each window, since a
    speedup may be dropped during the run.
    """

    def __init__(
        self,
        clock: StepClock,
        facts: Callable[[], Facts],
        steps: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.current: Diagnosis | None = None  # the newest with the limit that was reported last
        self._clock, self._facts, self._last_step, self._now = clock, facts, steps, now
        self._candidate: str | None = None  # another limit, in the last window
        self._steps = 0
        self._started_s: float | None = None

    def after_step(self, step: int) -> Diagnosis | None:
        """`step` counts from 1. None: nothing new."""
        if self._started_s is None:
            self._started_s = self._now()
        self._steps += 1
        if not self._is_due(step):
            return None
        self._steps, self._started_s = 0, self._now()
        shares = self._clock.window()
        return None if shares is None else self._report(diagnose(shares, self._facts()))

    def _is_due(self, step: int) -> bool:
        assert self._started_s is not None
        if self.current is None:
            if self._steps >= FIRST_STEPS or step == self._last_step:
                return True
            return self._steps >= FEW_STEPS and self._now() - self._started_s >= WINDOW_S
        return self._steps >= WINDOW_STEPS and self._now() - self._started_s >= WINDOW_S

    def _report(self, diagnosis: Diagnosis) -> Diagnosis | None:
        if self.current is not None and diagnosis.limited_by not in (self.current.limited_by, self._candidate):
            self._candidate = diagnosis.limited_by
            return None
        before, self.current, self._candidate = self.current, diagnosis, None
        return diagnosis if before is None or before.limited_by != diagnosis.limited_by else None
