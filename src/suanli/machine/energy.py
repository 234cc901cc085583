"""The energy in joules that a device uses while something runs, from the counters of the hardware.

A CPU counts the energy of each of its packages (RAPL: Linux has it below /sys/class/powercap, on most machines readable
for root only). An NVIDIA GPU counts its own since its driver was loaded (NVML, through the package nvidia-ml-py). Both
count everything that the device does, also for other programs, but not fans, disks and power supplies. Nothing is
estimated from a power rating: where a counter is missing or can't be read, the energy is unknown.

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

POLL_S = 30.0  # a RAPL counter wraps around after some minutes at full load: read this often, no wrap is missed


@dataclass(frozen=True, kw_only=True)
class Counter:
    """One energy counter of the hardware."""

    name: str  # "package-0", "GPU-…"
    read_j: Callable[[], float | None]  # joules since an arbitrary moment; None: can't be read
    wraps_at_j: float | None = None  # where it starts again from zero; None: never


class Meter:
    """The energy of one block, which `measure_energy` fills in at its end."""

    joules: float | None = None  # None: unknown


@contextmanager
def measure_energy(device: Device, *, root: Path = Path("/"), poll_s: float = POLL_S) -> Iterator[Meter]:
    """Measures the energy that `device` uses while the block runs. Wait for the device before the block ends.

        with measure_energy(device) as meter:
            work()
        print(meter.joules)

    A CPU is all of its packages, a GPU only itself. /sys is looked up below `root`.
    """
    meter, sums = Meter(), [_Sum(counter) for counter in counters(device, root)]
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(poll_s):
            for total in sums:
                total.update()

    poller = threading.Thread(target=poll, name="suanli-energy", daemon=True)
    if any(total.counter.wraps_at_j for total in sums):
        poller.start()
    try:
        yield meter
    finally:
        ended.set()
        if poller.is_alive():
            poller.join()
        totals = [total.update() for total in sums]
        known = [joules for joules in totals if joules is not None]
        meter.joules = sum(known) if totals and len(known) == len(totals) else None


class _Sum:
    """The joules that a counter has counted since this object was created."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self._last = counter.read_j()
        self._sum = 0.0

    def update(self) -> float | None:
        """The sum so far. None from then on, once the counter can't be read or goes back without a known wrap."""
        now, wraps_at = self.counter.read_j(), self.counter.wraps_at_j
        if now is None or self._last is None or (now < self._last and wraps_at is None):
            self._last = None
            return None
        self._sum += now - self._last + (wraps_at if wraps_at is not None and now < self._last else 0)
        self._last = now
        return self._sum


def counters(device: Device, root: Path = Path("/")) -> list[Counter]:
    """The counters that together count the energy of `device`; empty: there are none, or this user can't read them."""
    if device.type == "cpu":
        return package_counters(root)
    if device.type == "cuda":
        import torch

        uuid = getattr(torch.cuda.get_device_properties(device.torch_name), "uuid", None)
        counter = gpu_counter(f"GPU-{uuid}") if uuid is not None else None
        return [counter] if counter else []
    return []


def package_counters(root: Path = Path("/")) -> list[Counter]:
    """One counter for each CPU package. Its parts (cores, memory) and the whole board (psys) would count twice."""
    packages = []
    for zone in sorted((root / "sys/class/powercap").glob("*-rapl:*")):
        name = _text(zone / "name") or ""
        end = _microjoules(zone / "max_energy_range_uj")
        if name.startswith("package"):

            def read_j(path: Path = zone / "energy_uj") -> float | None:
                return _microjoules(path)

            packages.append(Counter(name=name, read_j=read_j, wraps_at_j=end))
    return packages


def gpu_counter(uuid: str) -> Counter | None:
    """The counter of the NVIDIA GPU with this UUID ("GPU-…"). None without nvidia-ml-py, its driver, or a counter (GPUs
    before Volta have none, nor have MIG instances)."""
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
    """Joules, from a file with a number of microjoules. None: it can't be read."""
    text = _text(path)
    return int(text) / 1e6 if text is not None and text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
