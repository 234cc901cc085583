"""What the processes of a training bring together, against one of them alone: for its report.

Before the first step, on a copy of what is trained: the first process computes whole steps on its share of the batch
while the others wait without computing; then all do so at once, each by itself; then they add up as many bytes as the
gradients have. What a step takes together is known when the training ends: it is the training's own. So this costs a
few steps and tells less than `suanli bench --scaling`: one number of processes, and no spread.

A step is taken apart as in `scaling_figures`, and the baseline is another one: one process with the share that it has
in the group (weak scaling), which fits into its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, median

import torch
from torch import distributed as dist

from suanli import hardware
from suanli.console import duration, say
from suanli.distributed import Group
from suanli.learner import active
from suanli.loop import Loop
from suanli.measure import seconds, spread
from suanli.scaling_figures import Timed, verdict, waiting
from suanli.scaling_model import buckets
from suanli.synchronised import norms
from suanli.types import Device, Json, Plan, Step

SHARE = 0.05  # of the steps to come that measuring may take
WARM_UP = 2  # steps before any is timed
FEWEST, MOST = 4, 50  # timed steps of a kind
BLOCK_S = 1.0  # about so long they take
LONG_S = 5.0  # what takes longer is announced
SUMS = 3  # of the gradients, after one that isn't timed


@dataclass(frozen=True, kw_only=True)
class Aside:
    """What was measured beside a training; seconds are those of a step at full size."""

    alone_s: float  # of the first process, while nothing else computes
    steps_s: tuple[tuple[float, ...], ...]  # by rank and number: of all at once, each by itself
    communication_s: float  # of the gradients' all-reduce by itself
    local_batch: tuple[int, ...]  # by rank
    threads: int  # CPU threads of each
    norms: int
    speedups: tuple[str, ...] = ()
    device: str = ""

    @classmethod
    def of(cls, found: Mapping[str, Json]) -> Aside:
        """From its JSON."""
        tuples = {name: tuple(found[name]) for name in ("local_batch", "speedups")}
        return cls(**{**found, **tuples, "steps_s": tuple(map(tuple, found["steps_s"]))})

    def holds(self, group: Group, plan: Plan, device: Device) -> bool:
        """Whether a training that goes on does so as this was measured."""
        now = (group.size, plan.threads or torch.get_num_threads(), tuple(plan.speedups), device.name)
        return (len(self.steps_s), self.threads, self.speedups, self.device) == now


def measured(make: Callable[[Plan], Loop], group: Group, steps: float, plan: Plan, device: Device) -> Aside | None:
    """A collective: `make` gives a copy of what is trained by a plan, which asks no other process, and `steps` are to
    come. None: they are too few to spend some on this, or there is no memory for a copy."""
    if steps * SHARE < 2 * (WARM_UP + FEWEST):
        return None
    loop = _warm(make, plan)
    if any(group.each(loop is None)) or loop is None:
        return None
    with active(loop.compute):
        pace_s = group.of_first(seconds(loop.advance) if group.first else None)  # the others wait in the store
        most = min(MOST, int(steps * SHARE / 2) - WARM_UP)
        count = min(most, max(FEWEST, round(BLOCK_S / pace_s)))
        if group.first and (takes_s := 2 * count * pace_s) > LONG_S:
            say(f"computing a few steps alone and together, for the table of scaling: about {duration(takes_s)}")
        alone_s = group.of_first(_steps_s(loop, count) if group.first else None)
        group.wait()
        every = group.each(_steps_s(loop, count))
        threads = torch.get_num_threads()
    return Aside(
        alone_s=fmean(alone_s),
        steps_s=tuple(map(tuple, every)),
        communication_s=_gradients_s(loop.compute, group, loop.device),
        local_batch=tuple(group.each(loop.batch_size)),
        threads=threads,
        norms=len(norms(loop.model)),
        speedups=tuple(plan.speedups),
        device=device.name,
    )


def _warm(make: Callable[[Plan], Loop], plan: Plan) -> Loop | None:
    """None: memory ran out. What comes later needs no more."""
    try:
        loop = make(plan)
        with active(loop.compute):
            for _ in range(WARM_UP):
                loop.advance()
    except (RuntimeError, MemoryError, SystemError) as error:
        if not hardware.out_of_memory(error):
            raise
        return None
    return loop


def _steps_s(loop: Loop, count: int) -> list[float]:
    return [seconds(loop.advance) for _ in range(count)]


# --- the gradients by themselves ---


def sent_buckets(step: Step) -> tuple[tuple[int, ...], torch.dtype]:
    """Bytes of each bucket in which the gradients are sent, and as what."""
    dtype = step.reduce_dtype or torch.float32
    filled = buckets(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad)
    return tuple(size * dtype.itemsize // 4 for size in filled), dtype


def all_reduces_s(group: Group, tensors: Sequence[torch.Tensor], settle: Callable[[], None]) -> float:
    """A collective: of all-reduces that are issued at once, as DistributedDataParallel issues them."""
    group.sum(tensors[0].new_zeros(1))  # all begin now
    return seconds(partial(_all_reduce, tensors), settle)


def _all_reduce(tensors: Sequence[torch.Tensor]) -> None:
    for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
        assert work is not None
        work.wait()


def _gradients_s(step: Step, group: Group, device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    sizes, dtype = sent_buckets(step)
    filled = [torch.zeros(size // dtype.itemsize, dtype=dtype, device=device) for size in sizes]
    return median([all_reduces_s(group, filled, settle) for _ in range(1 + SUMS)][1:])


# --- the figures ---


def told(aside: Aside, *, step_s: float, work: float, batch: int, about: Mapping[str, Json]) -> dict[str, Json]:
    """What the report shows, like scaling.json. A step of the training took `step_s` on `batch` examples, and was
    `work` steps at full size, in the mean."""
    found = _sizes(aside, step_s, work, batch)
    return {
        **about,
        "as_trained": True,
        "batch_size": batch,
        "sizes": [asdict(one) for one in found],
        "verdict": verdict(found, shared=False, fixed_share=True),
    }


def _sizes(aside: Aside, step_s: float, work: float, batch: int) -> tuple[Timed, Timed]:
    count = len(aside.steps_s)
    alone_s = aside.alone_s * work
    compute_s = fmean(map(fmean, aside.steps_s)) * work
    wait_s = waiting(aside.steps_s) * work
    exposed_s = max(0.0, step_s - compute_s - wait_s)
    rates = aside.local_batch[0] / alone_s, batch / step_s
    gain = rates[1] / rates[0]
    one = Timed(
        processes=1,
        threads=aside.threads,
        local_batch=aside.local_batch[:1],
        images_per_s=spread([rates[0]]),
        speedup=spread([1.0]),
        efficiency=1.0,
        step_s=alone_s,
        compute_s=alone_s,
        wait_s=0.0,
        communication_s=0.0,
        exposed_s=0.0,
        hidden_s=0.0,
        input_s=None,
        norms=aside.norms,
    )
    return one, Timed(
        processes=count,
        threads=aside.threads,
        local_batch=aside.local_batch,
        images_per_s=spread([rates[1]]),
        speedup=spread([gain]),
        efficiency=gain / count,
        step_s=step_s,
        compute_s=compute_s,
        wait_s=wait_s,
        communication_s=aside.communication_s,
        exposed_s=exposed_s,
        hidden_s=max(0.0, aside.communication_s - exposed_s),
        input_s=None,
        norms=aside.norms,
    )
