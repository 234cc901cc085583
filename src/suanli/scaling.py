"""One of the processes in which `suanli bench --scaling` measures the training step: python -m suanli.scaling JSON.

The argument says what is trained and how (`Wanted`); which process this is comes from torchrun's variables, so that
several of them make up a group, and one without them is a group by itself. For each line on standard input a round is
measured, and each answer is one line of JSON on standard output; the first process has the figures of all. Between
rounds a process waits without computing, so that groups of other sizes can take their turns.

A round times blocks of whole steps, as `Loop.run` does them; blocks of the same steps on the same shares of a batch
that ask no other process; the all-reduce of the gradients by itself; all-reduces of several sizes; and forward and
backward passes on the share and on less. What this doesn't do: judge, or keep anything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO

import torch

from suanli import distributed, hardware
from suanli.assembly import Assembly
from suanli.cache import Prepared
from suanli.distributed import Group
from suanli.errors import SuanliError
from suanli.learner import active
from suanli.measure import seconds
from suanli.phases import Shares
from suanli.plugins import load, names
from suanli.scaling_trained import all_reduces_s, sent_buckets
from suanli.start import Start
from suanli.synchronised import norms
from suanli.types import Device, Json, Recipe
from suanli.verbs.prepare import DataOptions, resolve
from suanli.visits import Way

ENDLESS = 1e6  # epochs: who measures stops asking for steps
RATE = 1e-9  # of learning: it changes no time, and losses stay finite however many steps there are
WARM_UP = 3  # steps of each kind before any is timed
BLOCK_S = 1.5  # of one kind of step in a round, where their number isn't given
FEWEST, MOST = 3, 200  # steps of a block
SIZES = (4, 4 << 10, 64 << 10, 1 << 20, 8 << 20)  # bytes of the all-reduces from which the link is told
REPEATS = (20, 20, 20, 5, 3)
SUMS = 3  # of the gradients, in a round
PASSES = 2  # forward and backward, on the share and on less, in a round
LESS = 4  # times fewer examples
BACKWARD_SHARE = 2 / 3  # where it isn't told apart: two of the three matrix products of a layer


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the argument says."""

    options: dict[str, Json]  # of the data, as `DataOptions` has them
    recipe: dict[str, Json]
    device: str  # "cpu", or "cuda": each process has a GPU of its own
    speedups: str
    threads: int
    steps: int | None  # of a block; None: for about BLOCK_S
    cache: str


def measured_recipe(recipe: Recipe) -> Recipe:
    """The same work in every step, for ever: pictures at full size, and a rate at which nothing diverges."""
    return recipe.model_copy(update={"lr": RATE, "progressive_resizing": (), "early_stop": None})


class Member:
    """This process's part of the rounds."""

    def __init__(self, wanted: Wanted, recipe: Recipe, prepared: Prepared, device: Device, group: Group) -> None:
        """A collective. Raises what `Start.ready` raises."""
        self.group, self.device, self.threads = group, device, wanted.threads
        start = Start(
            recipe=recipe,
            prepared=prepared,
            device=device,
            cache=Path(wanted.cache),
            requested=_of_one(wanted.speedups) if group.alone else wanted.speedups,
            threads=wanted.threads,
            group=group,
        )
        start.ready()
        self.speedups = start.plan.speedups
        self.loop = start.loop
        self.apart = Assembly(recipe, prepared, device, group=group).trial(start.plan)
        for loop in (self.loop, self.apart):
            loop.progress.segments = [ENDLESS]
        self.together_way, self.apart_way = Way(self.loop, device), Way(self.apart, device)
        self.parameters = [p for p in self.loop.model.parameters() if p.requires_grad]
        self.buckets, self.sent_dtype = sent_buckets(self.loop.compute)
        self.norms = 0 if group.alone else len(norms(self.loop.model))
        share = self.loop.batch_size
        self.small_batch = min(share, max(2, share // LESS))
        for way in (self.together_way, self.apart_way):
            way.train(WARM_UP, timed=False)
        self.steps = wanted.steps or self._affordable()
        self._rounds = 0

    def _affordable(self) -> int:
        """A collective: steps of a block."""
        (pace_s,) = self.group.most(self.together_way.training.pace_s)
        return min(MOST, max(FEWEST, round(BLOCK_S / pace_s)))

    def round(self) -> dict[str, Json]:
        """A collective: the figures of all processes, lists by rank."""
        kinds = [self.together_way, self.apart_way]
        for way in kinds if self._rounds % 2 == 0 else kinds[::-1]:
            self._block(way)
        self._rounds += 1
        apart, together = self.apart_way.training, self.together_way.training
        steps_s = apart.step_s[-self.steps :]
        compute_s = apart.seconds[-1] / self.steps
        own: dict[str, Json] = {
            "step_s": together.seconds[-1] / self.steps,
            "compute_s": compute_s,
            "steps_s": steps_s,
            "input_s": _input_s(self.loop.learner.clock.window()),
            "backward_share": _backward_share(self.apart.learner.clock.window()),
            "local_batch": self.loop.batch_size,
            "small_batch": self.small_batch,
            "small_s": compute_s - self._saved_s(compute_s),
            "communication_s": self._gradients_s(),
        }
        link = self._link()
        every = self.group.each(own)
        if self.device.type == "cuda":  # other groups use this GPU, too
            torch.cuda.empty_cache()
        return {name: [one[name] for one in every] for name in own} | {
            "batch": self.loop.order.batch_size,
            "steps": self.steps,
            "threads": self.threads,
            "speedups": list(self.speedups),
            "buckets": list(self.buckets),
            "norms": self.norms,
            "all_reduce_s": link,
        }

    def _block(self, way: Way) -> None:
        way.train(1, timed=False)  # it finds the caches full of another's data
        self.group.wait()
        way.train(self.steps)

    def _saved_s(self, compute_s: float) -> float:
        """By computing fewer examples: from forward and backward passes, since the rest of a step costs the same for
        any number. At most in proportion."""
        share, loop = self.loop.batch_size, self.apart
        if share == self.small_batch:
            return 0.0
        took: dict[int, list[float]] = {share: [], self.small_batch: []}
        self.group.wait()
        with active(loop.compute):
            for number in range(1 + PASSES):
                for examples, found in took.items():
                    once = seconds(partial(loop.try_step, examples), self._settle)
                    found += [once] if number else []
        loop.model.zero_grad(set_to_none=True)
        saved_s = median(took[share]) - median(took[self.small_batch])
        return min(max(0.0, saved_s), compute_s * (1 - self.small_batch / share))

    # --- communication by itself ---

    def _gradients_s(self) -> float:
        """A collective: of the all-reduces of one step, issued as DistributedDataParallel issues them."""
        if self.group.alone:
            return 0.0
        width = self.sent_dtype.itemsize
        filled = [
            torch.zeros(size // width, dtype=self.sent_dtype, device=self.device.torch_name) for size in self.buckets
        ]
        return median(all_reduces_s(self.group, filled, self._settle) for _ in range(SUMS))

    def _link(self) -> list[tuple[int, float]]:
        """A collective: bytes and seconds of all-reduces, the same in every process."""
        if self.group.alone:
            return []
        found = []
        for size, repeats in zip(SIZES, REPEATS, strict=True):
            values = torch.zeros(size // 4, device=self.device.torch_name)
            own = [all_reduces_s(self.group, [values], self._settle) for _ in range(repeats)]
            found.append((size, self.group.most(median(own))[0]))
        return found

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device.torch_name)


def _of_one(speedups: str) -> str:
    """Of the names in a list those that one process has a use for."""
    known = names("speedups")
    chosen = [name.strip() for name in speedups.split(",")]
    return ",".join(n for n in chosen if n not in known or not load("speedups", n).between_processes) or "none"


def _input_s(window: Shares | None) -> float | None:
    """Of a step; None where it isn't told apart."""
    share = None if window is None else window.shares.get("input")
    return None if window is None or share is None else share * window.step_s


def _backward_share(window: Shares | None) -> float:
    """Of a step without the time in which nothing is told apart."""
    share = None if window is None else window.shares.get("backward")
    if window is None or not share:
        return BACKWARD_SHARE
    return share / (1 - (window.shares.get("idle") or 0.0))


# --- the process ----------------------------------------------------------------------------


def main(argument: str, lines: IO[str], answer: Callable[[Json], None]) -> int:
    """Answers each line with a round, until there are no more. An error that suanli raises is an answer too."""
    wanted = Wanted(**json.loads(argument))
    torch.set_num_threads(wanted.threads)
    try:
        member = _member(wanted)
        group = member.group
        answer({"ready": group.rank, "steps": member.steps})
        for _ in lines:
            found = member.round()
            answer(found if group.first else {"rank": group.rank})
    except SuanliError as error:
        answer({"kind": type(error).__name__, "error": error.message, "fix": error.fix})
        return error.exit_code
    distributed.leave()
    return 0


def _member(wanted: Wanted) -> Member:
    here = distributed.place()
    name = f"cuda:{0 if here is None else here.local_rank}" if wanted.device == "cuda" else wanted.device
    device = hardware.detect(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.torch_name)
    group = distributed.join(device.type)
    options = DataOptions(**wanted.options)
    recipe, prepared = resolve(options, recipe=Recipe.model_validate(wanted.recipe), settings={}, tell=False)
    return Member(wanted, measured_recipe(recipe), prepared, device, group)


def _own_output() -> Callable[[Json], None]:
    """Writes answers where standard output was; whatever else is printed goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Json) -> None:
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.stdin, _own_output()))
