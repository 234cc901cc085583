"""Which of a detector's boxes are answers: non-maximum suppression in a graph of fixed shapes.

A box is left out where a better one of its class that isn't left out overlaps it. The usual way goes through the boxes
one by one; here all of them are decided at once, again and again, until nothing changes: after n rounds, the answer is
right for all boxes that depend on chains of at most n others. Source: Zheng et al., "Enhancing Geometric Factors in
Model Learning and Inference for Object Detection", arXiv:2005.03572 (cluster NMS).
"""

from __future__ import annotations

import torch

from suanli.tasks._detection_loss import TINY, area_of

ROUNDS = 8  # crowded images were seen to need 7
LOWEST = 1e-3  # the score from which a box is an answer at all
PER_ANSWER = 3  # candidates for each box that an answer may have
MOST_CANDIDATES = 1000  # unless an answer may have more boxes: memory grows with their square


def answers(boxes: torch.Tensor, logits: torch.Tensor, *, most: int, overlap: float) -> tuple[torch.Tensor, ...]:
    """From boxes (B, A, 4) and logits (B, A, K): how many there are (B, 1) int32, boxes (B, most, 4), scores (B, most)
    and classes (B, most) int32; the best first, zeros behind the last. A box may be an answer of several classes."""
    classes = logits.shape[2]
    count = min(max(most, min(PER_ANSWER * most, MOST_CANDIDATES)), logits.shape[1] * classes)
    best, places = logits.float().flatten(1).topk(count, dim=1)
    scores, labels = best.sigmoid(), places % classes
    corners = boxes.float().gather(1, (places // classes)[..., None].expand(-1, -1, 4))
    kept = keep(corners, labels, overlap)
    scores, order = torch.where(kept & (scores > LOWEST), scores, 0.0).topk(min(most, count), dim=1)
    found = scores > 0
    corners = torch.where(found[..., None], corners.gather(1, order[..., None].expand(-1, -1, 4)), 0.0)
    labels = torch.where(found, labels.gather(1, order), 0).int()
    if count < most:
        missing = most - count
        corners = torch.nn.functional.pad(corners, (0, 0, 0, missing))
        scores, labels = (torch.nn.functional.pad(values, (0, missing)) for values in (scores, labels))
    return found.sum(1, keepdim=True).int(), corners, scores, labels


def keep(corners: torch.Tensor, labels: torch.Tensor, overlap: float) -> torch.Tensor:
    """(B, N) bool: which boxes (B, N, 4) of these classes (B, N) stay, the best first.

    Without matrix products, in front of which OpenVINO would round coordinates to bfloat16.
    """
    count = corners.shape[1]
    left, top, right, bottom = corners.unbind(2)
    shared = _pair_spans(left, right) * _pair_spans(top, bottom)
    areas = overlap * (area_of(corners) + TINY)
    better = torch.ones(count, count, dtype=torch.bool, device=corners.device).tril(-1)
    same = labels[:, :, None] == labels[:, None, :]
    # The share of the union is above `overlap`, without computing the union.
    hides = (shared * (1 + overlap) > areas[:, :, None] + areas[:, None, :]) & same & better
    hidden_by = hides.to(corners.dtype)  # (B, N, N): of the row by the column
    kept = torch.ones_like(areas)
    for _ in range(ROUNDS):
        kept = 1 - (hidden_by * kept[:, None, :]).amax(2)
    return kept > 0.5


def _pair_spans(starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(B, N, N): how much of a side each two boxes share."""
    start = torch.maximum(starts[:, :, None], starts[:, None, :])
    span: torch.Tensor = (torch.minimum(ends[:, :, None], ends[:, None, :]) - start).clamp(min=0)
    return span
