"""A network for tables that answers as 32 members at once, which share nearly all weights.

Each member multiplies the vector of a row by signs of its own before the first layer, and has an output layer of its
own; between them all use the same layers. So it costs a little more than one network and is as good as an ensemble.
Source: Gorishniy et al., "TabM: Advancing Tabular Deep Learning with Parameter-Efficient Ensembling", arXiv:2410.24210
(its variant TabM-mini).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from suanli.core.errors import UsageError
from suanli.core.types import Model
from suanli.models.networks._columns import ColumnVectors


class MemberLinear(nn.Module):
    """Vectors of M members (B, M, in) to (B, M, out), with weights of each member's own."""

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_features).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = (x.transpose(0, 1) @ self.weight).transpose(0, 1) + self.bias
        return answers


class TabM(nn.Module):
    """Numbers (B, n) and codes (B, m), where there are such, to the answers of M members (B, M, K)."""

    def __init__(
        self, columns: ColumnVectors, *, classes: int, members: int, depth: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.columns = columns
        signs = torch.randint(2, (members, columns.length)).float() * 2 - 1
        self.signs = nn.Parameter(signs)
        layers: list[nn.Module] = []
        for before in (columns.length, *[width] * (depth - 1)):
            layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.head = MemberLinear(members, width, classes)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        rows = self.columns(*inputs)
        answers: torch.Tensor = self.head(self.layers(rows[:, None] * self.signs))
        return answers


def build(
    *,
    classes: int,
    numbers: int,
    cardinalities: Sequence[int],
    quantiles: Sequence[Sequence[float]],
    members: int = 32,
    depth: int = 2,
    width: int = 512,
    dropout: float = 0.1,
    bins: int = 48,
    embedding: int = 16,
) -> TabM:
    """`width` of `depth` layers; `embedding`: of each column's vector, from `bins` of its values. Raises UsageError."""
    if min(classes, members, depth, width, bins, embedding) < 1:
        raise UsageError(
            "tabm has a size below 1.", fix="Give members, depth, width, bins and embedding of at least 1."
        )
    columns = ColumnVectors(numbers, cardinalities, quantiles, bins=bins, width=embedding)
    return TabM(columns, classes=classes, members=members, depth=depth, width=width, dropout=dropout)


MODEL = Model(name="tabm", kinds=("table",), build=build, head="head", source="arXiv:2410.24210")
