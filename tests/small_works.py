"""Once this is imported, ceilings are measured by works of a moment, whatever this processor has."""

from __future__ import annotations

import math
from pathlib import Path

from suanli import ceilings, disk, hardware, probe

ceilings.CHANNELS, ceilings.COPY_BYTES, disk.FILE_BYTES = 16, 1 << 20, 1 << 23
ceilings._cache_bytes = lambda: 0

CPU = hardware.detect("cpu")


def measure(cache: Path, **options: object) -> probe.Ceilings:
    """The machine may be as busy as it likes."""
    return probe.probe(CPU, cache, **{"budget_s": 0.1, "widest": math.inf} | options)
