"""Networks that answer as several members at once: each of them learns every example, and their answers have a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def flatten_members(outputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Outputs (B, K), or (B, M, K) of M members, as (B M, K), with the target (B, …) of each, and M."""
    if outputs.ndim < 3:
        return outputs, target, 1
    members = outputs.shape[1]
    return outputs.flatten(0, 1), target.repeat_interleave(members, dim=0), members


def mean_of_members(answers: torch.Tensor) -> torch.Tensor:
    """(B, K) from (B, K), or from those of M members (B, M, K)."""
    return answers if answers.ndim < 3 else answers.mean(1)
