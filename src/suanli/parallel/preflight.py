"""Checks before the first step that several processes can train together.

The processes exchange their versions, data and options. All compare the same list and reach the same result, which
names the process that differs and how. Then a sum over all processes tests the communication and measures its speed.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from suanli.core.console import plural, say, size, warn
from suanli.core.errors import DataError, MachineError, SuanliError, UsageError
from suanli.core.types import Device, Json
from suanli.machine.device import available_memory_bytes
from suanli.parallel.group import Group

MAX_CLOCK_SKEW_S = 2.0  # with more, times in the logs of different hosts can't be compared
SUM_LENGTH = 1 << 20  # float32 numbers in the test sum: 4 MB, about a bucket of gradients
SUMS = 5
MUST_AGREE: tuple[tuple[str, str, type[SuanliError], str], ...] = (
    # field of Facts, its name in messages, the error, the fix
    ("python", "Python", MachineError, "Install the same version everywhere."),
    ("torch", "torch", MachineError, "Install the same version everywhere."),
    ("suanli", "suanli", MachineError, "Install the same version everywhere."),
    ("code", "suanli's code", MachineError, "Install the same version everywhere, unchanged."),
    ("device_type", "the kind of device", MachineError, "Use --device with what all of them have."),
    ("recipe", "the recipe", UsageError, "Give every process the same options."),
    ("shard", "--shard", UsageError, "Give every process the same options."),
    ("data", "the data", DataError, "Copy the same files to every host, or use storage that they share."),
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a process sends to the others."""

    host: str
    python: str
    torch: str
    suanli: str
    code: str  # digest
    device: str
    device_type: str
    recipe: str  # digest
    data: str  # digest
    shard: bool
    clock: float  # seconds since 1970
    memory_bytes: int | None  # free on the device; None: unknown
    disk_bytes: int | None  # free where the run is written; None: unknown


def check(
    group: Group, device: Device, *, recipe: str, data: str, folder: Path, shard: bool = False
) -> dict[str, Json]:
    """A collective: check that the processes fit together, and return a record of them for the run. `recipe` and `data`
    are digests; the run is written to `folder` or below it.

    Raises MachineError, UsageError or DataError that names the process that doesn't fit.
    """
    group.barrier()
    own = local_facts(device, recipe=recipe, data=data, folder=folder, shard=shard)
    facts = [Facts(**values) for values in group.gather(asdict(own))]
    compare_facts(facts)
    rate = _measure_sum(group, device)
    hosts = {f.host for f in facts}
    where = "this host" if len(hosts) == 1 else plural(len(hosts), "host")
    say(f"{group.size} processes on {where} agree; they sum at {size(rate)}/s")
    recorded = ("host", "device", "memory_bytes", "disk_bytes")
    return {"all_reduce_bytes_per_s": rate, "each": [{name: getattr(f, name) for name in recorded} for f in facts]}


def local_facts(device: Device, *, recipe: str, data: str, folder: Path, shard: bool = False) -> Facts:
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        suanli=version("suanli"),
        code=code_digest(),
        device=device.name,
        device_type=device.type,
        recipe=recipe,
        data=data,
        shard=shard,
        clock=time.time(),
        memory_bytes=available_memory_bytes(device),
        disk_bytes=_free_bytes(folder),
    )


def compare_facts(facts: Sequence[Facts]) -> None:
    """Raise the error for the first process that differs from most; warn of clock skew."""
    for field, name, error, fix in MUST_AGREE:
        values = [getattr(f, field) for f in facts]
        usual = statistics.mode(values)
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            rank = odd[0]
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise error(
                f"Process {rank} on {facts[rank].host}{more} differs in {name}: {values[rank]}, "
                f"where the others have {usual}.",
                fix=fix,
            )
    middle = statistics.median(f.clock for f in facts)
    for rank, f in enumerate(facts):
        if abs(f.clock - middle) > MAX_CLOCK_SKEW_S:
            warn(f"The clock of process {rank} on {f.host} is off by {f.clock - middle:+.0f} s.")
            break


def refuse_full_disk(host: str, free_bytes: int | None, needed_bytes: int) -> None:
    """Raise MachineError where the process that writes has too little disk space."""
    if free_bytes is not None and free_bytes < needed_bytes:
        raise MachineError(
            f"The run needs {size(needed_bytes)} on the storage of {host}, and {size(free_bytes)} are free.",
            fix="Free some space, or choose another --out.",
        )


@cache
def code_digest() -> str:
    """The digest of suanli's own source files."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _free_bytes(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _measure_sum(group: Group, device: Device) -> float:
    """A collective: bytes per second that each process moves in a sum over all processes. Raises MachineError where the
    sum is wrong."""
    expected = group.size * (group.size + 1) / 2
    seconds = []
    for _ in range(SUMS):
        values = torch.full((SUM_LENGTH,), float(group.rank + 1), device=device.torch_name)
        group.barrier()
        started = time.perf_counter()
        group.sum(values)
        low, high = float(values.min()), float(values.max())
        seconds.append(time.perf_counter() - started)
        if not low == high == expected:
            raise MachineError(
                f"The sum over {group.size} processes is {low} to {high} on {socket.gethostname()}, not {expected}.",
                fix="The network or a device of this host computes wrong numbers: leave it out, and have it checked.",
            )
    # Each process sends and receives this share of the tensor: R. Rabenseifner, "Optimization of Collective Reduction
    # Operations", ICCS 2004.
    moved = 2 * (group.size - 1) / group.size * SUM_LENGTH * 4
    return moved / min(seconds)
