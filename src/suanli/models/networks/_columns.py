"""What the networks for tables share: numbers and categories as vectors.

A number becomes a piecewise-linear function of itself, by bins of the training rows: Gorishniy et al., "On Embeddings
for Numerical Features in Tabular Deep Learning", arXiv:2203.05556. Bins come from the quantiles that preprocessing
found, and are part of the network, so an exported graph takes the numbers as they are. A number beyond all that
training saw counts as the nearest, and a bin without a width is a step: no answer can explode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

LARGEST = 1e37  # differences of larger numbers don't fit into float32
TINY = 1e-6  # of a bin, in shares of the largest number of its column: float32 hardly tells its ends apart


class PiecewiseLinear(nn.Module):
    """Numbers (B, n), NaN where missing, to vectors (B, n, width)."""

    ends: torch.Tensor  # (2, n): the smallest and the largest number of training
    low: torch.Tensor  # (n, bins)
    scale: torch.Tensor  # (n, bins); 0 for bins without a width
    is_step: torch.Tensor  # (n, bins): they have none
    first_score: torch.Tensor
    score_steps: torch.Tensor  # (bins,)

    def __init__(self, quantiles: Sequence[Sequence[float]], bins: int, width: int) -> None:
        super().__init__()
        edges = _thin_out(torch.tensor(quantiles, dtype=torch.float64), bins).clamp(-LARGEST, LARGEST)
        count, bins = len(edges), edges.shape[1] - 1
        low, span = edges[:, :-1], edges.diff(dim=1)
        is_step = span <= TINY * edges.abs().amax(1, keepdim=True)
        self.register_buffer("ends", edges[:, [0, -1]].T.float().contiguous())
        self.register_buffer("low", low.float())
        self.register_buffer("scale", torch.where(is_step, 0.0, 1 / span).float())
        self.register_buffer("is_step", is_step)
        # About a normal score: where the middle of each bin lies among the training rows.
        scores = torch.special.ndtri(torch.linspace(0, 1, bins + 1, dtype=torch.float64).clamp(1 / 256, 1 - 1 / 256))
        self.register_buffer("first_score", scores[0].float())
        self.register_buffer("score_steps", scores.diff().float())
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.steps = nn.Parameter(torch.zeros(count, bins, width))  # the linear part alone, to begin with
        self.missing = nn.Parameter(torch.zeros(count, width))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        is_missing = numbers.isnan()
        known = torch.where(is_missing, 0.0, numbers)
        known = torch.minimum(torch.maximum(known, self.ends[0]), self.ends[1])[..., None]
        parts = ((known - self.low) * self.scale).clamp(0, 1)  # (B, n, bins)
        parts = torch.where(self.is_step & (known > self.low), 1.0, parts)
        score = parts @ self.score_steps  # (B, n), from the first one on
        offset = self.first_score * self.weight + self.bias
        vectors = torch.einsum("bnt,ntd->bnd", parts, self.steps) + score[..., None] * self.weight + offset
        return torch.where(is_missing[..., None], self.missing, vectors)


def _thin_out(quantiles: torch.Tensor, bins: int) -> torch.Tensor:
    """(n, bins + 1) of quantiles (n, K + 1), evenly."""
    bins = min(bins, quantiles.shape[1] - 1)
    places = torch.linspace(0, quantiles.shape[1] - 1, bins + 1).round().long()
    return quantiles[:, places]


class Categories(nn.Module):
    """Codes (B, m) to vectors (B, m, width), each column with its own."""

    starts: torch.Tensor  # (m,): of each column in the table of all

    def __init__(self, cardinalities: Sequence[int], width: int) -> None:
        super().__init__()
        starts = torch.tensor([0, *cardinalities[:-1]]).cumsum(0)
        self.register_buffer("starts", starts)
        self.vectors = nn.Embedding(sum(cardinalities), width)
        nn.init.normal_(self.vectors.weight, std=width**-0.5)
        with torch.no_grad():
            self.vectors.weight[starts] = 0.0  # of values that training doesn't have

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.vectors(codes + self.starts)
        return vectors


class ColumnVectors(nn.Module):
    """Numbers and categories, where there are such, to (B, `length`)."""

    def __init__(
        self, numbers: int, cardinalities: Sequence[int], quantiles: Sequence[Sequence[float]], *, bins: int, width: int
    ) -> None:
        super().__init__()
        self.numbers = PiecewiseLinear(quantiles, bins, width) if numbers else None
        self.categories = Categories(cardinalities, width) if cardinalities else None
        self.length = width * (numbers + len(cardinalities))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        parts = [part for part in (self.numbers, self.categories) if part is not None]
        return torch.cat([part(x).flatten(1) for part, x in zip(parts, inputs, strict=True)], 1)
