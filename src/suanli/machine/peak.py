"""Measures once what this machine can reach: the ceilings that utilization and forecasts are computed from.

All figures but the disk's are measured in turn, round by round, so that a disturbance of a second touches one round of
each figure instead of all rounds of one. A figure is the median of its rounds. Figures of a quiet machine are cached
under a fingerprint of hardware and software; those of a busy one are returned and not cached. A machine counts as busy
if a figure varies too much, or if this process waited for cores: another program that computes all the time halves
every figure without making any of them vary.

The workloads that are timed are in `microbenchmarks.py` and `disk.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from suanli.core import console
from suanli.core.errors import StorageError
from suanli.core.storage import write_json
from suanli.core.types import Device
from suanli.machine import timing
from suanli.machine.ceilings import Ceilings
from suanli.machine.device import cores, cpu_name, instruction_sets
from suanli.machine.disk import measure_read_rates
from suanli.machine.gpus import nvidia_driver
from suanli.machine.microbenchmarks import Absent, build_workloads, synchronizer
from suanli.machine.process_environment import INSTRUCTION_LIMITS
from suanli.machine.run_delay import core_time
from suanli.machine.switches import set_attributes

FORMAT = 2  # raise when a figure changes its meaning
BUDGET_S = 12.0
ROUNDS = 15
ENOUGH = 5  # rounds from which a spread can be known
CALLS = 400  # that fit into the budget, on average


def probe(
    device: Device,
    cache: Path,
    decode: Callable[[bytes], object],
    *,
    fresh: bool = False,
    budget_s: float = BUDGET_S,
    widest: float = timing.STEADY,
) -> Ceilings:
    """The ceilings of `device`: the cached ones, or else measured in about `budget_s` seconds and cached below `cache`.
    With `fresh` they are always measured. `decode` decodes a JPEG file; its rate is one of the figures.

    If a relative spread is above `widest`, or this process waited for a core for more than that share of its time, the
    figures are returned with a warning and not cached. A cache that can't be written is a warning too. Of several
    processes that measure at the same time, the others wait for the first and take its figures. What can't be measured
    is no error: `absent` has the reason.
    """
    if not fresh and (cached := read_cached(device, cache)) is not None:
        return cached
    with _lock(_path(device, cache)) as waited:
        if (waited or not fresh) and (cached := read_cached(device, cache)) is not None:
            return cached  # another process has measured meanwhile
        console.say(f"measuring what {device.name} ({device.torch_name}) can do: about {console.duration(budget_s)}")
        ceilings = _measure(device, cache, decode, budget_s, widest)
        if ceilings.steady:
            _write(ceilings, _path(device, cache))
        else:
            console.warn(_busy_warning(ceilings, widest))
    return ceilings


def read_cached(device: Device, cache: Path) -> Ceilings | None:
    """The cached ceilings of `device`. None: never measured with this hardware and software, or damaged."""
    with suppress(OSError, ValueError):
        ceilings = TypeAdapter(Ceilings).validate_json(_path(device, cache).read_bytes(), strict=True)
        if ceilings.fingerprint == fingerprint(device):
            return ceilings
    return None


def fingerprint(device: Device) -> str:
    """A digest of the hardware, software and limits that decide a ceiling."""
    facts: list[object] = [FORMAT, device.name, device.torch_name, device.fast_dtypes, str(torch.__version__)]
    limits = {name: os.environ.get(name) for name in INSTRUCTION_LIMITS}
    facts += [cpu_name(), cores(), sorted(instruction_sets()), limits]
    if device.type == "cpu":
        facts += [torch.get_num_threads()]
    if device.type == "cuda":
        facts += [torch.version.cuda or torch.version.hip, torch.backends.cudnn.version()]  # type: ignore[no-untyped-call]
        facts += [nvidia_driver().version, torch.cuda.device_count()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()


def unsteady_figures(spread: Mapping[str, float | None], widest: float = timing.STEADY) -> list[str]:
    """The figures whose relative spread is unknown or above `widest`, the widest first."""
    widths = {name: math.inf if value is None else value for name, value in spread.items()}
    return sorted((name for name, width in widths.items() if not width <= widest), key=lambda name: -widths[name])


def _path(device: Device, cache: Path) -> Path:
    return cache / "probe" / f"{fingerprint(device)}.json"


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Lets one process measure at a time; gives whether another one measured and was waited for. Where the file system
    is read-only or has no locks, nothing is locked."""
    lock = FileLock(path.parent / f".{path.name}.lock")
    waited = False
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock.acquire(timeout=0.2))
            except Timeout:
                waited = True
                console.say("waiting for another process that measures this machine")
                stack.enter_context(lock.acquire())
        yield waited


def _write(ceilings: Ceilings, path: Path) -> None:
    try:
        write_json(path, ceilings.to_json())
    except StorageError as error:
        console.warn(f"The figures could not be cached. {error.message} {error.fix}")


def _busy_warning(ceilings: Ceilings, widest: float) -> str:
    wide = unsteady_figures(ceilings.spread, widest)
    if ceilings.waiting is not None and ceilings.waiting > widest:
        how = f"for {ceilings.waiting:.0%} of the time, something else had the cores"
    elif (value := ceilings.spread[wide[0]]) is None:
        how = f"{title(wide[0])} took too long to be measured often enough"
    else:
        how = f"{title(wide[0])} varied by ±{value:.0%}"
        how += f", and {console.plural(len(wide) - 1, 'other figure')} by more than ±{widest:.0%}" if wide[1:] else ""
    return f"This machine was busy: {how}. The figures are not cached; measure again when nothing else runs."


def title(figure: str) -> str:
    """A figure's name for people: "matrix product in float32" for "matmul_flops.float32"; other words as they are."""
    name, _, precision = figure.partition(".")
    words = _TITLES.get(name, name)
    return f"{words} in {precision}" if precision else words


_TITLES = {
    "matmul_flops": "matrix product",
    "conv_flops": "convolution",
    "memory_bytes_per_s": "memory copy",
    "host_to_device_bytes_per_s": "host to device",
    "all_reduce_bytes_per_s": "all-reduce",
    "launch_s": "launch of an operation",
    "graph_launch_s": "launch of a CUDA graph",
    "jpeg_images_per_s": "JPEG decoding",
    "disk_read_bytes_per_s": "disk read",
}


# --- measuring ----------------------------------------------------------------------------------


def _measure(
    device: Device, cache: Path, decode: Callable[[bytes], object], budget_s: float, widest: float
) -> Ceilings:
    started = time.perf_counter()
    rates, absent, waiting = _rates(device, decode, budget_s / CALLS, budget_s * 0.6)  # building takes the rest
    try:
        rates["disk_read_bytes_per_s"] = measure_read_rates(cache, budget_s * 0.2)
    except Absent as reason:
        absent["disk_read_bytes_per_s"] = str(reason)
    spreads = {name: timing.spread(values) for name, values in rates.items()}
    relative = {name: value.relative if value.count >= ENOUGH else None for name, value in spreads.items()}

    def by_precision(figure: str) -> dict[str, float]:
        return {n.partition(".")[2]: s.median for n, s in spreads.items() if n.startswith(f"{figure}.")}

    def rate(figure: str) -> float | None:
        return spreads[figure].median if figure in spreads else None

    def period(figure: str) -> float | None:
        return 1 / spreads[figure].median if figure in spreads else None

    return Ceilings(
        device=device.name,
        torch_name=device.torch_name,
        threads=torch.get_num_threads(),
        fingerprint=fingerprint(device),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        matmul_flops=by_precision("matmul_flops"),
        conv_flops=by_precision("conv_flops"),
        absent=_merge_reasons(absent),
        memory_bytes_per_s=rate("memory_bytes_per_s"),
        host_to_device_bytes_per_s=rate("host_to_device_bytes_per_s"),
        all_reduce_bytes_per_s=rate("all_reduce_bytes_per_s"),
        launch_s=period("launch_s"),
        graph_launch_s=period("graph_launch_s"),
        jpeg_images_per_s=rate("jpeg_images_per_s"),
        disk_read_bytes_per_s=rate("disk_read_bytes_per_s"),
        spread=relative,
        waiting=waiting,
        steady=not unsteady_figures(relative, widest) and (waiting or 0) <= widest,
    )


def _rates(
    device: Device, decode: Callable[[bytes], object], call_s: float, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, str], float | None]:
    """The rate of every workload in each round; the reasons for what is absent; the share of time spent waiting for a
    core (None: unknown)."""
    fastest = set_attributes((torch.backends.cudnn,), "benchmark", True)  # the best of cuDNN's algorithms
    with fastest, ExitStack() as resources, torch.no_grad():
        workloads, absent = build_workloads(device, resources, call_s, decode)
        calls = {name: workload.call for name, workload in workloads.items()}
        before = core_time()
        times = timing.time_interleaved(calls, rounds=ROUNDS, budget_s=budget_s, settle=synchronizer(device))
        ran, waited = (now - then for now, then in zip(core_time(), before, strict=True))
    rates = {name: [workload.amount / took for took in times[name]] for name, workload in workloads.items()}
    return rates, absent, waited / (ran + waited) if ran > 0 else None


def _merge_reasons(absent: Mapping[str, str]) -> dict[str, str]:
    """A precision that the machine lacks gets one entry, under its own name, instead of one for each figure."""
    reasons: dict[str, str] = {}
    for name, reason in absent.items():
        figure, _, precision = name.partition(".")
        if figure == "matmul_flops":
            reasons[precision] = reason
        elif reasons.get(precision) != reason:
            reasons[name] = reason
    return reasons
