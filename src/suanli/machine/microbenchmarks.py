"""The works whose rates are a machine's ceilings: what is computed, copied, launched and decoded, and how much
of it one call does. The disk is in `disk.py`.

Each work is made of random data (zeros cost a GPU less power, so it clocks higher than it will in training), in
memory that is allocated once, and grows until one call takes long enough for the clock. A work that fails or isn't
worth trying is absent with its reason. How often each is called, what is kept and what is cached isn't here but in
`probe.py`.

Figures are what a large, well-shaped call reaches through torch, not what a data sheet says; a caller that wants the
share of a ceiling should count floating-point operations as here: a multiplication and an addition are two.
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

from suanli.core.types import Device
from suanli.machine.device import available_memory_bytes, cores, instruction_sets
from suanli.machine.switches import set_attributes
from suanli.machine.timing import seconds

PRECISIONS = ("float32", "tfloat32", "bfloat16", "float16", "float8_e4m3fn", "int8")
CHANNELS, PIXELS = 256, 14  # of the 3x3 convolution: the third stage of a ResNet at 224 px
COPY_BYTES = 256 << 20
LAUNCHES = 500  # in a row: fewer than a GPU's queue holds, or waiting for room in it would be measured
JPEG_PIXELS = 224
_FAST_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


class Absent(Exception):
    """A figure that this machine doesn't have; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Something to time."""

    amount: float  # of operations, bytes, images or launches in one call
    call: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times calls, and makes works large enough to be timed."""

    settle: Callable[[], None] | None  # waits for the device
    call_s: float  # a call takes about so long, or a few times as long where sizes grow in steps

    def seconds(self, work: Workload) -> float:
        """Of one call, after another one."""
        work.call()
        return seconds(work.call, self.settle)

    def grow(self, make: Callable[[int], Workload], sizes: tuple[int, ...]) -> Workload:
        """The work of the first size that takes about long enough, or of the largest."""
        for size in sizes:
            work = make(size)
            if self.seconds(work) >= self.call_s / 2:
                break
        return work

    def repeat(self, work: Workload) -> Workload:
        """The same, as often in one call as it takes."""
        times = math.ceil(self.call_s / max(self.seconds(work), self.call_s / 1000))

        def call() -> None:
            for _ in range(times):
                work.call()

        return work if times == 1 else Workload(amount=work.amount * times, call=call)


def build_workloads(
    device: Device, resources: ExitStack, call_s: float, decode: Callable[[bytes], object]
) -> tuple[dict[str, Workload], dict[str, str]]:
    """Everything to time on this device, by the name of its figure, each warmed up; and why the rest is absent.
    Threads that a work needs live as long as `resources`."""
    clock = Clock(settle=synchronizer(device), call_s=call_s)
    found: dict[str, Workload] = {}
    absent: dict[str, str] = {}
    for name, build in _builders(device, resources, clock, decode).items():
        try:
            found[name] = clock.repeat(build())
        except Absent as reason:
            absent[name] = str(reason)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            # What torch raises for a dtype or an operator that a backend or an older release lacks.
            absent[name] = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return found, absent


def synchronizer(device: Device) -> Callable[[], None] | None:
    """Waits until the device has done all it was told; None: it never runs on its own time."""
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return partial(torch.cuda.synchronize, device.torch_name)
    return torch.mps.synchronize if device.type == "mps" else torch.accelerator.synchronize


def _builders(
    device: Device, resources: ExitStack, clock: Clock, decode: Callable[[bytes], object]
) -> dict[str, Callable[[], Workload]]:
    found: dict[str, Callable[[], Workload]] = {}
    for precision in PRECISIONS:
        found[f"matmul_flops.{precision}"] = partial(_matmul, device, precision, clock)
    for precision in PRECISIONS[:4]:  # torch convolves in these only
        found[f"conv_flops.{precision}"] = partial(_convolution, device, precision, clock)
    found["memory_bytes_per_s"] = partial(_copy, device)
    found["launch_s"] = partial(_launch, device, clock)
    if device.type == "cuda":
        found["host_to_device_bytes_per_s"] = partial(_host_to_device, device)
        found["graph_launch_s"] = partial(_graph_launch, device, clock)
        if torch.cuda.device_count() > 1:
            found["all_reduce_bytes_per_s"] = _all_reduce
    found["jpeg_images_per_s"] = partial(_jpeg, resources, decode)
    return found


# --- arithmetic ---------------------------------------------------------------------------------


def why_not(device: Device, precision: str) -> str | None:
    """None: this precision is worth measuring here. A slow emulation is no ceiling."""
    if precision == "float32" or precision in device.fast_dtypes:
        return None
    if precision == "int8" and (device.type == "cuda" or _cpu_multiplies_int8(device)):
        return None
    return "no fast hardware for it"


def _cpu_multiplies_int8(device: Device) -> bool:
    return device.type == "cpu" and not _FAST_INT8.isdisjoint(instruction_sets())


def _matmul(device: Device, precision: str, clock: Clock) -> Workload:
    """Of two square matrices; the second is stored by columns, as linear layers store weights and as the 8-bit
    operators demand."""
    if reason := why_not(device, precision):
        raise Absent(reason)
    make = partial(_matmul_of, device, precision)
    on_cpu = device.type == "cpu"
    return clock.grow(make, (512, 1024, 2048) if on_cpu else (2048, 4096, 8192))


def _matmul_of(device: Device, precision: str, n: int) -> Workload:
    left, right = (_random(device, (n, n), precision) for _ in range(2))
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
    """3x3, channels last, forward and both gradients: three times the operations of the forward pass."""
    if reason := why_not(device, precision):
        raise Absent(reason)
    make = partial(_convolution_of, device, precision)
    on_cpu = device.type == "cpu"
    return clock.grow(make, (1, 4, 16) if on_cpu else (512,))


def _convolution_of(device: Device, precision: str, batch: int) -> Workload:
    image = (batch, CHANNELS, PIXELS, PIXELS)
    inputs, weights, gradient = (
        _random(device, shape, precision).to(memory_format=torch.channels_last)
        for shape in (image, (CHANNELS, CHANNELS, 3, 3), image)
    )
    inputs.requires_grad_()
    weights.requires_grad_()

    def call() -> None:
        with torch.enable_grad():
            outputs = torch.nn.functional.conv2d(inputs, weights, padding=1)
            torch.autograd.grad(outputs, (inputs, weights), gradient)

    return Workload(amount=3 * 2.0 * batch * PIXELS**2 * CHANNELS**2 * 9, call=_in_precision(precision, call))


def _random(device: Device, shape: tuple[int, ...], precision: str) -> torch.Tensor:
    random = torch.Generator(device.torch_name).manual_seed(0)  # the user's random numbers stay as they are
    if precision == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device.torch_name, generator=random)
    dtype = torch.float32 if precision == "tfloat32" else getattr(torch, precision)
    return torch.randn(shape, device=device.torch_name, generator=random).to(dtype)


def _in_precision(precision: str, call: Callable[[], object]) -> Callable[[], object]:
    if precision not in ("float32", "tfloat32"):
        return call

    def exact() -> None:
        with set_fp32_precision("ieee" if precision == "float32" else "tf32"):
            call()

    return exact


def set_fp32_precision(what: str) -> AbstractContextManager[None]:
    """In full ("ieee") or in NVIDIA's "tf32" inside the block, whatever the user chose for the process."""
    switches = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    if what == "ieee":
        switches += [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]  # type: ignore[attr-defined]
    return set_attributes(switches, "fp32_precision", what)


# --- movement and launches ----------------------------------------------------------------------


def _copy(device: Device) -> Workload:
    """From memory to memory, several times as much as the caches hold; what is read and what is written count."""
    wanted = max(COPY_BYTES, 4 * _cache_bytes()) if device.type == "cpu" else 4 * COPY_BYTES
    room = available_memory_bytes(device)
    if room is not None and room < 4 * COPY_BYTES:
        raise Absent("too little free memory for a copy that no cache holds")
    source = _bytes(device.torch_name, wanted if room is None else min(wanted, room // 4))
    target = torch.empty_like(source)
    return Workload(amount=2.0 * source.nbytes, call=lambda: target.copy_(source))


def _cache_bytes(root: Path = Path("/")) -> int:
    """Of all last-level caches of the processor; 0: unknown."""
    found = {}
    for cache in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = re.fullmatch(r"(\d+)K", (cache / "size").read_text().strip())
            found[(cache / "shared_cpu_list").read_text()] = int(size[1]) << 10 if size else 0
        except OSError:
            continue
    return sum(found.values())


def _bytes(place: str, count: int) -> torch.Tensor:
    """Random ones, of which a block repeats: a page that was never written to isn't read from memory."""
    block = torch.randint(256, (16 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return block.to(place).repeat(max(1, count // block.nbytes))


def _host_to_device(device: Device) -> Workload:
    source = _bytes("cpu", COPY_BYTES).pin_memory()
    target = torch.empty_like(source, device=device.torch_name)
    return Workload(amount=float(source.nbytes), call=lambda: target.copy_(source, non_blocking=True))


def _all_reduce() -> Workload:
    """Sum over all GPUs that this process sees. The amount is the bytes that each holds, so that bytes over rate
    is the time that gradients of that size take."""
    from torch.cuda import nccl

    places = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    tensors = [torch.ones(COPY_BYTES // 4, device=place) for place in places]
    if not nccl.is_available(tensors):  # type: ignore[no-untyped-call]
        raise Absent("this torch was built without NCCL")

    def call() -> None:
        nccl.all_reduce(tensors)  # type: ignore[no-untyped-call]
        for place in places:
            torch.cuda.synchronize(place)

    return Workload(amount=float(COPY_BYTES), call=call)


def _launch(device: Device, clock: Clock) -> Workload:
    """One tiny operation after another, in a place: what each costs beside its arithmetic."""
    tiny = torch.ones(1, device=device.torch_name)

    return _launches(lambda: tiny.add_(1), clock)


def _graph_launch(device: Device, clock: Clock) -> Workload:
    """A CUDA graph of one tiny kernel, replayed again and again."""
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
    """Photos decoded by all cores."""
    each, threads = 16, cores()
    photo = synthetic_photo(JPEG_PIXELS)
    pool = resources.enter_context(ThreadPoolExecutor(threads))

    def decode_some(_: int) -> None:
        for _ in range(each):
            decode(photo)

    return Workload(amount=each * threads, call=lambda: list(pool.map(decode_some, range(threads))))


def synthetic_photo(pixels: int) -> bytes:
    """A square JPEG that costs as much to decode as a photo: smooth shapes in noisy colours."""
    random = np.random.default_rng(0)
    shapes = torch.from_numpy(random.random((1, 3, 14, 14), np.float32))
    smooth = torch.nn.functional.interpolate(shapes, size=(pixels, pixels), mode="bicubic")[0]
    noisy = smooth.permute(1, 2, 0).numpy() * 255 + random.normal(0, 6, (pixels, pixels, 3))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8)), quality=85))
