"""The record of what a machine was measured to reach, in a file of its own, so that reading it needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from suanli.core.types import Positive


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates that one process reaches on one device and its machine. A figure that is None, or a precision that is
    missing, could not be measured; `absent` has the reasons."""

    device: str
    torch_name: str
    threads: int  # that an operation on the CPU uses
    fingerprint: str
    time: str  # ISO 8601, UTC
    seconds: Positive  # spent on measuring
    matmul_flops: dict[str, Positive]  # FLOP/s by precision; a multiply-add counts as two
    conv_flops: dict[str, Positive]  # the same, for 3x3, channels last, forward and both gradients
    absent: dict[str, str]  # the reason, by the name of a figure or precision
    memory_bytes_per_s: Positive | None  # read plus written, by a large copy on the device
    host_to_device_bytes_per_s: Positive | None  # from pinned memory
    all_reduce_bytes_per_s: Positive | None  # bytes that each device holds
    launch_s: Positive | None  # of a tiny operation, many in a row
    graph_launch_s: Positive | None  # of replaying a CUDA graph of one tiny kernel
    jpeg_images_per_s: Positive | None  # 224 px, decoded by all cores
    disk_read_bytes_per_s: Positive | None  # from the disk of the cache directory, in large blocks
    # Half the interquartile range over the median, by "matmul_flops.float32", "launch_s", …; None: too few rounds
    spread: dict[str, float | None]
    waiting: float | None  # share of the time that threads of this process waited for a core; None: unknown
    steady: bool  # every spread is known and small, and so is `waiting`

    def to_json(self) -> dict[str, object]:
        return asdict(self)
