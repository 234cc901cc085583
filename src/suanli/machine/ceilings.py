"""What a machine was measured to reach: the figures alone, so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from suanli.core.types import Json, Positive


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates that one process reaches on one device and its machine. None, or a precision that is missing: there
    is no such figure. Where there might be one, `absent` says why not, by the precision's or the figure's name."""

    device: str
    torch_name: str
    threads: int  # of operations on the CPU
    fingerprint: str
    time: str  # ISO 8601, UTC
    seconds: Positive  # that measuring took
    matmul_flops: dict[str, Positive]  # FLOP/s by precision; a multiplication and an addition are two
    conv_flops: dict[str, Positive]  # the same: 3x3, channels last, forward and both gradients
    absent: dict[str, str]
    memory_bytes_per_s: Positive | None  # read plus written, by a large copy on the device
    host_to_device_bytes_per_s: Positive | None  # from pinned memory
    all_reduce_bytes_per_s: Positive | None  # bytes that each device holds
    launch_s: Positive | None  # of a tiny operation, one after another
    graph_launch_s: Positive | None  # of replaying a CUDA graph of one tiny kernel
    jpeg_images_per_s: Positive | None  # 224 px, decoded by all cores
    disk_read_bytes_per_s: Positive | None  # of the cache directory's disk, in large blocks
    # Half the interquartile range over the median, by "matmul_flops.float32", "launch_s", …; None: too few rounds
    spread: dict[str, float | None]
    waiting: float | None  # share of their time that this process's threads were ready and had no core; None: unknown
    steady: bool

    def to_json(self) -> dict[str, Json]:
        return asdict(self)
