"""Object detection: boxes with classes, as `_detection.py` has it.

How it is learned isn't here yet: data can be prepared and answers scored, and a training is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from suanli.core.errors import UsageError
from suanli.core.schema import Tensors
from suanli.core.types import Json
from suanli.tasks import _detection


@dataclass(frozen=True, kw_only=True)
class Detection(_detection.Detection):
    @property
    def model_args(self) -> dict[str, Json]:
        return {"classes": len(self.classes)}

    def loss(self, outputs: Any, targets: Tensors) -> Tensors:  # noqa: ARG002
        _refuse()

    def guessing_loss(self) -> float:
        _refuse()

    def predict(self, outputs: Any) -> Tensors:  # noqa: ARG002
        _refuse()


def _refuse() -> NoReturn:
    raise UsageError("suanli has no network that learns boxes yet.", fix="suanli prepare shows what is in the data.")


TASK = Detection
