"""Ceilings: really measured in a fraction of a second, cached, and not kept where the machine is busy."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from small_workloads import CPU, measure
from suanli.core.types import Device
from suanli.data.decode import decode
from suanli.machine import microbenchmarks
from suanli.machine.ceilings import Ceilings
from suanli.machine.disk import measure_read_rates
from suanli.machine.microbenchmarks import PRECISIONS, Absent
from suanli.machine.peak import fingerprint, probe, read_cached, title, unsteady_figures
from suanli.machine.timing import STEADY

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who had the cores")


def entry(cache: Path) -> Path:
    return cache / "probe" / f"{fingerprint(CPU)}.json"


# --- what is measured -----------------------------------------------------------------------


def test_every_figure_is_a_rate_with_its_spread(measured: tuple[Ceilings, Path]) -> None:
    ceilings, _ = measured
    values = json.loads(json.dumps(ceilings.to_json(), allow_nan=False))
    assert set(values["matmul_flops"]) | set(values["absent"]) >= set(PRECISIONS)
    assert not set(values["matmul_flops"]) & set(values["absent"])
    assert "float32" in values["matmul_flops"]
    assert "float32" in values["conv_flops"]
    figures = {f"{kind}.{p}" for kind in ("matmul_flops", "conv_flops") for p in values[kind]}
    figures |= {name for name in values if name.endswith("_s") and values[name] is not None}
    assert set(values["spread"]) == figures
    assert {"memory_bytes_per_s", "launch_s", "jpeg_images_per_s"} <= figures
    assert values["all_reduce_bytes_per_s"] is values["host_to_device_bytes_per_s"] is values["graph_launch_s"] is None
    assert (values["disk_read_bytes_per_s"] is None) == ("disk_read_bytes_per_s" in values["absent"])


def test_the_figures_are_of_this_machine(measured: tuple[Ceilings, Path]) -> None:
    """Between an abacus and the fastest processor: a wrong unit or a wrong count is a factor of a thousand."""
    ceilings, _ = measured
    assert 1e8 < ceilings.matmul_flops["float32"] < 1e14
    assert 1e8 < ceilings.conv_flops["float32"] < 1e14
    assert 1e8 < ceilings.memory_bytes_per_s < 1e13
    assert 1e-8 < ceilings.launch_s < 1e-3
    assert 10 < ceilings.jpeg_images_per_s < 1e7


def test_a_slow_emulation_is_no_ceiling() -> None:
    plain = Device(name="", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32",))
    assert microbenchmarks.why_not(plain, "float32") is None
    for precision in ("tfloat32", "bfloat16", "float16", "float8_e4m3fn"):
        assert microbenchmarks.why_not(plain, precision)


@pytest.mark.parametrize("chosen", ["highest", "medium"])
def test_float32_means_float32_whatever_the_process_chose(chosen: str) -> None:
    places = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(chosen)
        was = [place.fp32_precision for place in places]
        with microbenchmarks.set_fp32_precision("ieee"):
            assert {place.fp32_precision for place in places} == {"ieee"}
        with microbenchmarks.set_fp32_precision("tf32"):
            assert [place.fp32_precision for place in places[:2]] == ["tf32", "tf32"]
        assert [place.fp32_precision for place in places] == was
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)


def test_titles_are_for_people(measured: tuple[Ceilings, Path]) -> None:
    assert title("matmul_flops.int8") == "matrix product in int8"
    assert not any("_" in title(name) for name in measured[0].spread)


# --- the disk -------------------------------------------------------------------------------


def test_a_disk_is_read_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    try:
        rates = measure_read_rates(folder, 0.5)
    except Absent as reason:
        pytest.skip(str(reason))
    assert all(1e5 < rate < 1e12 for rate in rates)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_memory_is_no_disk() -> None:
    with pytest.raises(Absent, match="memory|room"):
        measure_read_rates(Path("/dev/shm"), 0.5)


# --- the cache ------------------------------------------------------------------------------


def test_cached_figures_are_not_measured_again(
    measured: tuple[Ceilings, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ceilings, cache = measured
    assert read_cached(CPU, cache) == ceilings
    assert probe(CPU, cache, decode) == ceilings  # the full budget would take seconds
    assert capsys.readouterr().err == ""
    assert [path.name for path in (cache / "probe").glob("*.json")] == [f"{ceilings.fingerprint}.json"]


def test_another_number_of_threads_is_another_machine(measured: tuple[Ceilings, Path]) -> None:
    ceilings, cache = measured
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fingerprint(CPU) != ceilings.fingerprint
        assert read_cached(CPU, cache) is None
    finally:
        torch.set_num_threads(before)
    assert fingerprint(CPU) == ceilings.fingerprint


@given(st.data())
def test_a_truncated_entry_is_unknown(
    measured: tuple[Ceilings, Path], tmp_path_factory: pytest.TempPathFactory, data
) -> None:
    whole = entry(measured[1]).read_bytes().rstrip()
    cache = tmp_path_factory.mktemp("cut")
    entry(cache).parent.mkdir()
    entry(cache).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert read_cached(CPU, cache) is None


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "another machine's"},
        {"launch_s": 0.0},
        {"launch_s": "3e-6"},
        {"memory_bytes_per_s": math.nan},
        {"matmul_flops": {"float32": -1.0}},
        {"conv_flops": None},
        {"steady": 1},
    ],
)
def test_an_altered_entry_is_unknown(
    measured: tuple[Ceilings, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    entry(tmp_path).parent.mkdir()
    values = measured[0].to_json()
    entry(tmp_path).write_text(json.dumps(values))
    assert read_cached(CPU, tmp_path) == measured[0]
    entry(tmp_path).write_text(json.dumps(values | change))
    assert read_cached(CPU, tmp_path) is None


def test_a_damaged_entry_is_measured_again(tmp_path: Path) -> None:
    entry(tmp_path).parent.mkdir()
    entry(tmp_path).write_bytes(b"\xff\x00")
    ceilings = measure(tmp_path)
    assert read_cached(CPU, tmp_path) == ceilings
    again = measure(tmp_path, fresh=True)
    assert again != ceilings
    assert read_cached(CPU, tmp_path) == again


def test_a_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    ceilings = measure(tmp_path / "file" / "cache")
    assert ceilings.matmul_flops["float32"] > 0
    assert ceilings.disk_read_bytes_per_s is None
    assert "can't be written" in ceilings.absent["disk_read_bytes_per_s"]
    stderr = " ".join(capsys.readouterr().err.split())
    assert "warning: The figures could not be cached. Can't write" in stderr


def test_of_two_processes_one_measures(capsys: pytest.CaptureFixture[str]) -> None:
    """This one and another, which begin at the same moment."""
    code = f"""
import json, pathlib, sys, time
sys.path.append({str(Path(__file__).parent)!r})
from small_workloads import measure
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(measure(pathlib.Path("shared"), fresh=True).to_json()))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        print(file=other.stdin, flush=True)
        ceilings = measure(Path("shared"), fresh=True)
        answer, stderr = other.communicate(timeout=120)
    assert other.returncode == 0, stderr
    assert json.loads(answer) == json.loads(json.dumps(ceilings.to_json()))
    assert sum("waiting for another process" in text for text in (stderr, capsys.readouterr().err)) == 1


# --- a busy machine -------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.none() | st.floats(0, 10)), st.floats(0, 10))
def test_wide_or_unknown_is_unsteady(spread: dict[str, float | None], widest: float) -> None:
    figures = unsteady_figures(spread, widest)
    assert set(figures) == {name for name, value in spread.items() if value is None or value > widest}
    worst = [math.inf if spread[name] is None else spread[name] for name in figures]
    assert worst == sorted(worst, reverse=True)


def test_wide_figures_are_reported_and_not_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, precision = torch.random.get_rng_state(), torch.get_float32_matmul_precision()
    ceilings = measure(tmp_path, widest=0)
    assert not ceilings.steady
    assert "warning: This machine was busy" in capsys.readouterr().err
    assert read_cached(CPU, tmp_path) is None
    # Measuring leaves the user's process as it was.
    assert torch.equal(random, torch.random.get_rng_state())
    assert precision == torch.get_float32_matmul_precision()


@contextmanager
def rival():
    """A program that computes all the time on the one core that this process may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, allowed)


@needs_linux
def test_a_rival_for_the_core_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rival():
        ceilings = measure(tmp_path, widest=STEADY)
    assert ceilings.waiting is not None
    assert ceilings.waiting > 0.2
    assert not ceilings.steady
    assert "something else had the cores" in capsys.readouterr().err
    assert list((tmp_path / "probe").glob("*.json")) == []
