"""Training steps of 1, 2, … processes that share each batch: groups that measure in turns, and the figures.

A step of a group is taken apart by what was measured directly, round by round:

    step = computing (the mean process, on its share of the batch, without asking the others)
         + waiting   (how much later than the mean the slowest process is)
         + exposed   (what is left: communication that the backward pass doesn't hide)
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean, median

from suanli.core.console import Progress, plural
from suanli.core.errors import MachineError
from suanli.core.types import Json
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine import device
from suanli.machine.timing import STEADY, Spread, spread
from suanli.parallel import fatal

ANSWER_S = 900.0  # for a round, or for getting ready with a plan
GOOD = 0.95  # efficiency from which on nothing is said to limit
LOSSES = {  # what they are called, and what may help
    "communication": (
        "communication that the backward pass doesn't hide",
        "A larger batch asks less often, and bf16_gradients among the --speedups halves the bytes.",
    ),
    "waiting": ("waiting for the slowest process", "Look for what else uses the machine."),
    "computing": (
        "computing that more processes don't make shorter",
        "Processes share caches and memory, and a step has a fixed cost: try a larger batch.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one number of processes reached; seconds are those of a step."""

    processes: int
    threads: int  # CPU threads of each
    local_batch: tuple[int, ...]  # by rank
    speedups: tuple[str, ...]
    images_per_s: Spread
    speedup: Spread  # against one process with all threads
    efficiency: float
    step_s: float
    compute_s: float
    wait_s: float
    exposed_s: float
    norms: int  # layers that ask the other processes
    gradient_bytes: int
    all_reduce_s: float  # of the gradients, by itself
    latency_s: float  # of an all-reduce of one number


# --- the groups -----------------------------------------------------------------------------


def measure(counts: Sequence[int], job: Mapping[str, Json], rounds: int) -> dict[int, list[list[Json]]]:
    """For each number of processes and each round, what every process measured. Raises what a process raised, and
    MachineError where one ended or didn't answer."""
    found: dict[int, list[list[Json]]] = {count: [] for count in counts}
    with ExitStack() as stack, Progress("Scaling", len(counts) * (1 + rounds)) as progress:
        groups = {}
        for done, count in enumerate(counts, start=1):  # one after the other, since each may measure a plan
            threads = max(1, device.cores() // count)
            groups[count] = stack.enter_context(start(count, threads))
            ask(groups[count], "join", **job, threads=threads)
            progress.update(done, f"{count} ready")
        for number in range(rounds):
            for count in counts if number % 2 == 0 else counts[::-1]:
                found[count].append(ask(groups[count], "measure")["processes"])
            progress.update(len(counts) * (2 + number), f"round {number + 1}")
    return found


@contextmanager
def start(count: int, threads: int) -> Iterator[list[Sandbox]]:
    """A group of so many processes, which end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "OMP_NUM_THREADS": threads}
    common |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    with ExitStack() as stack:
        members = []
        for rank in range(count):
            variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            host = Sandbox(module="suanli.training.scaling_process", environment=variables)
            members.append(stack.enter_context(host))
        yield members


def ask(group: Sequence[Sandbox], do: str, **request: Json) -> dict[str, Json]:
    """The reply of the first process, once all have replied; the first error of any is raised."""
    for host in group:
        host.send(do, **request)
    replies: dict[Sandbox, dict[str, Json]] = {}
    until = time.monotonic() + ANSWER_S
    while waiting := [host for host in group if host not in replies]:
        ready, _, _ = select.select(waiting, [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise MachineError(f"{len(group)} processes didn't answer for {ANSWER_S:g} s.", fix="Give fewer --steps.")
        for host in ready:
            try:
                replies[host] = host.receive(ANSWER_S)
            except SandboxError as error:
                raise MachineError(
                    f"Process {group.index(host)} of {len(group)} can't measure: {error}.",
                    fix="If memory ran out, give fewer --processes or a smaller --batch-size.",
                ) from error
            if "kind" in replies[host]:
                raise fatal.restore_error(replies[host])
    return replies[group[0]]


# --- the figures ----------------------------------------------------------------------------


def work_out(rounds: Mapping[int, Sequence[Sequence[Json]]], *, shared: bool) -> tuple[Size, ...]:
    """The figures, from what `measure` gives; one process is among the numbers. `shared`: the processes share the
    cores of one CPU, so the best that they can reach is the rate of one process; else each has its own device."""
    first_s = [_step_s(every) for every in rounds[1]]
    return tuple(_size(count, rounds[count], first_s, shared) for count in sorted(rounds))


def _size(count: int, rounds: Sequence[Sequence[Json]], first_s: Sequence[float], shared: bool) -> Size:
    steps_s = [_step_s(every) for every in rounds]
    computes_s = [fmean(fmean(one["alone_s"]) for one in every) for every in rounds]
    waits_s = [_wait_s([one["alone_s"] for one in every]) for every in rounds]
    exposed_s = median(s - c - w for s, c, w in zip(steps_s, computes_s, waits_s, strict=True))
    speedup = spread([one / s for one, s in zip(first_s, steps_s, strict=True)])
    first, local_batch = rounds[0][0], tuple(one["local_batch"] for one in rounds[0])
    return Size(
        processes=count,
        **{name: first[name] for name in ("threads", "norms", "gradient_bytes")},
        local_batch=local_batch,
        speedups=tuple(first["speedups"]),
        images_per_s=spread([sum(local_batch) / s for s in steps_s]),
        speedup=speedup,
        efficiency=speedup.median / (1 if shared else count),
        step_s=median(steps_s),
        compute_s=median(computes_s),
        wait_s=median(waits_s),
        exposed_s=max(0.0, exposed_s),
        **{name: median(every[0][name] for every in rounds) for name in ("all_reduce_s", "latency_s")},
    )


def _step_s(every: Sequence[Json]) -> float:
    """All are done when the slowest is."""
    return max(fmean(one["steps_s"]) for one in every)


def _wait_s(steps_s: Sequence[Sequence[float]]) -> float:
    """Of steps by rank and number: the mean of the slowest less the mean of all."""
    by_step = list(zip(*steps_s, strict=True))
    return fmean(map(max, by_step)) - fmean(map(fmean, by_step))


def judge(sizes: Sequence[Size], *, shared: bool) -> dict[str, Json]:
    """What the largest number of processes loses, in seconds of a step; the largest loss (None: nothing limits); and
    both in sentences."""
    one, last = sizes[0], sizes[-1]
    computing_s = max(0.0, last.compute_s - one.compute_s / (1 if shared else last.processes))
    lost = {"communication": last.exposed_s, "waiting": last.wait_s, "computing": computing_s}
    worst = max(lost, key=lambda key: lost[key])
    said = f"{plural(last.processes, 'process', 'processes')} are {last.speedup.median:.2f} times as fast as one"
    said += " with all cores." if shared else f", {last.efficiency:.0%} of what is possible."
    limit = None if last.processes == 1 or last.efficiency >= GOOD or not lost[worst] else worst
    if last.processes == 1:
        said = "Only one process was measured: there is nothing to compare."
    elif limit is None:
        said += " Nothing limits scaling yet."
    else:
        what, helps = LOSSES[limit]
        said += f" Most is lost to {what}: {lost[limit] / last.step_s:.0%} of a step. {helps}"
    if any(size.images_per_s.relative > STEADY for size in sizes):
        said += " Rates varied by more than a tenth between rounds: something else used the machine, so measure again."
    return {"limited_by": limit, "lost_s": lost, "said": said}
