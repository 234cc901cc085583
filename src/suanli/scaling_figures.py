"""From what groups of processes measured, round by round, to the figures of scaling and what limits it.

Pure functions of what `scaling.py` says in each round. A step of a group is taken apart as

    step = compute (the mean process, on its share, without communication)
         + wait    (how much later than the mean the slowest process is)
         + exposed (what is left: communication that the backward pass doesn't hide)

and the communication that is hidden is the time of the gradients' all-reduce by itself less what is exposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import fmean, median

from suanli.measure import Spread, percentile, spread
from suanli.scaling_model import (
    IQR_OF_NORMAL,
    Cluster,
    Expected,
    Link,
    Work,
    doublings,
    expect,
    fit_link,
    strong,
    weak,
)
from suanli.types import Json

GOOD = 0.95  # efficiency from which on nothing is said to limit

# What each loss of a step is called, and what would make it less.
LIMITS: dict[str, tuple[str, str]] = {
    "communication": (
        "communication that isn't hidden",
        "a larger batch gives the backward pass more to hide it behind, a faster link shortens it, and bf16_gradients "
        "among the --speedups halves its bytes",
    ),
    "waiting": (
        "waiting for the slowest process",
        "look for what else uses some of the machines, or for one that is slower than the others",
    ),
    "input": ("input", "a data set that stays on the device, or batches that are read ahead, would help"),
    "cores shared": (
        "cores that the processes share",
        "they compete for caches and memory, and each does the optimizer's whole step; one process with all threads is "
        "the alternative",
    ),
    "computing together": (
        "computing beside the others, which takes longer than alone",
        "processes of one machine compete for its memory, caches and power, and with whatever else runs there",
    ),
    "fixed cost": ("the fixed cost of a step, which a smaller share doesn't shrink", "a larger batch would help"),
}


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What one number of processes reached, and what its step is made of, in seconds."""

    processes: int
    threads: int  # CPU threads of each
    local_batch: tuple[int, ...]  # by rank
    images_per_s: Spread
    speedup: Spread  # against one process
    efficiency: float
    step_s: float
    compute_s: float
    wait_s: float
    communication_s: float  # of the gradients' all-reduce by itself
    exposed_s: float
    hidden_s: float
    input_s: float | None  # None: not told apart
    norms: int  # layers that ask the other processes


@dataclass(frozen=True, kw_only=True)
class Size(Timed):
    """What a bench measured of it, round by round; the speed-up is against one process with all threads."""

    speedups: tuple[str, ...]
    backward_share: float  # of compute
    relative_spread: float  # of a process's steps without communication: a standard deviation over the median
    small: tuple[float, float]  # a smaller number of examples, and the seconds of a step without communication on it
    buckets: tuple[int, ...]
    link: Link | None

    @property
    def most(self) -> int:
        """Examples of the process that has the most."""
        return max(self.local_batch)

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"link": None if self.link is None else _link_told(self.link)}


def sizes(rounds: Mapping[int, Sequence[Mapping[str, Json]]], *, batch: int, shared: bool) -> tuple[Size, ...]:
    """`rounds` by number of processes, 1 among them, as many of each. `shared`: however many they are, they have the
    same cores, so the best they can do is the rate of one process; else each has a device of its own."""
    first_s = [max(r["step_s"]) for r in rounds[1]]
    return tuple(_size(count, rounds[count], first_s, batch, shared) for count in sorted(rounds))


def _size(count: int, told: Sequence[Mapping[str, Json]], first_s: list[float], batch: int, shared: bool) -> Size:
    steps_s = [max(r["step_s"]) for r in told]  # by round; all ranks are done when the slowest is
    # One process asks nobody, so both kinds of step are the same.
    computes_s = [fmean(r["compute_s"]) for r in told] if count > 1 else steps_s
    waits_s = [waiting(r["steps_s"]) for r in told]
    # In pairs: what slows a round slows both of its sides.
    exposed = median(s - c - w for s, c, w in zip(steps_s, computes_s, waits_s, strict=True))
    total_s = median(max(r["communication_s"]) for r in told)
    gains = spread([one / s for one, s in zip(first_s, steps_s, strict=True)])
    inputs = [fmean(r["input_s"]) for r in told if None not in r["input_s"]]
    sample, fixed = told[-1], told[0]
    return Size(
        processes=count,
        threads=fixed["threads"],
        local_batch=tuple(fixed["local_batch"]),
        speedups=tuple(fixed["speedups"]),
        images_per_s=spread([batch / s for s in steps_s]),
        speedup=gains,
        efficiency=gains.median / (1 if shared else count),
        step_s=median(steps_s),
        compute_s=median(computes_s),
        wait_s=median(waits_s),
        communication_s=total_s,
        exposed_s=max(0.0, exposed) if count > 1 else 0.0,
        hidden_s=max(0.0, total_s - max(0.0, exposed)),
        input_s=median(inputs) if inputs else None,
        backward_share=median(fmean(r["backward_share"]) for r in told),
        relative_spread=median(_relative_spread(row) for r in told for row in r["steps_s"]),
        small=(min(sample["small_batch"]), median(fmean(r["small_s"]) for r in told)),
        buckets=tuple(fixed["buckets"]),
        norms=fixed["norms"],
        link=_link(count, told),
    )


def waiting(steps_s: Sequence[Sequence[float]]) -> float:
    """Of steps by rank and number: the mean of the slowest less the mean of all."""
    by_step = list(zip(*steps_s, strict=True))
    return fmean(max(step) for step in by_step) - fmean(fmean(step) for step in by_step)


def _relative_spread(steps_s: Sequence[float]) -> float:
    iqr = percentile(steps_s, 0.75) - percentile(steps_s, 0.25)
    return iqr / IQR_OF_NORMAL / median(steps_s)


def _link(count: int, told: Sequence[Mapping[str, Json]]) -> Link | None:
    if count == 1:
        return None
    sizes = [size for size, _ in told[0]["all_reduce_s"]]
    return fit_link([(size, median(r["all_reduce_s"][i][1] for r in told)) for i, size in enumerate(sizes)], count)


# --- what limits ----------------------------------------------------------------------------


def losses(one: Timed, size: Timed, *, shared: bool, fixed_share: bool = False) -> dict[str, float]:
    """Seconds of a step of `size` beyond those that it would take without loss, by what they are lost to."""
    times = 1 if shared or fixed_share else size.processes
    waits_input = max(0.0, (size.input_s or 0.0) - (one.input_s or 0.0) / times)
    slower = max(0.0, size.compute_s - one.compute_s / times - waits_input)
    return {
        "communication": size.exposed_s,
        "waiting": size.wait_s,
        "input": waits_input,
        "computing together" if fixed_share else "cores shared" if shared else "fixed cost": slower,
    }


def verdict(found: Sequence[Timed], *, shared: bool, fixed_share: bool = False) -> dict[str, Json]:
    """What limits scaling at the largest number of processes, as a word (None: nothing) and as sentences.
    `fixed_share`: the one process computed what each of them does, and not the whole batch."""
    one, last = found[0], found[-1]
    if last.processes == 1:
        return {"limited_by": None, "said": "One process has nobody to wait for: there is nothing to compare."}
    lost = losses(one, last, shared=shared, fixed_share=fixed_share)
    reached = f"{last.processes} processes are {last.speedup.median:.2f} times as fast as one"
    reached += " of them alone" if fixed_share else ""
    reached += " with all cores" if shared else f", {last.efficiency:.0%} of what they could be without loss"
    if last.efficiency >= GOOD:
        return {"limited_by": None, "said": f"Nothing limits scaling yet: {reached}.", "lost_s": lost}
    name = max(lost, key=lambda key: lost[key])
    if not lost[name]:
        return {"limited_by": None, "said": f"{reached}; what is lost shows in no part.", "lost_s": lost}
    what, helps = LIMITS[name]
    if name == "communication" and last.norms and last.exposed_s > 2 * last.communication_s:
        helps = f"most of it isn't the gradients: {last.norms} batch norms ask the others; a larger batch asks as often"
    share = lost[name] / last.step_s
    said = f"{reached}. What limits is {what}: {share:.0%} of a step. {_first_upper(helps)}."
    return {"limited_by": name, "said": said, "lost_s": lost}


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- what is expected -----------------------------------------------------------------------


def work_of(size: Size, compute: Sequence[tuple[float, float]]) -> Work:
    return Work(
        compute=tuple(compute),
        backward_share=size.backward_share,
        buckets=size.buckets,
        relative_spread=size.relative_spread,
        norms=size.norms,
    )


def checked(found: Sequence[Size], cluster: Cluster, *, batch: int) -> list[dict[str, Json]]:
    """For each number of processes that was measured, what the model expects, and by how much that is off. Computing
    is taken as it was measured there; communication, what of it is hidden, and waiting are expected."""
    told: list[dict[str, Json]] = []
    for size in found:
        work = work_of(size, [(size.most, size.compute_s)])
        one = expect(work, cluster, processes=size.processes, batch=batch, alone_s=size.compute_s)
        measured = size.images_per_s.median
        values = {"processes": size.processes, "measured_images_per_s": measured, "images_per_s": one.images_per_s}
        values |= {"exposed_s": one.exposed_s, "wait_s": one.wait_s}
        told.append(values | {"difference": one.images_per_s / measured - 1})
    return told


def expectations(
    found: Sequence[Size], *, batch: int, shared: bool, per_host: int | None = None, between: Link | None = None
) -> dict[str, Json] | None:
    """The curves to 1,024 processes, of a kind that was measured: like those of the largest group. None where one
    process only was measured: there is no link to tell from."""
    last = found[-1]
    if last.link is None:
        return None
    cluster = Cluster(within=last.link, between=between, per_host=per_host)
    own = [(last.most, last.compute_s), last.small]
    # Processes that share cores have fewer threads the more they are, so only those of the largest group are alike.
    alike = own if shared else [*((size.most, size.compute_s) for size in found[:-1]), *own]
    work = work_of(last, tuple(dict(alike).items()))
    counts = doublings()
    return {
        "threads": last.threads,
        "per_host": per_host,
        "within": _link_told(last.link),
        "between": None if between is None else _link_told(between),
        "strong": [_told(one) for one in strong(work, cluster, batch, counts)],
        "weak": [_told(one) for one in weak(work, cluster, last.most, counts)],
        "share": last.most,
        "checked": checked(found, cluster, batch=batch),
    }


def _link_told(link: Link) -> dict[str, Json]:
    """Without infinity, which JSON doesn't know: None, then no time of these all-reduces grew with the bytes."""
    return {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s if isfinite(link.bytes_per_s) else None}


def _told(one: Expected) -> dict[str, Json]:
    return asdict(one) | {"step_s": one.step_s}
