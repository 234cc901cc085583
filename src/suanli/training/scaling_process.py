"""One of the processes in which `bench --scaling` measures training steps: python -m suanli.training.scaling_process.

It answers requests on standard input (`engines/sandbox.py`); torchrun's variables say which process of a group it is.
Between requests it waits without computing, so that groups of other sizes can measure. `scaling.py` computes the
figures.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

import torch

from suanli.core.errors import SuanliError
from suanli.core.registry import load, names
from suanli.core.types import Json, Recipe
from suanli.engines import sandbox
from suanli.machine.device import detect
from suanli.machine.microbenchmarks import synchronizer
from suanli.machine.timing import seconds
from suanli.parallel import group
from suanli.parallel.sync_batchnorm import batch_norms
from suanli.training.prepare import DataOptions, resolve
from suanli.training.scaling_records import ProcessRound
from suanli.training.session import Session, TrainingSpec
from suanli.training.setup import Setup
from suanli.training.timed_run import TimedRun

ENDLESS = 1e6  # epochs: the training never ends by itself
# Every step costs the same: images have their full size, all layers learn, and with so small a learning rate losses
# stay finite.
EQUAL_STEPS: dict[str, Json] = {
    "lr": 1e-9,
    "early_stop": None,
    "progressive_resizing": (),
    "mixed_sizes": (),
    "unfreeze_epochs": 0.0,
    "final_epochs": 0.0,
}
WARM_UP = 3  # steps before any is timed
BLOCK_S = 1.5  # of one kind of step in a round, if no number of steps is given
FEWEST, MOST = 3, 200  # steps of a block
REPEATS = 5  # of an all-reduce, in a round


class Member:
    """This process's part of the group, by the names of the requests. Both methods are collectives."""

    def __init__(self) -> None:
        self._steps: _TimedSteps | None = None  # None: `join` has not been asked

    def join(
        self, *, options: Json, recipe: Json, device: str, threads: int, speedups: str, steps: int | None, cache: str
    ) -> dict[str, Json]:
        """Meets the others and prepares to train. Gives an error of suanli as its kind, message and fix."""
        torch.set_num_threads(threads)
        try:
            rank = group.process_place()
            target = detect(f"cuda:{rank.local_rank}" if rank and device == "cuda" else device)
            if target.type == "cuda":
                torch.cuda.set_device(target.torch_name)
            members = group.join_group(target.type)
            recipe, prepared = resolve(
                DataOptions(**options), recipe=Recipe.model_validate(recipe), settings={}, announce=False
            )
            spec = TrainingSpec(
                recipe=recipe.model_copy(update=EQUAL_STEPS),
                prepared=prepared,
                device=target,
                cache=Path(cache),
                requested=_without_communication(speedups) if members.is_alone else speedups,
                threads=threads,
                group=members,
            )
            self._steps = _TimedSteps(spec, steps)
        except SuanliError as error:
            return {"kind": type(error).__name__, "message": error.message, "fix": error.fix}
        return {}

    def measure(self) -> dict[str, Json]:
        """One round: what every process measured, by rank."""
        assert self._steps is not None, "the first request is to join"
        return {"processes": self._steps.measure()}


class _TimedSteps:
    """Training steps of all processes together, and of each by itself. Opening it and `measure` are collectives."""

    def __init__(self, spec: TrainingSpec, steps: int | None) -> None:
        """`steps`: of a block; None: as many as take BLOCK_S."""
        session = Session(spec)
        self.group, self.device, self.plan, loops = spec.group, spec.device, session.plan, [session.loop]
        if not self.group.is_alone:  # a copy that doesn't communicate
            loops.append(Setup(spec.recipe, spec.prepared, self.device, group=self.group).trial(session.plan))
        for loop in loops:
            loop.progress.segments = [ENDLESS]
        self.runs = [TimedRun(loop, self.device) for loop in loops]
        for run in self.runs:
            run.train(WARM_UP, timed=False)
        (pace_s,) = self.group.max(self.runs[0].training.pace_s)
        self.steps = steps or min(MOST, max(FEWEST, round(BLOCK_S / pace_s)))
        self.rounds = 0

    def measure(self) -> list[ProcessRound]:
        """One round: what every process measured, by rank."""
        for run in self.runs if self.rounds % 2 == 0 else self.runs[::-1]:
            run.train(1, timed=False)  # the caches hold another network's data
            self.group.barrier()
            run.train(self.steps)
        self.rounds += 1
        loop = self.runs[0].loop
        dtype = loop.compute.reduce_dtype or torch.float32
        gradients = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
        own: ProcessRound = {
            "steps_s": self.runs[0].training.step_s[-self.steps :],
            "alone_s": self.runs[-1].training.step_s[-self.steps :],
            "local_batch": loop.batch_size,
            "threads": torch.get_num_threads(),
            "speedups": list(self.plan.speedups),
            "norms": 0 if self.group.is_alone else len(batch_norms(loop.model)),
            "gradient_bytes": gradients * dtype.itemsize,
            "all_reduce_s": self._all_reduce_s(gradients, dtype),
            "latency_s": self._all_reduce_s(1, dtype),
        }
        every = self.group.gather(own)
        if self.device.type == "cuda":  # other groups use this GPU, too
            torch.cuda.empty_cache()
        return every

    def _all_reduce_s(self, count: int, dtype: torch.dtype) -> float:
        """Of so many values, by itself."""
        if self.group.is_alone:
            return 0.0
        values, times_s = torch.zeros(count, dtype=dtype, device=self.device.torch_name), []
        for _ in range(REPEATS):
            self.group.sum(values[:1])  # all begin now
            times_s.append(seconds(partial(self.group.sum, values), synchronizer(self.device)))
        return median(times_s)


def _without_communication(speedups: str) -> str:
    """The names in a list that help a single process."""
    chosen, known = [name.strip() for name in speedups.split(",")], names("speedups")
    return ",".join(n for n in chosen if n not in known or not load("speedups", n).distributed_only) or "none"


if __name__ == "__main__":
    sandbox.serve(Member())
