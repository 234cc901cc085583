"""Training steps of 1, 2, … processes that share each batch: groups that measure in turns, and the figures.

A step of a group has three parts, from what was measured directly, round by round:

    step = computing (the mean process, on its share of the batch, without communication)
         + waiting   (how much later than the mean the slowest process is)
         + exposed   (what is left: communication that the backward pass doesn't hide)
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean, median

from suanli.core.console import Progress, plural
from suanli.core.errors import MachineError
from suanli.core.types import Json
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine import device
from suanli.machine.timing import STEADY, spread
from suanli.parallel import fatal
from suanli.training.scaling_records import ProcessRound, ScalingSize, Verdict

Rounds = Sequence[Sequence[ProcessRound]]  # of each round, what every process measured

ANSWER_S = 900.0  # for a round, or for getting ready with a plan
GOOD = 0.95  # efficiency from which on nothing limits
LOSSES = {  # their names, and what may help
    "communication": (
        "communication that the backward pass doesn't hide",
        "A larger batch communicates less often, and bf16_gradients among the --speedups halves the bytes.",
    ),
    "waiting": ("waiting for the slowest process", "Look for what else uses the machine."),
    "computing": (
        "computing that more processes don't make shorter",
        "Processes share caches and memory, and a step has a fixed cost: try a larger batch.",
    ),
}


# --- the groups -----------------------------------------------------------------------------


def measure_groups(
    counts: Sequence[int], job: Mapping[str, object], rounds: int
) -> dict[int, list[list[ProcessRound]]]:
    """For each number of processes and each round, what every process measured. Raises what a process raised, and
    MachineError where one ended or didn't answer."""
    measured: dict[int, list[list[ProcessRound]]] = {count: [] for count in counts}
    with ExitStack() as stack, Progress("Scaling", len(counts) * (1 + rounds)) as progress:
        groups = {}
        for done, count in enumerate(counts, start=1):  # one after the other, since each may measure a plan
            threads = max(1, device.cores() // count)
            groups[count] = stack.enter_context(start_group(count, threads))
            ask(groups[count], "join", **job, threads=threads)
            progress.update(done, f"{count} ready")
        for number in range(rounds):
            for count in counts if number % 2 == 0 else counts[::-1]:
                measured[count].append(ask(groups[count], "measure")["processes"])
            progress.update(len(counts) * (2 + number), f"round {number + 1}")
    return measured


@contextmanager
def start_group(count: int, threads: int) -> Iterator[list[Sandbox]]:
    """A group of so many processes, which end with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port, "OMP_NUM_THREADS": threads}
    common |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    with ExitStack() as stack:
        members = []
        for rank in range(count):
            variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            member = Sandbox(module="suanli.training.scaling_process", environment=variables)
            members.append(stack.enter_context(member))
        yield members


def ask(group: Sequence[Sandbox], do: str, **request: Json) -> dict[str, Json]:
    """The reply of the first process, once all have replied; the first error of any is raised."""
    for member in group:
        member.send(do, **request)
    replies: dict[Sandbox, dict[str, Json]] = {}
    until = time.monotonic() + ANSWER_S
    while waiting := [member for member in group if member not in replies]:
        ready, _, _ = select.select(waiting, [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise MachineError(f"{len(group)} processes didn't answer for {ANSWER_S:g} s.", fix="Give fewer --steps.")
        for member in ready:
            try:
                replies[member] = member.receive(ANSWER_S)
            except SandboxError as error:
                raise MachineError(
                    f"Process {group.index(member)} of {len(group)} can't measure: {error}.",
                    fix="If memory ran out, give fewer --processes or a smaller --batch-size.",
                ) from error
            if "kind" in replies[member]:
                raise fatal.restore_error(**{key: replies[member][key] for key in ("kind", "message", "fix")})
    return replies[group[0]]


# --- the figures ----------------------------------------------------------------------------


def summarize(rounds: Mapping[int, Rounds], *, shared: bool) -> tuple[ScalingSize, ...]:
    """The figures, from what `measure_groups` gives; one process is among the numbers.

    `shared`: the processes share the cores of one CPU, so the best that they can reach is the rate of one process; else
    each has its own device.
    """
    first_s = [_step_s(every) for every in rounds[1]]
    return tuple(_size(count, rounds[count], first_s, shared) for count in sorted(rounds))


def _size(count: int, rounds: Rounds, first_s: Sequence[float], shared: bool) -> ScalingSize:
    steps_s = [_step_s(every) for every in rounds]
    computes_s = [fmean(fmean(one["alone_s"]) for one in every) for every in rounds]
    waits_s = [_wait_s([one["alone_s"] for one in every]) for every in rounds]
    exposed_s = median(s - c - w for s, c, w in zip(steps_s, computes_s, waits_s, strict=True))
    speedup = spread([one / s for one, s in zip(first_s, steps_s, strict=True)])
    first, local_batch = rounds[0][0], tuple(one["local_batch"] for one in rounds[0])
    return ScalingSize(
        processes=count,
        threads=first["threads"],
        norms=first["norms"],
        gradient_bytes=first["gradient_bytes"],
        local_batch=local_batch,
        speedups=tuple(first["speedups"]),
        images_per_s=spread([sum(local_batch) / s for s in steps_s]),
        speedup=speedup,
        efficiency=speedup.median / (1 if shared else count),
        step_s=median(steps_s),
        compute_s=median(computes_s),
        wait_s=median(waits_s),
        exposed_s=max(0.0, exposed_s),
        all_reduce_s=median(every[0]["all_reduce_s"] for every in rounds),
        latency_s=median(every[0]["latency_s"] for every in rounds),
    )


def _step_s(every: Sequence[ProcessRound]) -> float:
    """A step ends when the slowest process has done it."""
    return max(fmean(one["steps_s"]) for one in every)


def _wait_s(steps_s: Sequence[Sequence[float]]) -> float:
    """Of steps by rank and number: the mean of the slowest less the mean of all."""
    by_step = list(zip(*steps_s, strict=True))
    return fmean(map(max, by_step)) - fmean(map(fmean, by_step))


def judge(sizes: Sequence[ScalingSize], *, shared: bool) -> Verdict:
    """What the largest number of processes loses, and which loss is the largest."""
    one, last = sizes[0], sizes[-1]
    computing_s = max(0.0, last.compute_s - one.compute_s / (1 if shared else last.processes))
    lost_s = {"communication": last.exposed_s, "waiting": last.wait_s, "computing": computing_s}
    worst = max(lost_s, key=lambda key: lost_s[key])
    limit = None if last.processes == 1 or last.efficiency >= GOOD or not lost_s[worst] else worst
    sentences = _describe(last, limit, lost_s[worst], shared)
    if any(size.images_per_s.relative > STEADY for size in sizes):
        sentences += " Rates varied by more than a tenth between rounds: something else used the machine, so measure"
        sentences += " again."
    return Verdict(limited_by=limit, lost_s=lost_s, sentences=sentences)


def _describe(last: ScalingSize, limit: str | None, lost_s: float, shared: bool) -> str:
    if last.processes == 1:
        return "Only one process was measured: there is nothing to compare."
    speed = f"{plural(last.processes, 'process', 'processes')} are {last.speedup.median:.2f} times as fast as one"
    speed += " with all cores." if shared else f", {last.efficiency:.0%} of what is possible."
    if limit is None:
        return f"{speed} Nothing limits scaling yet."
    name, remedy = LOSSES[limit]
    return f"{speed} Most is lost to {name}: {lost_s / last.step_s:.0%} of a step. {remedy}"
