"""device: what this machine has, what this torch build can use of it, and what would add the rest.

Without `probe` nothing is timed, so it answers in seconds, and the machine's speed is that of an earlier measurement. A
GPU that can't be used comes first, with the command that fixes it.
"""

from __future__ import annotations

import platform
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from suanli.core.console import plural, size
from suanli.core.errors import pip_install
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.paths import data_dir
from suanli.core.types import AnyPath
from suanli.data.decode import decode
from suanli.machine import device as devices
from suanli.machine.ceilings import Ceilings
from suanli.machine.gpus import Gpu, are_gpus_hidden, gpus, nvidia_driver
from suanli.machine.peak import probe as measure_ceilings
from suanli.machine.peak import read_cached, title
from suanli.machine.process_environment import speed_variables


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Room at a directory that suanli fills; it need not exist yet."""

    use: str
    path: str
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """An optional package."""

    name: str
    gives: str  # what it adds, in a few words
    version: str | None  # None: not installed
    install: str | None  # the command that adds it; None: installed


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """One machine, as this process sees it. Unknown is None."""

    status: str  # where work runs, or why a GPU can't be used; "headline" in JSON
    fix: str | None  # what to do about it
    runs_on: tuple[str, ...]  # torch names of where this torch build runs, best first
    cpu: str
    architecture: str
    cores: int  # logical, that this process may use
    physical_cores: int | None
    instruction_sets: tuple[str, ...]
    variables: dict[str, str]  # of the environment, that decide speed
    memory_bytes: int | None
    available_memory_bytes: int | None
    disks: tuple[Disk, ...]
    gpus: tuple[Gpu, ...]
    driver: str | None  # NVIDIA
    driver_cuda: str | None  # the newest CUDA that the driver runs
    cuda: str | None  # that torch was built with
    cudnn: str | None
    os: str
    python: str
    torch: str
    parts: tuple[Part, ...]
    ceilings: Ceilings | None  # of the requested device; None: not measured yet

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        return {"headline": values.pop("status"), **values}


# Name of the distribution, its requirement for pip, and what it adds.
_PARTS = (
    ("simplejpeg", "simplejpeg>=1.8", "faster JPEG decoding"),
    ("timm", "timm>=1.0", "models by timm:NAME"),
    ("tensorboard", "tensorboard>=2.18", "metrics for TensorBoard"),
    ("mlflow-skinny", "mlflow-skinny>=2.19", "metrics for MLflow"),
    ("wandb", "wandb>=0.19", "metrics for Weights & Biases"),
    ("triton", "triton", "compiled kernels on GPUs"),
    ("nvidia-ml-py", "nvidia-ml-py", "energy of NVIDIA GPUs"),
    ("onnxruntime", "onnxruntime", "ONNX inference"),
    ("openvino", "openvino", "inference on Intel processors"),
)
_SAME = {"mlflow-skinny": "mlflow"}  # the full package serves too


def device(
    *, probe: bool = False, fresh: bool = False, device: str | None = "auto", cache_dir: AnyPath | None = None
) -> DeviceReport:
    """Describe this machine. With `probe`, measure what `device` can reach, unless that is cached; with `fresh`,
    measure it anew. Raises nothing for what is missing: that is in the report. But a `device` by name must be here,
    or it is a UsageError or MachineError."""
    import torch

    present, driver = gpus(), nvidia_driver()
    runs_on = (*(gpu.torch_name for gpu in present if gpu.torch_name and gpu.why_not is None), "cpu")
    automatic = device is None or device.strip().lower() == "auto"  # the status says why a GPU isn't used
    target = devices.detect(runs_on[0] if automatic else device)
    cache = cache_dir_of(cache_dir)
    ceilings = measure_ceilings(target, cache, decode, fresh=fresh) if probe or fresh else read_cached(target, cache)
    status, fix = _status(present, driver.problem)
    cpu = devices.detect("cpu")
    return DeviceReport(
        status=status,
        fix=fix,
        runs_on=runs_on,
        cpu=cpu.name,
        architecture=platform.machine(),
        cores=devices.cores(),
        physical_cores=devices.physical_cores(),
        instruction_sets=tuple(n for n in devices.INSTRUCTION_SETS if n in devices.instruction_sets()),
        variables=speed_variables(),
        memory_bytes=cpu.memory_bytes,
        available_memory_bytes=devices.available_memory_bytes(cpu),
        disks=(_disk("prepared data", cache), _disk("downloads", data_dir())),
        gpus=present,
        driver=driver.version,
        driver_cuda=driver.cuda,
        cuda=torch.version.cuda,
        cudnn=_cudnn(),
        os=platform.platform(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        parts=tuple(_part(*part) for part in _PARTS),
        ceilings=ceilings,
    )


def _status(present: tuple[Gpu, ...], problem: str | None) -> tuple[str, str | None]:
    refused = [gpu for gpu in present if gpu.why_not]
    if refused:
        return f"{refused[0].name} can't be used: {refused[0].why_not}", refused[0].fix
    if present:
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        return f"Work runs on {present[0].torch_name} ({present[0].name}){more}.", None
    if are_gpus_hidden():
        return "Work runs on the CPU: CUDA_VISIBLE_DEVICES hides every GPU.", None
    if problem:
        return (
            f"Work runs on the CPU: {problem}.",
            "If there is a GPU, load or reinstall its driver; reboot if it hangs.",
        )
    return "Work runs on the CPU; no GPU was found.", None


def _cudnn() -> str | None:
    """As people write it: 91002 is 9.10.2; before version 9, 8907 was 8.9.7."""
    import torch

    number = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if not number:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _disk(use: str, path: Path) -> Disk:
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    try:
        free = shutil.disk_usage(there).free if there else None
    except OSError:
        free = None
    return Disk(use=use, path=str(path), free_bytes=free)


def _part(name: str, requirement: str, gives: str) -> Part:
    versions = devices.versions((name, _SAME.get(name, name)))
    if versions:
        return Part(name=name, gives=gives, version=next(iter(versions.values())), install=None)
    return Part(name=name, gives=gives, version=None, install=pip_install(*_arguments(requirement)))


def _arguments(requirement: str) -> Iterator[str]:
    """The arguments with which pip adds the package and leaves torch as it is."""
    import torch

    yield requirement
    if requirement.startswith("timm"):  # it brings torchvision, which must match the build of torch
        yield f"torch=={torch.__version__}"
        build = str(torch.__version__).partition("+")[2]
        if build:
            yield from ("--extra-index-url", f"https://download.pytorch.org/whl/{build}")


# --- for people -----------------------------------------------------------------------------


def table(report: DeviceReport, width: int = 80) -> str:
    """The report for people, plain lines. Only a command may be longer than `width`: it stays on one
    line, so that it can be copied."""
    lines = textwrap.wrap(report.status, width)
    if report.fix:
        lines.append(report.fix)
    rows = [*_machine_rows(report), *_software_rows(report)]
    indent = max(len(name) for name, _ in rows) + 2
    lines.append("")
    for name, value in rows:
        first = f"{name:<{indent}}"
        lines += textwrap.wrap(
            value,
            width,
            initial_indent=first,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines += ["", *_ceiling_lines(report.ceilings, width)]
    missing = [part for part in report.parts if part.install]
    if missing:
        lines += ["", "Not installed, and not needed unless you want what it adds:"]
        lines += [f"  {part.name}: {part.gives}\n    {part.install}" for part in missing]
    return "\n".join(lines)


def _machine_rows(report: DeviceReport) -> Iterator[tuple[str, str]]:
    yield "CPU", report.cpu
    physical = f", {report.physical_cores} physical" if report.physical_cores is not None else ""
    yield "cores", f"{report.cores} usable{physical}"
    yield "instructions", " ".join(report.instruction_sets) or "none that matter"
    if report.variables:
        yield "variables", " ".join(f"{name}={value}" for name, value in report.variables.items())
    yield "memory", f"{_size(report.memory_bytes)}, {_size(report.available_memory_bytes)} available"
    for disk in report.disks:
        yield "disk", f"{_size(disk.free_bytes)} free for {disk.use} ({disk.path})"
    for gpu in report.gpus:
        capability = f", compute capability {gpu.capability}" if gpu.capability else ""
        use = f"usable as {gpu.torch_name}" if gpu.why_not is None else f"not usable: {gpu.why_not}"
        yield "GPU", f"{gpu.name}, {_size(gpu.memory_bytes)}{capability}; {use}"
    if report.driver:
        cuda = f", runs CUDA up to {report.driver_cuda}" if report.driver_cuda else ""
        yield "NVIDIA driver", f"{report.driver}{cuda}"


def _software_rows(report: DeviceReport) -> Iterator[tuple[str, str]]:
    built = f"CUDA {report.cuda}, cuDNN {report.cudnn or 'absent'}" if report.cuda else "without CUDA"
    yield "torch", f"{report.torch} ({built}), runs on {', '.join(report.runs_on)}"
    yield "Python", f"{report.python}, {report.os}"
    for part in report.parts:
        if part.version:
            yield part.name, part.version


# Unit, and how many base units of the figure it is.
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
_UNITS = {
    "matmul_flops": "FLOP/s",
    "conv_flops": "FLOP/s",
    "memory_bytes_per_s": "B/s",
    "host_to_device_bytes_per_s": "B/s",
    "all_reduce_bytes_per_s": "B/s",
    "launch_s": "s",
    "graph_launch_s": "s",
    "disk_read_bytes_per_s": "B/s",
}


def _ceiling_lines(ceilings: Ceilings | None, width: int) -> Iterator[str]:
    if ceilings is None:
        yield "Its speed was never measured. suanli device --probe does it in less than 20 s."
        return
    busy = "" if ceilings.steady else ", on a busy machine"
    threads = f" with {plural(ceilings.threads, 'thread')}" if ceilings.torch_name == "cpu" else ""
    yield f"What {ceilings.torch_name} reaches{threads}, measured on {ceilings.time[:10]}{busy}:"
    rows = [(title(name), _format_scaled(value, name), ceilings.spread[name]) for name, value in _figures(ceilings)]
    indent = max(len(name) for name, _, _ in rows)
    for name, value, spread in rows:
        yield f"  {name:<{indent}}  {value:>16}  {'' if spread is None else f'± {spread:.1%}'}".rstrip()
    if ceilings.absent:
        yield from textwrap.wrap(
            f"Not measured: {_absent(ceilings)}.", width, initial_indent="  ", subsequent_indent="    "
        )


def _absent(ceilings: Ceilings) -> str:
    """Every reason once, after the names to which it applies."""
    names: dict[str, list[str]] = {}
    for name, reason in ceilings.absent.items():
        names.setdefault(reason, []).append(title(name))
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items())


def _figures(ceilings: Ceilings) -> Iterator[tuple[str, float]]:
    """Every figure that there is, by the name of its spread."""
    for name, value in ceilings.to_json().items():
        if isinstance(value, dict) and name in _UNITS:
            yield from ((f"{name}.{precision}", rate) for precision, rate in value.items())
        elif name in ceilings.spread and isinstance(value, int | float):
            yield name, value


def _format_scaled(value: float, figure: str) -> str:
    """Three digits in a unit that people say: 1.84e11 FLOP/s are "184 GFLOP/s"."""
    name, _, precision = figure.partition(".")
    if name not in _UNITS:
        return f"{value:,.0f} images/s"
    unit = "op/s" if precision == "int8" else _UNITS[name]
    factor, prefix = next((scale for scale in _SCALES if value >= scale[0]), _SCALES[-1])
    scaled = value / factor
    return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {prefix}{unit}"


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)
