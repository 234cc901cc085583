"""The machine: what is detected, what is refused and with which fix, and the limits that count."""

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.cli import main
from suanli.core.errors import MachineError, UsageError
from suanli.machine import device as hardware
from suanli.machine import gpus
from suanli.machine.ceilings import Ceilings
from suanli.machine.cpus import affinity
from suanli.machine.peak import title
from suanli.verbs.device import device, table

needs_cpu_build = pytest.mark.skipif(
    torch.cuda.is_available() or torch.version.cuda is not None or torch.backends.mps.is_available(),
    reason="needs a torch built without CUDA on a machine without an Apple GPU",
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

H100 = "NVIDIA H100 80GB HBM3, 81559, 580.82.07, 9.0"


@pytest.fixture(autouse=True)
def _ask_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.nvidia_driver.cache_clear()
    yield
    gpus.nvidia_driver.cache_clear()


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of that name first on PATH: the real one is another's program."""

    def put(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        gpus.nvidia_driver.cache_clear()

    return put


def answers(rows: str, cuda: str = "13.0") -> str:
    return f"""case "$1" in
--query-gpu=*) printf '%s\\n' '{rows}' ;;
*) echo '| NVIDIA-SMI 580.82.07   Driver Version: 580.82.07   CUDA Version: {cuda}   |' ;;
esac"""


# --- which device ---------------------------------------------------------------------------


def test_cpu_by_name() -> None:
    cpu = hardware.detect("cpu")
    assert cpu.torch_name == cpu.type == "cpu"
    assert cpu.name.strip()
    assert cpu.fast_dtypes[0] == "float32"
    total, free = cpu.memory_bytes, hardware.available_memory_bytes(cpu)
    assert total is not None
    if free is not None:
        assert 0 < free <= total


@pytest.mark.parametrize("name", [None, "auto", "AUTO "])
def test_auto_is_a_device_on_which_torch_computes(name: str | None) -> None:
    device = hardware.detect(name)
    assert torch.ones(4, device=device.torch_name).sum().item() == 4
    for dtype in set(device.fast_dtypes) - {"tfloat32"}:  # a way to compute, not to store
        assert torch.ones(4, device=device.torch_name, dtype=getattr(torch, dtype)).dtype is getattr(torch, dtype)


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:9999", "cpu:0", "cuda 0", "x" * 999, "\0"]
)
def test_a_name_that_is_no_device(name: str) -> None:
    with pytest.raises(UsageError, match="Allowed: auto, cpu, cuda"):
        hardware.detect(name)


@needs_cpu_build
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_missing_device_is_refused_with_a_fix(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    with pytest.raises(MachineError, match=r"isn't here|no NVIDIA GPU was found") as caught:
        hardware.detect(name)
    assert "--device cpu" in caught.value.fix


@needs_cpu_build
def test_a_gpu_that_this_torch_misses(nvidia_smi: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    nvidia_smi(answers(H100))
    with pytest.raises(MachineError, match=r"H100.*without CUDA") as caught:
        hardware.detect("cuda")
    release = torch.__version__.partition("+")[0]
    assert f"-m pip install --force-reinstall torch=={release} --index-url" in caught.value.fix
    assert caught.value.fix.count("/whl/cu130") == 1

    assert hardware.detect("auto").type == "cpu"  # may pass over it, and says so
    stderr = " ".join(capsys.readouterr().err.split())
    assert "H100" in stderr
    assert "/whl/cu130" in stderr


@needs_cpu_build
@pytest.mark.parametrize(
    ("capability", "cuda", "way_out"),
    [
        ("9.0", "13.0", "/whl/cu130"),
        ("12.0", "13.2", "/whl/cu130"),
        ("9.0", "12.4", "/whl/cu126"),  # minor versions of CUDA 12 are compatible
        ("6.1", "13.0", "/whl/cu126"),  # CUDA 13 dropped it
        ("10.0", "12.8", "Update the NVIDIA driver to one that runs CUDA 13.0"),
        ("8.6", "11.4", "Update the NVIDIA driver to one that runs CUDA 12.6"),
        ("[N/A]", "13.0", "/whl/cu130"),
    ],
)
def test_the_wheel_fits_gpu_and_driver(
    nvidia_smi: Callable[[str], None], capability: str, cuda: str, way_out: str
) -> None:
    nvidia_smi(answers(f"Some GPU, 8192, 580.1, {capability}", cuda))
    (gpu,) = gpus.gpus()
    assert gpu.fix is not None
    assert way_out in gpu.fix
    assert gpu.memory_bytes == 8 << 30


@needs_cpu_build
def test_hidden_gpus_cause_no_warning(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(answers(H100))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.detect().type == "cpu"
    assert capsys.readouterr().err == ""
    with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES"):
        hardware.detect("cuda")


# --- nvidia-smi in trouble ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "driver isn't loaded"),
        ("sleep 60", "no answer within 0.3 s"),
    ],
)
def test_nvidia_smi_that_fails(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    monkeypatch.setattr(gpus, "NVIDIA_SMI_TIMEOUT_S", 0.3)
    nvidia_smi(script)
    started = time.monotonic()
    driver = gpus.nvidia_driver()
    assert time.monotonic() - started < 50  # not the minute that it sleeps
    assert problem in (driver.problem or "")
    assert driver.gpus == ()


def test_nvidia_smi_that_is_no_program(nvidia_smi: Callable[[str], None], tmp_path: Path) -> None:
    nvidia_smi("")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF cut short")
    assert "can't be run" in (gpus.nvidia_driver().problem or "")


def test_nvidia_smi_of_an_old_driver_knows_no_capability(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(f'case "$1" in *compute_cap*) exit 2 ;; esac\n{answers("Tesla K80, 11441, 440.33")}')
    assert gpus.nvidia_driver().gpus == (("Tesla K80", 11441 << 20, None),)


@pytest.mark.parametrize("rows", ["", "no columns", "\\377\\376, [N/A], x", "a, 99999999999999999999, b, c, d"])
def test_nvidia_smi_talking_nonsense_raises_nothing(nvidia_smi: Callable[[str], None], rows: str) -> None:
    nvidia_smi(f'case "$1" in --query*) printf "{rows}" ;; esac')
    gpus.nvidia_driver()
    assert table(device())


# --- which code runs on which GPU -----------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [
        ("8.9", ["sm_80", "sm_90"], True),  # same major version, newer minor
        ("8.0", ["sm_86"], False),
        ("9.0", ["sm_80"], False),
        ("9.0", ["sm_80", "compute_80"], True),  # PTX is compiled for newer GPUs
        ("7.5", ["sm_80", "compute_80"], False),
        ("12.0", ["sm_90a", "compute_90a"], False),  # letter a: that capability only
        ("9.0", ["sm_90a"], True),
        ("10.3", ["sm_100f"], True),  # letter f: the family
        ("12.1", ["sm_120"], True),
        ("12.0", [], False),
        ("9.0", ["gfx942", "sm_", "nonsense"], False),
    ],
)
def test_compatibility_of_code(capability: str, arch_list: list[str], runs: bool) -> None:
    reason = gpus.arch_why_not(capability, arch_list)
    assert (reason is None) == runs
    assert reason is None or capability in reason


@given(st.integers(5, 13), st.integers(0, 9), st.integers(5, 13), st.integers(0, 9))
def test_ptx_runs_on_everything_newer(major: int, minor: int, code_major: int, code_minor: int) -> None:
    runs = gpus.arch_why_not(f"{major}.{minor}", [f"compute_{code_major}{code_minor}"]) is None
    assert runs == ((major, minor) >= (code_major, code_minor))


# --- limits of the process ------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def test_memory_limit_of_a_parent_cgroup_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step",
            "sys/fs/cgroup/job/memory.max": str(256 << 20),
            "sys/fs/cgroup/job/step/memory.max": "max",
            "sys/fs/cgroup/job/step/memory.current": "0",
        },
    )
    assert hardware.memory_bytes(root) == 256 << 20


def test_memory_limit_of_cgroup_version_1_in_a_container(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/docker/ab",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(300 << 20),  # the own path isn't visible
        },
    )
    assert hardware.memory_bytes(root) == 300 << 20


def test_no_limit_means_the_installed_memory(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),  # version 1 for: none
        },
    )
    assert hardware.memory_bytes(root) == hardware.memory_bytes(tmp_path / "nothing here")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # half a core is still one thread
        ({"sys/fs/cgroup/cpu.max": "190000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, None),
        ({"sys/fs/cgroup/cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    root = tree(tmp_path, files | {"proc/self/cgroup": "0::/"})
    assert hardware.cores(root) == (cores or hardware.cores(tmp_path / "nothing here"))


def test_cpu_quota_of_cgroup_version_1(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "3:cpu,cpuacct:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000"}
    root = tree(tmp_path, files | {"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert hardware.cores(root) == 1


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("before", "after"), [("", "1, None"), ("3", "3, 3")])
def test_threads_follow_a_quota_unless_the_user_says_otherwise(tmp_path: Path, before: str, after: str) -> None:
    if len(affinity()) < 2:
        pytest.skip("there is only one core")
    tree(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000", "proc/self/cgroup": "0::/"})
    code = f"""
import os, sys
from pathlib import Path
os.environ.pop("OMP_NUM_THREADS", None)
os.environ |= {{"OMP_NUM_THREADS": {before!r}}} if {before!r} else {{}}
from suanli.machine import process_environment
process_environment.set_variables(Path({str(tmp_path)!r}))
assert "torch" not in sys.modules and "numpy" not in sys.modules
variables = process_environment.speed_variables()
print(variables["OMP_NUM_THREADS"], process_environment.of_user("OMP_NUM_THREADS"), sep=", ")
"""
    assert in_a_process(code).strip() == after


@needs_linux
def test_affinity_counts() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from suanli.machine import device as hardware; print(hardware.cores(), hardware.physical_cores())"
    assert in_a_process(code).split()[0] == "1"


@needs_linux
def test_ulimit_counts_and_running_into_it_is_recognised() -> None:
    code = """
import resource, torch
from suanli.machine import device as hardware
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
cpu = hardware.detect("cpu")
assert cpu.memory_bytes <= 8 << 30, cpu
assert hardware.available_memory_bytes(cpu) < 8 << 30
try:
    torch.ones(4 << 30)
except RuntimeError as error:
    assert hardware.is_out_of_memory(error), error
    print("recognised")
"""
    assert in_a_process(code).strip() == "recognised"


# --- out of memory --------------------------------------------------------------------------


def raised(work: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**50),
        lambda: np.empty(2**55),
        lambda: bytearray(2**55),
    ],
    ids=["torch", "numpy", "python"],
)
def test_real_failed_allocations_are_recognised(work: Callable[[], object]) -> None:
    assert hardware.is_out_of_memory(raised(work))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_known_messages_of_out_of_memory(error: BaseException) -> None:
    assert hardware.is_out_of_memory(error)


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: torch.ones(2, device="meta").item(),
        lambda: open("/no/such/file"),  # noqa: SIM115
        lambda: {}["out of memory"],
    ],
)
def test_other_errors_are_not_out_of_memory(work: Callable[[], object]) -> None:
    assert not hardware.is_out_of_memory(raised(work))


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("error return without exception set", True),
        ("<built-in method conv2d of type object> returned NULL without setting an exception", True),
        ("bad argument to internal function", False),
    ],
)
def test_c_code_that_had_no_memory_for_an_exception(message: str, memory: bool) -> None:
    assert hardware.is_out_of_memory(SystemError(message)) is memory


def test_no_space_left_is_not_out_of_memory() -> None:
    assert not hardware.is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


def test_peak_memory_grows_by_what_is_allocated() -> None:
    cpu = hardware.detect("cpu")
    before = hardware.peak_memory_bytes(cpu)
    assert before is not None
    array = np.ones(before // 8 + (64 << 20) // 8)
    after = hardware.peak_memory_bytes(cpu)
    assert after is not None
    assert after >= array.nbytes


# --- the record and the report --------------------------------------------------------------


def test_environment_has_no_personal_names(monkeypatch: pytest.MonkeyPatch) -> None:
    home = "/home/alice-of-nowhere"
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("SUANLI_TEST_SECRET", "token-9f2c")
    monkeypatch.setattr(sys, "argv", [f"{home}/.venv/bin/suanli", "train", f"--data-dir={home}/data", f"{home}2/x"])
    record = hardware.environment(hardware.detect("cpu"))
    assert record["command"] == ["suanli", "train", "--data-dir=~/data", f"{home}2/x"]
    monkeypatch.setattr(sys, "argv", [f"{home}/suanli/__main__.py", "train"])  # python -m suanli
    assert hardware.environment(hardware.detect("cpu"))["command"] == ["suanli", "train"]
    assert record["versions"]["torch"] == torch.__version__
    assert {"suanli", "numpy"} <= set(record["versions"])
    assert record["device"]["torch_name"] == "cpu"
    assert record["threads"] == torch.get_num_threads()
    text = json.dumps(record)
    assert "token-9f2c" not in text
    assert f'"{os.uname().nodename}"' not in text
    assert not {"host", "hostname", "node", "user"} & set(record)


def test_report_holds_what_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "not" / "yet"))
    report = device()
    values = json.loads(json.dumps(report.to_json()))
    assert values["cores"] == hardware.cores()
    assert values["runs_on"][-1] == "cpu"
    assert values["torch"] == torch.__version__
    assert values["disks"][0]["path"] == str(tmp_path / "not" / "yet")
    assert values["disks"][0]["free_bytes"] > 0
    assert not (tmp_path / "not").exists()
    for part in report.parts:
        assert (part.version is None) == (part.install is not None)


@needs_cpu_build
def test_the_gpu_that_cannot_be_used_comes_first(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(answers(f"{H100}\n{H100}"))
    report = device()
    lines = table(report).splitlines()
    assert "H100" in lines[0]
    assert "can't be used" in " ".join(lines[:2])
    assert report.fix in lines
    assert report.runs_on == ("cpu",)
    assert len(report.gpus) == 2
    assert report.driver == "580.82.07"
    assert report.driver_cuda == "13.0"


def test_table_fits_and_leaves_commands_whole() -> None:
    report = device()
    lines = table(report, width=80).splitlines()
    commands = {part.install for part in report.parts if part.install} | {report.fix}
    for line in lines:
        assert len(line) <= 80 or line.strip() in commands or " " not in line.strip()
        assert line == line.rstrip()
    assert commands - {None} <= {line.strip() for line in lines}


# --- what it reaches ------------------------------------------------------------------------


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["device", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_known_ceilings_are_part_of_the_report(measured: tuple[Ceilings, Path]) -> None:
    report = device(device="cpu", cache_dir=measured[1])
    assert report.ceilings == measured[0]
    assert device(device="cpu", probe=True, cache_dir=measured[1]).ceilings == measured[0]
    lines = table(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("What cpu reaches with 1 thread, measured on 2"))
    rows = {line[2:].split("  ")[0]: line for line in lines[start + 1 :] if line.startswith("  ")}
    assert " GFLOP/s" in rows["matrix product in float32"]
    assert " GB/s" in rows["memory copy"]
    assert " µs" in rows["launch of an operation"]
    assert " images/s" in rows["JPEG decoding"]
    for name, spread in measured[0].spread.items():  # None: too few rounds in so short a time
        assert rows[title(name)].endswith("s" if spread is None else f"± {spread:.1%}")
    assert all(len(line) <= 80 for line in lines[start : start + len(measured[0].spread) + 3])


def test_what_was_never_measured_says_how(tmp_path: Path) -> None:
    report = device(device="cpu", cache_dir=tmp_path)
    assert report.ceilings is None
    assert "suanli device --probe" in table(report)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_shows_ceilings(measured: tuple[Ceilings, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "cpu", "--cache-dir", measured[1])
    assert command("--probe", "--json", *options) == 0
    assert json.loads(capsys.readouterr().out)["ceilings"] == measured[0].to_json()
    assert command("--json", "--device", "cpu", "--cache-dir", "empty") == 0
    assert json.loads(capsys.readouterr().out)["ceilings"] is None
    assert command("--probe", *options) == 0
    output = capsys.readouterr()
    assert "matrix product in float32" in output.out
    assert output.err == ""


@needs_cpu_build
@pytest.mark.parametrize(("name", "code"), [("cuda:7", 4), ("mps", 4), ("gpu", 2)])
def test_a_device_that_is_not_here_is_not_measured(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--probe", "--device", name) == code
    assert capsys.readouterr().err.startswith("suanli: ")
