"""What this machine can reach, measured once: the ceilings that shares and forecasts are held against.

All figures but the disk's are measured by turns, a round at a time, so that a noisy second touches each of them
once instead of one of them wholly; a figure is the median of its rounds. What was measured on a quiet machine is
cached under a fingerprint of hardware and software. Figures of a busy one are shown and not kept. It is busy if a
figure varies too much, or if this process waited for cores: a program that computes all the time halves every figure
and makes none of them vary.

Not here: which works are timed (`ceilings.py`, `disk.py`), and what limits one training.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from suanli.core.types import Device, Json
from suanli.machine import timing
from suanli.machine.ceilings import Ceilings
from suanli.machine.device import cores, cpu_name, instruction_sets
from suanli.machine.disk import measure_read_rates
from suanli.machine.gpus import nvidia_driver
from suanli.machine.microbenchmarks import Absent, build_workloads, synchronizer

FORMAT = 1  # raise when a figure changes its meaning
BUDGET_S = 12.0
ROUNDS = 15
ENOUGH = 5  # with fewer rounds, nothing is known about the spread
CALLS = 400  # of average length that fit into the budget


def probe(
    device: Device,
    cache: Path,
    decode: Callable[[bytes], object],
    *,
    fresh: bool = False,
    budget_s: float = BUDGET_S,
    widest: float = timing.STEADY,
) -> Ceilings:
    """The ceilings of `device`: the cached ones, or measured now in about `budget_s` seconds and cached below
    `cache`. With `fresh`, measured even if they are known.

    Figures of which one has a relative spread above `widest`, or that were taken while this process waited for a core
    for more than that share of its time, are returned and not cached, with a warning. A cache that can't be written
    costs the next caller another measurement, with a warning. Of several processes that measure at once, the others
    wait for the first and take its answer. Raises nothing for what can't be measured: that is in `absent`.
    `decode` is the decoder of JPEG files, whose rate is one of the figures.
    """
    if not fresh and (found := read_cached(device, cache)) is not None:
        return found
    with _alone(_path(device, cache)) as waited:
        if (waited or not fresh) and (found := read_cached(device, cache)) is not None:
            return found  # another process has measured meanwhile
        console.say(f"measuring what {device.name} ({device.torch_name}) can do: about {console.duration(budget_s)}")
        ceilings = _measured(device, cache, decode, budget_s, widest)
        if ceilings.steady:
            _keep(ceilings, _path(device, cache))
        else:
            console.warn(_busy(ceilings, widest))
    return ceilings


def read_cached(device: Device, cache: Path) -> Ceilings | None:
    """The cached ceilings of `device`. None: never measured with this hardware and software, or damaged."""
    with suppress(OSError, ValueError):
        found = TypeAdapter(Ceilings).validate_json(_path(device, cache).read_bytes(), strict=True)
        if found.fingerprint == fingerprint(device):
            return found
    return None


def fingerprint(device: Device) -> str:
    """Of all that decides a ceiling and can be asked: other hardware, software or limits, another fingerprint."""
    facts: list[Json] = [FORMAT, device.name, device.torch_name, device.fast_dtypes, str(torch.__version__)]
    facts += [cpu_name(), cores(), sorted(instruction_sets())]
    if device.type == "cpu":
        facts += [torch.get_num_threads()]
    if device.type == "cuda":
        facts += [torch.version.cuda or torch.version.hip, torch.backends.cudnn.version()]  # type: ignore[no-untyped-call]
        facts += [nvidia_driver().version, torch.cuda.device_count()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()


def unsteady_figures(spread: Mapping[str, float | None], widest: float = timing.STEADY) -> list[str]:
    """The figures whose relative spread is unknown or above `widest`, the worst first."""
    worst = {name: math.inf if value is None else value for name, value in spread.items()}
    return sorted((name for name, value in worst.items() if not value <= widest), key=lambda name: -worst[name])


def _path(device: Device, cache: Path) -> Path:
    return cache / "probe" / f"{fingerprint(device)}.json"


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """While the block runs, no other process measures; whether one did at the start, and was waited for. Where
    no lock can be made, nobody waits."""
    lock = FileLock(path.parent / f".{path.name}.lock")
    waited = False
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # a file system that is read-only, or has no locks
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock.acquire(timeout=0.2))
            except Timeout:
                waited = True
                console.say("waiting for another process that measures this machine")
                held.enter_context(lock.acquire())
        yield waited


def _keep(ceilings: Ceilings, path: Path) -> None:
    try:
        write_json(path, ceilings.to_json())
    except StorageError as error:
        console.warn(f"The figures are not kept for the next time. {error.message} {error.fix}")


def _busy(ceilings: Ceilings, widest: float) -> str:
    wide = unsteady_figures(ceilings.spread, widest)
    if ceilings.waiting is not None and ceilings.waiting > widest:
        how = f"for {ceilings.waiting:.0%} of the time, something else had the cores"
    elif (value := ceilings.spread[wide[0]]) is None:
        how = f"{title(wide[0])} took too long to be measured often enough"
    else:
        how = f"{title(wide[0])} varied by ±{value:.0%}"
        how += f", and {console.plural(len(wide) - 1, 'other figure')} by more than ±{widest:.0%}" if wide[1:] else ""
    return f"This machine was busy: {how}. The figures are not kept; measure again when nothing else runs."


def title(figure: str) -> str:
    """The name of a figure for people: "matmul_flops.float32" is "matrix product in float32". Other words stay."""
    name, _, precision = figure.partition(".")
    known_as = _TITLES.get(name, name)
    return f"{known_as} in {precision}" if precision else known_as


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


def _measured(
    device: Device, cache: Path, decode: Callable[[bytes], object], budget_s: float, widest: float
) -> Ceilings:
    started = time.perf_counter()
    rates, absent, waiting = _rates(device, decode, budget_s / CALLS, budget_s * 0.6)  # making the works takes the rest
    try:
        rates["disk_read_bytes_per_s"] = measure_read_rates(cache, budget_s * 0.2)
    except Absent as reason:
        absent["disk_read_bytes_per_s"] = str(reason)
    found = {name: timing.spread(values) for name, values in rates.items()}
    spread = {name: value.relative if value.count >= ENOUGH else None for name, value in found.items()}

    def by_precision(figure: str) -> dict[str, float]:
        return {n.partition(".")[2]: s.median for n, s in found.items() if n.startswith(f"{figure}.")}

    def rate(figure: str) -> float | None:
        return found[figure].median if figure in found else None

    def period(figure: str) -> float | None:
        return 1 / found[figure].median if figure in found else None

    return Ceilings(
        device=device.name,
        torch_name=device.torch_name,
        threads=torch.get_num_threads(),
        fingerprint=fingerprint(device),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        matmul_flops=by_precision("matmul_flops"),
        conv_flops=by_precision("conv_flops"),
        absent=_merged(absent),
        memory_bytes_per_s=rate("memory_bytes_per_s"),
        host_to_device_bytes_per_s=rate("host_to_device_bytes_per_s"),
        all_reduce_bytes_per_s=rate("all_reduce_bytes_per_s"),
        launch_s=period("launch_s"),
        graph_launch_s=period("graph_launch_s"),
        jpeg_images_per_s=rate("jpeg_images_per_s"),
        disk_read_bytes_per_s=rate("disk_read_bytes_per_s"),
        spread=spread,
        waiting=waiting,
        steady=not unsteady_figures(spread, widest) and (waiting or 0) <= widest,
    )


def _rates(
    device: Device, decode: Callable[[bytes], object], call_s: float, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, str], float | None]:
    """Rates of every work, one a round; why the rest is absent; and the share of time spent waiting for a core."""
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True  # a ceiling is what the best algorithm reaches
        with ExitStack() as resources, torch.no_grad():
            found, absent = build_workloads(device, resources, call_s, decode)
            calls = {name: work.call for name, work in found.items()}
            before = _core_time()
            times = timing.time_interleaved(calls, rounds=ROUNDS, budget_s=budget_s, settle=synchronizer(device))
            ran, waited = (now - then for now, then in zip(_core_time(), before, strict=True))
    finally:
        torch.backends.cudnn.benchmark = benchmark
    rates = {name: [found[name].amount / took for took in times[name]] for name in found}
    return rates, absent, waited / (ran + waited) if ran > 0 else None


def _core_time() -> tuple[int, int]:
    """Nanoseconds that the living threads of this process ran, and were ready and waited. 0 where the kernel
    doesn't tell."""
    ran = waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError):
            values = thread.read_text().split()
            ran, waited = ran + int(values[0]), waited + int(values[1])
    return ran, waited


def _merged(absent: Mapping[str, str]) -> dict[str, str]:
    """A precision that the machine lacks is said once, under its own name."""
    said: dict[str, str] = {}
    for name, reason in absent.items():
        figure, _, precision = name.partition(".")
        if figure == "matmul_flops":
            said[precision] = reason
        elif said.get(precision) != reason:
            said[name] = reason
    return said
