"""How many cores this process may use. Imports nothing but Python's own modules, so it may be asked before torch is
loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Logical cores that this process may use, by its affinity and the CPU quota of its cgroups. Fractions are rounded
    down, since one thread too many makes all others wait for it."""
    allowed = float(len(affinity()))
    for folder, version in cgroups("cpu", root):
        if version == 2:
            quota, _, period = (read_text(folder / "cpu.max") or "max").partition(" ")
        else:
            quota, period = (
                read_text(folder / "cpu.cfs_quota_us") or "",
                read_text(folder / "cpu.cfs_period_us") or "",
            )
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            allowed = min(allowed, int(quota) / int(period))
    return max(1, math.floor(allowed))


def physical_cores(root: Path = Path("/")) -> int | None:
    """Physical cores among those that this process may use; None: unknown."""
    siblings = set()
    for cpu in affinity():
        threads = read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if threads is None:
            return None
        siblings.add(threads)
    return min(len(siblings), cores(root))


def affinity() -> set[int]:
    """The logical cores that this process may run on, whatever its quota."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cgroups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """The cgroup folders of this process, from its own up to the root, and their version (1 or 2). In a container its
    own path may be invisible; then the mounted root is the container's."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        own = mount / path.lstrip("/")
        yield from ((folder, version) for folder in (own, *own.parents) if folder.is_relative_to(mount))


def read_text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
