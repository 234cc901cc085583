"""One of the processes in which `bench --scaling` measures training steps: python -m suanli.training.scaling_process.

It answers requests on standard input (`hosts.serve`); which process of a group it is comes from torchrun's variables.
Between requests it waits without computing, so that groups of other sizes can measure. What this doesn't do: work out
figures, which `scaling.py` does.
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
from suanli.training.session import Session, TrainingSpec
from suanli.training.setup import Setup
from suanli.training.timed_run import Way

ENDLESS = 1e6  # epochs: the training never ends by itself
RATE = 1e-9  # of learning: it changes no time, and losses stay finite however many steps there are
WARM_UP = 3  # steps before any is timed
BLOCK_S = 1.5  # of one kind of step in a round, if no number of steps is given
FEWEST, MOST = 3, 200  # steps of a block
REPEATS = 5  # of an all-reduce, in a round


class Member:
    """This process's part of the group. Both methods are collectives."""

    def join(self, *, options: Json, recipe: Json, device: str, steps: int | None, **how: Json) -> dict[str, Json]:
        """Meets the others and gets ready to train. Gives an error of suanli as its kind, message and fix."""
        torch.set_num_threads(how["threads"])
        try:
            here = group.process_place()
            self.device = detect(f"cuda:{here.local_rank}" if here and device == "cuda" else device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device.torch_name)
            self.group = group.join_group(self.device.type)
            self._get_ready(DataOptions(**options), Recipe.model_validate(recipe), **how)
        except SuanliError as error:
            return {"kind": type(error).__name__, "message": error.message, "fix": error.fix}
        for way in self.ways:
            way.train(WARM_UP, timed=False)
        (pace_s,) = self.group.max(self.ways[0].training.pace_s)
        self.steps = steps or min(MOST, max(FEWEST, round(BLOCK_S / pace_s)))
        self.rounds = 0
        return {}

    def _get_ready(self, options: DataOptions, recipe: Recipe, *, speedups: str, threads: int, cache: str) -> None:
        """Every step costs the same: pictures have their full size, and nothing can diverge."""
        recipe, prepared = resolve(options, recipe=recipe, settings={}, announce=False)
        recipe = recipe.model_copy(update={"lr": RATE, "progressive_resizing": (), "early_stop": None})
        spec = TrainingSpec(
            recipe=recipe,
            prepared=prepared,
            device=self.device,
            cache=Path(cache),
            requested=_for_one(speedups) if self.group.is_alone else speedups,
            threads=threads,
            group=self.group,
        )
        session = Session(spec)
        self.plan, loops = session.plan, [session.loop]
        if not self.group.is_alone:  # a copy that asks no other process
            loops.append(Setup(recipe, prepared, self.device, group=self.group).trial(session.plan))
        for loop in loops:
            loop.progress.segments = [ENDLESS]
        self.ways = [Way(loop, self.device) for loop in loops]

    def measure(self) -> dict[str, Json]:
        """One round: what every process measured, by rank."""
        for way in self.ways if self.rounds % 2 == 0 else self.ways[::-1]:
            way.train(1, timed=False)  # the caches hold another network's data
            self.group.barrier()
            way.train(self.steps)
        self.rounds += 1
        loop = self.ways[0].loop
        dtype = loop.compute.reduce_dtype or torch.float32
        gradients = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
        own = {
            "steps_s": self.ways[0].training.step_s[-self.steps :],  # of all processes together
            "alone_s": self.ways[-1].training.step_s[-self.steps :],  # of all at once, each by itself
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
        return {"processes": every}

    def _all_reduce_s(self, count: int, dtype: torch.dtype) -> float:
        """Of so many values, by itself."""
        if self.group.is_alone:
            return 0.0
        values, found = torch.zeros(count, dtype=dtype, device=self.device.torch_name), []
        for _ in range(REPEATS):
            self.group.sum(values[:1])  # all begin now
            found.append(seconds(partial(self.group.sum, values), synchronizer(self.device)))
        return median(found)


def _for_one(speedups: str) -> str:
    """The names in a list that one process has a use for."""
    chosen, known = [name.strip() for name in speedups.split(",")], names("speedups")
    return ",".join(n for n in chosen if n not in known or not load("speedups", n).distributed_only) or "none"


if __name__ == "__main__":
    sandbox.serve(Member())
