"""Joules that a device took while something ran, from the counters that the hardware keeps itself.

A CPU counts the energy of each of its packages (RAPL, which Linux shows below /sys/class/powercap, on most machines
to root only); an NVIDIA GPU counts its own since its driver was loaded (NVML, through the package nvidia-ml-py).
Both count all that the device does, other programs' work too, and nothing of fans, disks and power supplies. Nothing
is estimated from a power rating: where a counter is missing or can't be read, the energy is unknown.

Sources: "Power Capping Framework" in the Linux kernel's documentation; `nvmlDeviceGetTotalEnergyConsumption` in
NVIDIA's NVML reference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from suanli.core.types import Device

LOOK_S = 30.0  # a RAPL counter starts again after some minutes at full load; looked at this often, no turn is missed


@dataclass(frozen=True, kw_only=True)
class Counter:
    """One energy counter of the hardware."""

    name: str  # "package-0", "GPU-…"
    read_j: Callable[[], float | None]  # joules since an arbitrary moment; None: can't be read
    wraps_at_j: float | None = None  # starts again from zero there; None: never


class Meter:
    """The energy of one block. Filled in by `measure_energy`."""

    joules: float | None = None  # of the whole block, once it has ended; None: unknown


@contextmanager
def measure_energy(device: Device, *, root: Path = Path("/"), look_s: float = LOOK_S) -> Iterator[Meter]:
    """Measures what `device` takes while the block runs; the caller waits for the device before the block ends.

        with measure_energy(device) as meter:
            work()
        print(meter.joules)

    For a CPU all its packages count, for a GPU that GPU alone. `root` is where /sys is looked for.
    """
    meter, sums = Meter(), [_Sum(counter) for counter in counters(device, root)]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(look_s):
            for total in sums:
                total.look()

    watch = threading.Thread(target=look, name="suanli-energy", daemon=True)
    if any(total.counter.wraps_at_j for total in sums):
        watch.start()
    try:
        yield meter
    finally:
        ended.set()
        if watch.is_alive():
            watch.join()
        found = [total.look() for total in sums]
        known = [joules for joules in found if joules is not None]
        meter.joules = sum(known) if found and len(known) == len(found) else None


class _Sum:
    """What a counter has counted since this was made."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self._last = counter.read_j()
        self._sum = 0.0

    def look(self) -> float | None:
        """None for good once the counter couldn't be read, or went back without a known end."""
        now, wraps_at = self.counter.read_j(), self.counter.wraps_at_j
        if now is None or self._last is None or (now < self._last and wraps_at is None):
            self._last = None
            return None
        self._sum += now - self._last + (wraps_at if wraps_at is not None and now < self._last else 0)
        self._last = now
        return self._sum


def counters(device: Device, root: Path = Path("/")) -> list[Counter]:
    """Those that together count the energy of `device`; empty: it has none, or they aren't shown to this user."""
    if device.type == "cpu":
        return package_counters(root)
    if device.type == "cuda":
        import torch

        uuid = getattr(torch.cuda.get_device_properties(device.torch_name), "uuid", None)
        counter = gpu_counter(f"GPU-{uuid}") if uuid is not None else None
        return [counter] if counter else []
    return []


def package_counters(root: Path = Path("/")) -> list[Counter]:
    """One for each CPU package. Its parts (cores, memory) and the whole board (psys) would count twice."""
    found = []
    for zone in sorted((root / "sys/class/powercap").glob("*-rapl:*")):
        name = _text(zone / "name") or ""
        end = _microjoules(zone / "max_energy_range_uj")
        if name.startswith("package"):

            def read_j(path: Path = zone / "energy_uj") -> float | None:
                return _microjoules(path)

            found.append(Counter(name=name, read_j=read_j, wraps_at_j=end))
    return found


def gpu_counter(uuid: str) -> Counter | None:
    """Of the NVIDIA GPU with this UUID ("GPU-…"). None without nvidia-ml-py, its driver, or a counter (GPUs
    before Volta have none, nor has a slice of a GPU)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def read_j() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # counted in millijoules
        except pynvml.NVMLError:
            return None

    return Counter(name=uuid, read_j=read_j)


def _microjoules(path: Path) -> float | None:
    """The number in that file, as joules."""
    text = _text(path)
    return int(text) / 1e6 if text is not None and text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
