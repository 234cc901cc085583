"""Which plans enter a race: the combinations of the speedups whose gains depend on each other.

Those that promise most come first, so that a short race has the likely winners. What a precision promises is its rate
on this device, which is measured once for each machine; a precision that is much slower than float32 enters no race.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import nn

from suanli.compute.plan import sort_speedups
from suanli.core.types import Device, Speedup
from suanli.machine import precisions

Combination: TypeAlias = tuple[str, ...]  # names of speedups, in the order in which they are applied

LIKELY = 1.1  # times as fast that a raced speedup without a rate is expected to be
WORTH_USING = 1.1  # a precision enters the short list only from this gain on, a network gains less than a convolution
WORTH_TRYING = 0.8  # a precision that is slower than this isn't tried
MOST = 16


def expected_gains(
    speedups: Mapping[str, Speedup], model: nn.Module, device: Device, cache: Path | None
) -> dict[str, float]:
    """How many times as fast each precision is expected to be, by name of its speedup. Measures the device where that
    was never done."""
    by_rate = {name: speedup.rate for name, speedup in speedups.items() if speedup.rate is not None}
    if not by_rate:
        return {}
    rates = precisions.measure(device, cache)
    convolves = any(p.dim() == 4 for p in model.parameters())
    gains = {name: rates.gain(rate, convolves=convolves) for name, rate in by_rate.items()}
    return {name: gain for name, gain in gains.items() if gain is not None}


def combinations(
    base: Combination, speedups: Mapping[str, Speedup], gains: Mapping[str, float], known: Iterable[Combination] = ()
) -> list[Combination]:
    """`base` with every combination of the raced speedups, at most MOST, then plain PyTorch. Those in `known`, which
    were the best for similar trainings, come first, then by what they promise."""
    groups: dict[str, list[str]] = {}
    for name, speedup in speedups.items():
        if speedup.raced and speedup.switchable:
            groups.setdefault(speedup.group or name, []).append(name)
    chosen = itertools.product(*(("", *names) for names in groups.values()))
    found = [sort_speedups([*base, *filter(None, names)]) for names in chosen]
    likely = [names for names in known if names in found]
    found.sort(key=lambda names: (names not in likely, -promise(names, speedups, gains)))
    return list(dict.fromkeys([*found[: MOST - 1], ()]))


def promise(names: Combination, speedups: Mapping[str, Speedup], gains: Mapping[str, float]) -> float:
    """How many times as fast as plain PyTorch these are expected to be together."""
    raced = [name for name in names if name in speedups and speedups[name].raced]
    return math.prod(gains.get(name, LIKELY) for name in raced)


def cost(field: Sequence[Combination], speedups: Mapping[str, Speedup], gains: Mapping[str, float]) -> float:
    """What a race of these costs, in steps of plain PyTorch: a step to warm up and one that is timed of each, then
    some more of the best."""
    return sum(2 / promise(names, speedups, gains) for names in field) + 8
