"""What a training says of itself: the sentences before its first step, and `summary.json`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict

from suanli.compute.plan import SHORT_LIST
from suanli.compute.planner import SHARDED
from suanli.core.console import duration, plural
from suanli.core.run import FINISHED, Run, measurement
from suanli.core.types import Plan
from suanli.machine.device import environment, peak_memory_bytes
from suanli.training.diagnose import Diagnosis
from suanli.training.options import TrainerOptions
from suanli.training.session import Session


class Summary:
    """`summary.json` of a run, written by the first process only."""

    def __init__(self, session: Session, run: Run, options: TrainerOptions) -> None:
        self.session, self.run, self.options = session, run, options
        self.fallbacks: list[Mapping[str, object]] = list(options.fallbacks)
        self.plan_changes: list[Mapping[str, object]] = []  # to what was faster
        self.seconds = {} if options.prepare_s is None else {"prepare": options.prepare_s}
        if session.frozen is not None and session.spec.checkpoint is None and options.prepare_s is not None:
            fitting_s = session.frozen.figures.seconds
            self.seconds = {"prepare": max(0.0, options.prepare_s - fitting_s), "frozen_features": fitting_s}
        self.processes = options.processes
        if self.processes is not None:
            self.processes = self.processes | {"shares": list(session.group.shares) or None}
        self.gate: dict[str, object] | None = None  # the final score compared with float32
        self.frozen = session.frozen  # the head that the training began with; None: another
        self.started = time.perf_counter()

    def write_running(self) -> None:
        """Write what is needed to resume the run."""
        self.run.write("summary.json", {"status": "running"} | self._lasting())

    def write(self, status: str, diagnosis: Diagnosis | None) -> None:
        """Write all figures; of a finished training, also record its rate."""
        loop, device = self.session.loop, self.session.device
        self.seconds["train"] = self.options.earlier_s + time.perf_counter() - self.started
        seconds = loop.progress.seconds
        rate = loop.progress.step * loop.order.batch_size / seconds if seconds else None
        figures = {
            "status": status,
            "steps": loop.progress.step,
            "epochs": loop.epoch,
            "parameters": sum(p.numel() for p in loop.model.parameters()),
            "seconds": self.seconds,
            "examples_per_s": rate,
            "peak_memory_bytes": peak_memory_bytes(device),
            "limited_by": diagnosis.verdict if diagnosis else None,
            "diagnosis": diagnosis.to_json() if diagnosis else None,
            "gate": self.gate,
        }
        if loop.progress.plans:
            figures["plans"] = loop.progress.plans
        self.run.write("summary.json", figures | self._lasting())
        if status in FINISHED and rate is not None:
            self._record(rate)

    def _lasting(self) -> dict[str, object]:
        trains = self.session.loop.steps > 0
        return {
            "forecast": self.session.forecast.to_json() if trains else None,
            "plan": asdict(self.session.plan) if trains else None,
            "frozen": self.frozen and self.frozen.describe(),
            "fallbacks": self.fallbacks,
            "plan_changes": self.plan_changes,
            "wanted_score": self.options.target_score,
            "processes": self.processes,
            "shard": self.options.shard,
        }

    def _record(self, rate: float) -> None:
        session, loop = self.session, self.session.loop
        score = loop.validation_score
        self.run.record(
            measurement(
                "examples_per_s",
                rate,
                "1/s",
                environment=environment(session.device),
                recipe=session.recipe,
                variant="+".join(session.plan.speedups) or "none",
                scores={} if score is None else {f"val_{loop.task.metric.name}": score},
                count=loop.progress.step,
            )
        )


def describe(session: Session) -> str:
    """Network, recipe, device and plan, on one line."""
    recipe, plan = session.recipe, session.plan
    parameters = sum(p.numel() for p in session.loop.model.parameters())
    how = "+".join(plan.speedups) or "plain PyTorch"
    if plan.threads is not None:
        how += f", {plural(plan.threads, 'thread')}"
    size = f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters:,}"
    return f"{recipe.model} ({size} parameters), recipe {recipe.name}, {session.device.name}, {how}"


def describe_planning(plan: Plan) -> str | None:
    """The result of planning in a sentence; None where nothing was planned."""
    if plan.origin == SHARDED and plan.speedups:
        return "plan: the usual speedups; a sharded network has no copies on which to measure more"
    if plan.origin == SHORT_LIST:
        return "plan: the usual speedups to begin with; there is no time for trials before the training"
    if plan.origin != "measured":
        return None
    ratios = [t.ratio for t in plan.trials if t.kept and t.ratio is not None]
    gain = f"{math.prod(ratios):.2f} times as fast as" if ratios else "nothing was faster than"
    return f"plan: {gain} plain PyTorch; {plural(len(plan.trials), 'change')} tried in {duration(plan.seconds)}"
