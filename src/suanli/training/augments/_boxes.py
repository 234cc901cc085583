"""Boxes of a batch that move with their images: rows of left, top, right, bottom, class and flag, in px."""

from __future__ import annotations

from dataclasses import replace

import torch

from suanli.core.schema import LENGTHS
from suanli.core.types import Batch

NONE = -1.0  # the flag of a row that is no box


def rows_of(batch: Batch) -> torch.Tensor | None:
    """A copy (B, N, 6), in which rows beyond an image's own are flagged as none; None: the batch has no boxes."""
    rows = batch.targets.get("boxes")
    if rows is None:
        return None
    rows = rows.clone()
    beyond = torch.arange(rows.shape[1], device=rows.device) >= batch.targets[f"boxes{LENGTHS}"][:, None]
    rows[..., 5] = torch.where(beyond, NONE, rows[..., 5])
    return rows


def with_rows(batch: Batch, rows: torch.Tensor) -> Batch:
    """A copy with these rows (B, N, 6)."""
    lengths = torch.full((len(rows),), rows.shape[1], device=rows.device)
    return replace(batch, targets={**batch.targets, "boxes": rows, f"boxes{LENGTHS}": lengths})


def move(rows: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rows (…, N, 6) whose coordinates x and y are multiplied by `factor` and then shifted (…, 2)."""
    twice = [torch.cat([values, values], -1)[..., None, :] for values in (factor, shift)]
    corners = rows[..., :4] * twice[0] + twice[1]
    starts, ends = corners[..., :2], corners[..., 2:]
    return torch.cat([torch.minimum(starts, ends), torch.maximum(starts, ends), rows[..., 4:]], -1)


def cut(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, least: float) -> torch.Tensor:
    """Rows (…, N, 6) cut to what is visible, from `low` to `high` (…, 2) in px. Those of whose area less than the share
    `least` is left are none."""
    starts = torch.clamp(rows[..., :2], low[..., None, :], high[..., None, :])
    ends = torch.clamp(rows[..., 2:4], low[..., None, :], high[..., None, :])
    before, after = (rows[..., 2:4] - rows[..., :2]).prod(-1), (ends - starts).prod(-1)
    flags = torch.where(after > least * before, rows[..., 5], NONE)
    return torch.cat([starts, ends, rows[..., 4:5], flags[..., None]], -1)
