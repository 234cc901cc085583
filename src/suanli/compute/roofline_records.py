"""The layers of a model on the roofline: the figures alone, so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from suanli.core.types import Count, PositiveCount
from suanli.machine.ceilings import Ceilings

LISTED = 40  # layers in the file; the others are summed
OVERHEAD = 0.01  # of the time: below it, a container's own time is only the overhead of calling its layers
REST = "…"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One module in one forward pass, all its calls together, without the modules inside it."""

    name: str  # as in `named_modules`; "(model)" is the whole
    kind: str  # its class
    flops: Count
    bytes: Count | None  # moved at least; None: unknown, for operations of a container between its layers
    seconds: float  # median of some passes


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The layers of a model on one device, and what that device can do."""

    device: str
    dtype: str  # in which most operations are computed: "float32", "bfloat16"
    batch: PositiveCount
    layers: tuple[Layer, ...]
    ceilings: Ceilings | None = None  # None: not measured

    @property
    def flops_per_example(self) -> float:
        """Of the forward pass."""
        return sum(layer.flops for layer in self.layers) / self.batch

    def to_json(self) -> dict[str, object]:
        """The layers that take longest first; the others are summed under the name "…"."""
        overhead_s = OVERHEAD * sum(layer.seconds for layer in self.layers)
        ranked = sorted(self.layers, key=lambda layer: (-layer.seconds, layer.name))
        relevant = [x for x in ranked if x.bytes is not None or x.flops or x.seconds > overhead_s]
        listed, rest = relevant[:LISTED], [*relevant[LISTED:], *(layer for layer in ranked if layer not in relevant)]
        if rest:
            listed.append(_sum(rest))
        values = asdict(replace(self, layers=tuple(listed)))
        return values | {"flops_per_example": self.flops_per_example}


def _sum(layers: list[Layer]) -> Layer:
    known = [layer.bytes for layer in layers if layer.bytes is not None]
    return Layer(
        name=REST,
        kind=f"{len(layers)} more",
        flops=sum(layer.flops for layer in layers),
        bytes=sum(known) if known else None,
        seconds=sum(layer.seconds for layer in layers),
    )
