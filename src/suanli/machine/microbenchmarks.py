"""The workloads whose rates are a machine's ceilings: products, convolutions, copies, launches and JPEG decoding. Disk
reads are in `disk.py`; `peak.py` times them all.

A workload uses random data, since a GPU computes zeros with less power and a higher clock than real data. Its memory is
allocated once, and it grows until one call takes long enough to be timed. A workload that fails, or isn't worth trying,
is absent with its reason.

A ceiling is what a large, well-shaped call reaches through torch, not what a data sheet says. To compare with it, count
floating-point operations in the same way: a multiply-add is two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from suanli.core.errors import first_line
from suanli.core.types import Device
from suanli.machine.device import available_memory_bytes, cores, instruction_sets
from suanli.machine.switches import set_attributes
from suanli.machine.timing import seconds

PRECISIONS = ("float32", "tfloat32", "bfloat16", "float16", "float8_e4m3fn", "int8")
CHANNELS, PIXELS = 256, 14  # of the 3x3 convolution: the third stage of a ResNet at 224 px
ROUNDED = "float32 in bfloat16"  # float32 layers whose products oneDNN computes in bfloat16
COPY_BYTES = 256 << 20
LAUNCHES = 500  # in a row: fewer than fit into a GPU's queue, where waiting for room would be measured too
JPEG_PIXELS = 224
_SWITCHES = {"float32": "ieee", "tfloat32": "tf32", ROUNDED: "bf16"}  # of float32 layers
_FAST_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


class Absent(Exception):
    """A figure can't be measured on this machine; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Something to time."""

    amount: float  # operations, bytes, images or launches in one call
    call: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times calls, and makes workloads large enough to be timed."""

    settle: Callable[[], None] | None  # waits for the device
    call_s: float  # that a call should take, about; a few times as long where sizes grow in steps

    def seconds(self, work: Workload) -> float:
        """How long one call takes, after a call to warm up."""
        work.call()
        return seconds(work.call, self.settle)

    def grow(self, make: Callable[[int], Workload], sizes: tuple[int, ...]) -> Workload:
        """The workload of the first size that takes about `call_s`, or of the largest."""
        for size in sizes:
            work = make(size)
            if self.seconds(work) >= self.call_s / 2:
                break
        return work

    def repeat(self, work: Workload) -> Workload:
        """The same workload, as many times in one call as `call_s` needs."""
        times = math.ceil(self.call_s / max(self.seconds(work), self.call_s / 1000))

        def call() -> None:
            for _ in range(times):
                work.call()

        return work if times == 1 else Workload(amount=work.amount * times, call=call)


def build_workloads(
    device: Device, resources: ExitStack, call_s: float, decode: Callable[[bytes], object]
) -> tuple[dict[str, Workload], dict[str, str]]:
    """The workloads of this device by the name of their figure, each warmed up; and the reasons for what is absent.
    Threads that a workload needs are stopped when `resources` is closed."""
    clock = Clock(settle=synchronizer(device), call_s=call_s)
    workloads: dict[str, Workload] = {}
    absent: dict[str, str] = {}
    for name, build in _builders(device, resources, clock, decode).items():
        try:
            workloads[name] = clock.repeat(build())
        except Absent as reason:
            absent[name] = str(reason)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            # What torch raises for a dtype or an operator that a backend or an older release lacks
            absent[name] = first_line(error, 200)
    return workloads, absent


def synchronizer(device: Device) -> Callable[[], None] | None:
    """The function that waits until the device has finished its work; None: the device runs synchronously."""
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return partial(torch.cuda.synchronize, device.torch_name)
    return torch.mps.synchronize if device.type == "mps" else torch.accelerator.synchronize


def _builders(
    device: Device, resources: ExitStack, clock: Clock, decode: Callable[[bytes], object]
) -> dict[str, Callable[[], Workload]]:
    builders: dict[str, Callable[[], Workload]] = {}
    for precision in PRECISIONS:
        builders[f"matmul_flops.{precision}"] = partial(_matmul, device, precision, clock)
    for precision in PRECISIONS[:4]:  # the ones in which torch convolves
        builders[f"conv_flops.{precision}"] = partial(_convolution, device, precision, clock)
    builders["memory_bytes_per_s"] = partial(_copy, device)
    builders["launch_s"] = partial(_launch, device, clock)
    if device.type == "cuda":
        builders["host_to_device_bytes_per_s"] = partial(_host_to_device, device)
        builders["graph_launch_s"] = partial(_graph_launch, device, clock)
        if torch.cuda.device_count() > 1:
            builders["all_reduce_bytes_per_s"] = _all_reduce
    builders["jpeg_images_per_s"] = partial(_jpeg, resources, decode)
    return builders


# --- arithmetic ---------------------------------------------------------------------------------


def why_not(device: Device, precision: str) -> str | None:
    """Why this precision isn't worth measuring here; None: it is. A slow emulation is no ceiling."""
    if precision == "float32" or precision in device.fast_dtypes:
        return None
    if precision == ROUNDED and device.type == "cpu" and "bfloat16" in device.fast_dtypes:
        return None
    if precision == "int8" and (device.type == "cuda" or _cpu_multiplies_int8(device)):
        return None
    return "no fast hardware for it"


def _cpu_multiplies_int8(device: Device) -> bool:
    return device.type == "cpu" and not _FAST_INT8.isdisjoint(instruction_sets())


def _matmul(device: Device, precision: str, clock: Clock) -> Workload:
    """The product of two square matrices. The second is stored by columns, as linear layers store weights and as the
    8-bit operators require."""
    if reason := why_not(device, precision):
        raise Absent(reason)
    make = partial(matmul, device, precision)
    on_cpu = device.type == "cpu"
    return clock.grow(make, (512, 1024, 2048) if on_cpu else (2048, 4096, 8192))


def matmul(device: Device, precision: str, n: int) -> Workload:
    left, right = (_random_tensor(device, (n, n), precision) for _ in range(2))
    right = right.t()
    if precision == "int8":
        call: Callable[[], object] = partial(torch._int_mm, left, right)
    elif precision == "float8_e4m3fn":
        one = torch.ones((), device=device.torch_name)
        call = partial(torch._scaled_mm, left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        call = partial(torch.mm, left, right, out=torch.empty_like(left))
    return Workload(amount=2.0 * n**3, call=_in_precision(precision, call))


def _convolution(device: Device, precision: str, clock: Clock) -> Workload:
    """A 3x3 convolution, channels last, forward and both gradients: three times the operations of the forward pass."""
    if reason := why_not(device, precision):
        raise Absent(reason)
    make = partial(convolution, device, precision)
    on_cpu = device.type == "cpu"
    return clock.grow(make, (1, 4, 16) if on_cpu else (512,))


def convolution(device: Device, precision: str, batch: int) -> Workload:
    image = (batch, CHANNELS, PIXELS, PIXELS)
    inputs, weights, gradient = (
        _random_tensor(device, shape, precision).to(memory_format=torch.channels_last)
        for shape in (image, (CHANNELS, CHANNELS, 3, 3), image)
    )
    inputs.requires_grad_()
    weights.requires_grad_()

    def call() -> None:
        with torch.enable_grad():
            outputs = torch.nn.functional.conv2d(inputs, weights, padding=1)
            torch.autograd.grad(outputs, (inputs, weights), gradient)

    return Workload(amount=3 * 2.0 * batch * PIXELS**2 * CHANNELS**2 * 9, call=_in_precision(precision, call))


def _random_tensor(device: Device, shape: tuple[int, ...], precision: str) -> torch.Tensor:
    random = torch.Generator(device.torch_name).manual_seed(0)  # torch's own generator belongs to the user
    if precision == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device.torch_name, generator=random)
    dtype = torch.float32 if precision in _SWITCHES else getattr(torch, precision)
    return torch.randn(shape, device=device.torch_name, generator=random).to(dtype)


def _in_precision(precision: str, call: Callable[[], object]) -> Callable[[], object]:
    if precision not in _SWITCHES:
        return call

    def call_in_precision() -> None:
        with set_fp32_precision(_SWITCHES[precision]):
            call()

    return call_in_precision


def set_fp32_precision(value: str) -> AbstractContextManager[None]:
    """Computes float32 in full ("ieee"), in NVIDIA's "tf32", or on a CPU in "bf16" in the block, whatever is set for
    the process."""
    on_gpu = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    on_cpu = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]  # type: ignore[attr-defined]
    switches = {"ieee": on_gpu + on_cpu, "tf32": on_gpu, "bf16": on_cpu}[value]
    return set_attributes(switches, "fp32_precision", value)


# --- movement and launches ----------------------------------------------------------------------


def _copy(device: Device) -> Workload:
    """A copy in memory, several times as large as the caches. Bytes that are read and bytes that are written count."""
    size = max(COPY_BYTES, 4 * _cache_bytes()) if device.type == "cpu" else 4 * COPY_BYTES
    room = available_memory_bytes(device)
    if room is not None and room < 4 * COPY_BYTES:
        raise Absent("too little free memory for a copy that no cache holds")
    source = _random_bytes(device.torch_name, size if room is None else min(size, room // 4))
    target = torch.empty_like(source)
    return Workload(amount=2.0 * source.nbytes, call=lambda: target.copy_(source))


def _cache_bytes(root: Path = Path("/")) -> int:
    """The size of all last-level caches of the processor; 0: unknown."""
    sizes = {}
    for cache in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = re.fullmatch(r"(\d+)K", (cache / "size").read_text().strip())
            sizes[(cache / "shared_cpu_list").read_text()] = int(size[1]) << 10 if size else 0
        except OSError:
            continue
    return sum(sizes.values())


def _random_bytes(device: str, count: int) -> torch.Tensor:
    """A block of random bytes, repeated. They are written, since a page that never was isn't read from memory."""
    block = torch.randint(256, (16 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return block.to(device).repeat(max(1, count // block.nbytes))


def _host_to_device(device: Device) -> Workload:
    source = _random_bytes("cpu", COPY_BYTES).pin_memory()
    target = torch.empty_like(source, device=device.torch_name)
    return Workload(amount=float(source.nbytes), call=lambda: target.copy_(source, non_blocking=True))


def _all_reduce() -> Workload:
    """A sum over all GPUs that this process sees. The amount is the bytes that each holds, so that bytes over rate is
    the time that gradients of that size take."""
    from torch.cuda import nccl

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    tensors = [torch.ones(COPY_BYTES // 4, device=device) for device in devices]
    if not nccl.is_available(tensors):  # type: ignore[no-untyped-call]
        raise Absent("this torch was built without NCCL")

    def call() -> None:
        nccl.all_reduce(tensors)  # type: ignore[no-untyped-call]
        for device in devices:
            torch.cuda.synchronize(device)

    return Workload(amount=float(COPY_BYTES), call=call)


def _launch(device: Device, clock: Clock) -> Workload:
    """Tiny in-place operations in a row: the cost of each beside its arithmetic."""
    tiny = torch.ones(1, device=device.torch_name)

    return _launches(lambda: tiny.add_(1), clock)


def _graph_launch(device: Device, clock: Clock) -> Workload:
    """A CUDA graph of one tiny kernel, replayed many times in a row."""
    tiny = torch.ones(1, device=device.torch_name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device.torch_name), torch.cuda.graph(graph):
        tiny.add_(1)

    return _launches(graph.replay, clock)


def _launches(launch: Callable[[], object], clock: Clock) -> Workload:
    def call() -> None:
        for _ in range(LAUNCHES):
            launch()
        if clock.settle is not None:
            clock.settle()

    return Workload(amount=LAUNCHES, call=call)


# --- input --------------------------------------------------------------------------------------


def _jpeg(resources: ExitStack, decode: Callable[[bytes], object]) -> Workload:
    """Decoding photos on all cores."""
    photos, threads = 16, cores()
    photo = synthetic_photo(JPEG_PIXELS)
    pool = resources.enter_context(ThreadPoolExecutor(threads))

    def decode_some(_: int) -> None:
        for _ in range(photos):
            decode(photo)

    return Workload(amount=photos * threads, call=lambda: list(pool.map(decode_some, range(threads))))


def synthetic_photo(pixels: int) -> bytes:
    """A square JPEG file that takes as long to decode as a photo: smooth shapes with noise."""
    random = np.random.default_rng(0)
    shapes = torch.from_numpy(random.random((1, 3, 14, 14), np.float32))
    smooth = torch.nn.functional.interpolate(shapes, size=(pixels, pixels), mode="bicubic")[0]
    noisy = smooth.permute(1, 2, 0).numpy() * 255 + random.normal(0, 6, (pixels, pixels, 3))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8)), quality=85))
