"""How fast a device computes in each precision: the few figures that tell which of them are worth trying.

Not every processor with instructions for bfloat16 gains by them: on one with AVX512_BF16 and no AMX, bfloat16 reached
137 GFLOP/s in convolutions and float32 236. So a matrix product and a convolution are timed in each precision, in turn.
That takes about two seconds, once for each machine and version of torch; the figures are cached beside the ceilings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from suanli.core.errors import StorageError
from suanli.core.storage import write_json
from suanli.core.types import Device, Positive
from suanli.machine import timing
from suanli.machine.microbenchmarks import ROUNDED, Workload, convolution, matmul, synchronizer, why_not
from suanli.machine.peak import fingerprint
from suanli.machine.switches import set_attributes

FIGURES = ("products", "convolutions")
PRECISIONS = ("float32", "tfloat32", "bfloat16", "float16", ROUNDED)
ROUNDS, BUDGET_S = 20, 1.0
SIZES = {"cpu": (768, 2)}  # rows of the matrices, pictures of the convolution; on a GPU as in the full probe
LARGE = (4096, 512)
WORTH_TRYING = 1.1  # times as fast as float32 in such a workload; a network gains less


@dataclass(frozen=True, kw_only=True)
class Precisions:
    """FLOP/s by precision; one that the device lacks is missing."""

    products: dict[str, Positive]
    convolutions: dict[str, Positive]

    def gain(self, precision: str, *, convolves: bool) -> float | None:
        """How many times as fast as float32 it is in the layers that take most of the time; None: unknown."""
        rates = self.convolutions if convolves else self.products
        return rates[precision] / rates["float32"] if precision in rates and "float32" in rates else None


def measure(device: Device, cache: Path | None) -> Precisions:
    """The rates of `device`: the cached ones, or else measured in about two seconds and cached below `cache`."""
    path = None if cache is None else cache / "probe" / f"precisions-{fingerprint(device)}.json"
    if path is not None:
        with suppress(OSError, ValueError):
            return TypeAdapter(Precisions).validate_json(path.read_bytes(), strict=True)
    rates = _measure(device)
    if path is not None:
        with suppress(StorageError):
            write_json(path, asdict(rates))
    return rates


def _measure(device: Device) -> Precisions:
    """By one thread: two wait for each other wherever another program takes a core, and the ratio is the same."""
    sizes = SIZES.get(device.type, LARGE)  # fixed: a size that is found by timing differs on a busy machine
    workloads: dict[tuple[str, str], Workload] = {}
    with set_attributes((torch.backends.cudnn,), "benchmark", True), _one_thread():
        for precision in PRECISIONS:
            if why_not(device, precision) is not None:
                continue
            for figure, make, size in zip(FIGURES, (matmul, convolution), sizes, strict=True):
                with suppress(RuntimeError, ValueError, TypeError, AttributeError):
                    work = make(device, precision, size)
                    work.call()
                    workloads[figure, precision] = work
        calls = {key: work.call for key, work in workloads.items()}
        times = timing.time_interleaved(calls, rounds=ROUNDS, budget_s=BUDGET_S, settle=synchronizer(device))
    # The best round of each: what else runs on the machine only takes time.
    rates = {key: workloads[key].amount / min(taken) for key, taken in times.items()}
    return Precisions(
        products={precision: rate for (figure, precision), rate in rates.items() if figure == "products"},
        convolutions={precision: rate for (figure, precision), rate in rates.items() if figure == "convolutions"},
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
