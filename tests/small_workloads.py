"""Once this is imported, the device's ceilings are measured with tiny workloads, whatever the processor."""

from __future__ import annotations

import math
from pathlib import Path

from suanli.data.decode import decode
from suanli.machine import device, disk, microbenchmarks, peak
from suanli.machine.ceilings import Ceilings

microbenchmarks.CHANNELS, microbenchmarks.COPY_BYTES, disk.FILE_BYTES = 16, 1 << 20, 1 << 23
microbenchmarks._cache_bytes = lambda: 0

CPU = device.detect("cpu")


def measure(cache: Path, **options: object) -> Ceilings:
    """However busy the machine is."""
    return peak.probe(CPU, cache, decode, **{"budget_s": 0.1, "widest": math.inf} | options)
