"""Object detection: a list of boxes with classes. What it answers and how that is scored is in `_detection.py`, how it
is learned in `_detection_loss.py`.

A network for it takes `classes` and returns three tensors for a batch of B images: boxes (B, A, 4), left, top, right
and bottom in px of the image as the network gets it; logits (B, A, classes); points (B, A, 3), x and y of the centre of
each of the A cells, and its stride in px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from suanli.core.schema import Tensors
from suanli.core.types import Json
from suanli.tasks import _detection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Detection(_detection.Detection):
    """How it learns, and its answers in the graph; settings are those of `_detection.Detection`."""

    has_counts: ClassVar[bool] = True
    learns_from: ClassVar[str] = "boxes"
    raw_names: ClassVar[tuple[str, ...]] = ("boxes", "logits")

    @property
    def model_args(self) -> dict[str, Json]:
        return {"classes": len(self.classes)}

    def loss(self, outputs: Any, targets: Tensors) -> Tensors:
        from suanli.tasks._detection_loss import losses

        return losses(outputs, targets)

    def counts(self, targets: Tensors) -> Tensors:
        """Both sums are divided by the number of boxes that count."""
        from suanli.tasks._detection_loss import count_boxes

        return dict.fromkeys(("class", "box"), count_boxes(targets))

    def guessing_loss(self) -> float:
        """A network that has learned nothing has a small loss, since few cells answer for each object, and it rises
        with their number: this is what all candidates of an object may cost, whose boxes don't overlap it."""
        from suanli.tasks._detection_loss import BOX_WEIGHT, CANDIDATES

        return BOX_WEIGHT * CANDIDATES

    def predict(self, outputs: Any) -> Tensors:
        from suanli.tasks._suppression import answers

        boxes, logits, _ = outputs
        return dict(zip(self.outputs, answers(boxes, logits, most=self.most, overlap=self.nms_iou), strict=True))

    def explained(self, outputs: Any) -> torch.Tensor:
        """The logit of the box with the highest score."""
        highest: torch.Tensor = outputs[1].flatten(1).amax(1)
        return highest


TASK = Detection
