"""How a detector learns: which cells answer for which object, and what their answers cost.

An object takes the cells whose answers suit it best: by their class score, the overlap of their box, and their distance
from its middle. How many it takes follows from the overlaps. Such a cell should give its box, and the overlap as the
score of the class; all others should give no score. Sources: Lyu et al., "RTMDet", arXiv:2212.07784 (the cost), after
Ge et al., "YOLOX", arXiv:2107.08430 (how many cells); Li et al., "Generalized Focal Loss", arXiv:2006.04388 (quality
focal loss); Rezatofighi et al., "Generalized Intersection over Union", arXiv:1902.09630.

Shapes: B images, N boxes of an image, A cells, K classes. Coordinates are px of the model's image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from suanli.core.schema import LENGTHS, Tensors

BOX_WEIGHT = 2.0  # of the loss of boxes against that of scores
OVERLAP_WEIGHT = 3.0  # of the cost
CANDIDATES = 13  # cells whose overlaps say how many an object takes, at most
NEAR_STRIDES = 1.5  # an object may take cells so near to its middle, even where it is smaller than a cell
FREE_STRIDES = 3.0  # from here on, the distance from the middle costs more than a wrong class
CHUNK = 1 << 24  # pairs of a box and a cell that are compared at a time: about 1 GB
TINY = 1e-7


class Assigned(NamedTuple):
    """By cell (B, A)."""

    box: torch.Tensor  # int64: which box of the image it answers for; 0 where it answers for none
    overlap: torch.Tensor  # of its answer with that box; 0 where it answers for none
    ignored: torch.Tensor  # bool: it answers for none, and lies in a box that doesn't count


def count_boxes(targets: Tensors) -> torch.Tensor:
    """Of the boxes of a batch that count."""
    return (_flags(targets) == 0).sum()


def losses(outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], targets: Tensors) -> dict[str, torch.Tensor]:
    """Sums over a batch, from boxes (B, A, 4), logits (B, A, K) and points (B, A, 3)."""
    boxes, logits, points = (output.float() for output in outputs)
    rows, flags = targets["boxes"].float(), _flags(targets)
    assigned = assign(boxes.detach(), logits.detach(), points, rows, flags)
    truth = rows.gather(1, assigned.box[..., None].expand(-1, -1, rows.shape[2])) if rows.shape[1] else None
    scores = torch.zeros_like(logits)
    if truth is None:
        box_loss = boxes.sum() * 0
    else:
        scores.scatter_(2, truth[..., 4:5].long(), assigned.overlap[..., None])
        box_loss = (assigned.overlap * (1 - generalized_overlap(boxes, truth[..., :4]))).sum()
    class_loss = quality_focal_loss(logits, scores).sum(2)
    class_loss = torch.where(assigned.ignored, 0.0, class_loss).sum()
    return {"class": class_loss, "box": BOX_WEIGHT * box_loss}


def _flags(targets: Tensors) -> torch.Tensor:
    """(B, N): 0 counts, 1 crowd, 2 difficult, -1 no box."""
    rows = targets["boxes"]
    beyond = torch.arange(rows.shape[1], device=rows.device) >= targets[f"boxes{LENGTHS}"][:, None]
    return torch.where(beyond, -1.0, rows[..., 5])


def quality_focal_loss(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with soft targets, weighted by the squared error of the score. As the logits' shape."""
    weight = (scores - logits.sigmoid()).square()
    return weight * F.binary_cross_entropy_with_logits(logits, scores, reduction="none")


def generalized_overlap(boxes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(…, 4) and (…, 4) to (…): the intersection over the union, less the share of the smallest box around both that
    neither covers."""
    shared, union = _intersect(boxes, truth)
    around = (torch.max(boxes[..., 2:], truth[..., 2:]) - torch.min(boxes[..., :2], truth[..., :2])).clamp(min=0)
    whole = around[..., 0] * around[..., 1]
    return shared / (union + TINY) - (whole - union) / (whole + TINY)


def _intersect(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The areas of intersection and union."""
    ends = torch.min(boxes[..., 2:], others[..., 2:]) - torch.max(boxes[..., :2], others[..., :2])
    ends = ends.clamp(min=0)
    shared = ends[..., 0] * ends[..., 1]
    return shared, area_of(boxes) + area_of(others) - shared


def area_of(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@torch.no_grad()
def assign(
    boxes: torch.Tensor, logits: torch.Tensor, points: torch.Tensor, rows: torch.Tensor, flags: torch.Tensor
) -> Assigned:
    """Of boxes (B, A, 4), logits (B, A, K), points (B, A, 3), targets (B, N, 6) with these flags (B, N)."""
    count, cells = boxes.shape[:2]
    if not rows.shape[1]:
        none = boxes.new_zeros(count, cells)
        return Assigned(none.long(), none, none.bool())
    images = max(1, CHUNK // (cells * rows.shape[1]))  # at a time
    parts = [
        _assign(*(tensor[start : start + images] for tensor in (boxes, logits, points, rows, flags)))
        for start in range(0, count, images)
    ]
    return Assigned(*map(torch.cat, zip(*parts, strict=True)))


def _assign(
    boxes: torch.Tensor, logits: torch.Tensor, points: torch.Tensor, rows: torch.Tensor, flags: torch.Tensor
) -> Assigned:
    """All pairs are (B, N, A)."""
    corners, counts = rows[..., :4], flags == 0
    inside = _inside(points, corners)
    offset = points[:, None, :, :2] - (corners[..., :2] + corners[..., 2:])[:, :, None] / 2
    distance = offset.square().sum(-1).sqrt() / points[:, None, :, 2]  # in strides
    allowed = (inside | (distance < NEAR_STRIDES)) & counts[..., None]

    shared, union = _intersect(boxes[:, None], corners[:, :, None])
    overlap = torch.where(allowed, shared / (union + TINY), 0.0)
    # What the scores would cost, were the cell to answer for the box: its class with the overlap as score, and the
    # other classes with none.
    without = quality_focal_loss(logits, torch.zeros_like(logits))
    labels = rows[..., 4].long()
    own, own_without = (_pick_classes(values, labels) for values in (logits, without))
    cost = without.sum(2)[:, None] - own_without + quality_focal_loss(own, overlap)
    cost = cost - OVERLAP_WEIGHT * (overlap + TINY).log() + 10 ** (distance - FREE_STRIDES)
    cost = torch.where(allowed, cost, torch.inf)

    most = min(CANDIDATES, cost.shape[2])
    wanted = overlap.topk(most, dim=2).values.sum(2).long().clamp(min=1)
    cheapest = cost.topk(most, dim=2, largest=False)
    taken = torch.arange(most, device=cost.device) < wanted[..., None]
    taken &= cheapest.values.isfinite()
    takes = torch.zeros_like(allowed).scatter_(2, cheapest.indices, taken)
    cost = torch.where(takes, cost, torch.inf)
    best = cost.min(1)  # of several objects that want a cell, the one that it suits best gets it
    answers = best.values.isfinite()
    share = overlap.gather(1, best.indices[:, None])[:, 0]
    ignored = (inside & (flags > 0)[..., None]).any(1) & ~answers
    return Assigned(torch.where(answers, best.indices, 0), torch.where(answers, share, 0.0), ignored)


def _inside(points: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """(B, N, A): whether the centre of a cell lies in a box."""
    centres = points[:, None, :, :2]
    return ((centres > corners[:, :, None, :2]) & (centres < corners[:, :, None, 2:])).all(-1)


def _pick_classes(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, A, K) and the classes of the boxes (B, N) to (B, N, A)."""
    return values.transpose(1, 2).gather(1, labels[..., None].expand(-1, -1, values.shape[1]))
