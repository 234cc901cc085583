"""Energy counters: real files below a made-up /sys, and an NVML that is a module of these tests."""

import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suanli.core.types import Device
from suanli.machine import energy
from suanli.machine.device import detect

CPU = Device(name="some CPU", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32",))
RANGE_UJ = 262_143_328_850


def zone(root: Path, name: str, domain: str, energy_uj: object) -> Path:
    """One power zone as the kernel shows it; the file with its counter."""
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{domain}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    counter = folder / "energy_uj"
    counter.write_text(f"{energy_uj}\n")
    return counter


def test_the_packages_add_up_and_nothing_counts_twice(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:0:1", "dram", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    with energy.measure_energy(CPU, root=tmp_path) as meter:
        first.write_text("3500000\n")
        second.write_text("5250000\n")
        for other in others:
            other.write_text("9000000\n")
        assert meter.joules is None  # not before the end
    assert meter.joules == pytest.approx(2.75)


@given(st.integers(0, RANGE_UJ - 1), st.integers(0, RANGE_UJ - 1))
def test_a_counter_that_wraps_around(start: int, used: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        counter = zone(Path(folder), "intel-rapl:0", "package-0", start)
        with energy.measure_energy(CPU, root=Path(folder)) as meter:
            counter.write_text(str((start + used) % RANGE_UJ))
        assert meter.joules == pytest.approx(used / 1e6)


def test_a_long_block_misses_no_wrap(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    new = tmp_path / "new"
    with energy.measure_energy(CPU, root=tmp_path, poll_s=0.005) as meter:
        for turn in range(1, 5):
            new.write_text(str(turn * RANGE_UJ * 6 // 10 % RANGE_UJ))
            new.replace(counter)  # never seen half-written
            time.sleep(0.25)
    assert meter.joules == pytest.approx(4 * 0.6 * RANGE_UJ / 1e6)


def test_an_error_in_the_block_is_raised_and_ends_the_poller(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meters = []

    def fail() -> None:
        with energy.measure_energy(CPU, root=tmp_path) as meter:
            meters.append(meter)
            counter.write_text("2000000")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (meter,) = meters
    assert meter.joules == pytest.approx(2)
    assert "suanli-energy" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("content", ["", "nonsense", "-5", "1.5e6"])
def test_what_is_no_number_is_unknown(tmp_path: Path, content: str) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:1", "package-1", content)
    with energy.measure_energy(CPU, root=tmp_path) as meter:
        pass
    assert meter.joules is None


def test_a_counter_that_goes_away_is_unknown(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    with energy.measure_energy(CPU, root=tmp_path) as meter:
        counter.unlink()
    assert meter.joules is None


def test_going_back_without_a_known_wrap_is_unknown(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    (counter.parent / "max_energy_range_uj").unlink()
    with energy.measure_energy(CPU, root=tmp_path) as meter:
        counter.write_text("1000000")
    assert meter.joules is None


@pytest.mark.parametrize("torch_name", ["cpu", "mps"])
def test_a_machine_without_counters_is_unknown(tmp_path: Path, torch_name: str) -> None:
    device = Device(name="", torch_name=torch_name, memory_bytes=None, fast_dtypes=())
    with energy.measure_energy(device, root=tmp_path) as meter:
        pass
    assert meter.joules is None


def test_this_machine_uses_energy_or_it_is_unknown() -> None:
    with energy.measure_energy(detect("cpu")) as meter:
        time.sleep(0.05)
    assert meter.joules is None or meter.joules > 0


NVML = """
class NVMLError(Exception): pass
joules = iter([0.5, 100.0, 107.25])
def nvmlInit():
    if {broken}: raise NVMLError("Driver Not Loaded")
def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != "GPU-8f2c": raise NVMLError("Not Found")
    return uuid
def nvmlDeviceGetTotalEnergyConsumption(handle):
    return int(next(joules) * 1000)
"""


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a pynvml first on the path: the real one needs the driver."""

    def put(*, broken: bool = False) -> None:
        (tmp_path / "pynvml.py").write_text(NVML.format(broken=broken))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    return put


def test_a_gpu_counts_millijoules(nvml) -> None:
    nvml()
    counter = energy.gpu_counter("GPU-8f2c")
    assert counter is not None
    assert (counter.read_j(), counter.read_j()) == (100.0, 107.25)
    assert counter.wraps_at_j is None


def test_no_driver_or_another_gpu_is_unknown(nvml) -> None:
    nvml()
    assert energy.gpu_counter("GPU-other") is None
    nvml(broken=True)
    assert energy.gpu_counter("GPU-8f2c") is None


def test_without_the_package_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.gpu_counter("GPU-8f2c") is None
