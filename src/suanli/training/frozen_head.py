"""The head of a network that was fitted to features of the frozen backbone: a record that a run keeps."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from suanli.core.errors import DamagedFile
from suanli.core.run import Run
from suanli.core.storage import read_json
from suanli.core.task import Task
from suanli.core.types import Json
from suanli.models.model_folder import build_task

FILE = "frozen.json"  # of a run


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How the head was fitted."""

    seconds: float  # of features and fits
    images: int  # of the training split
    views: int  # of each
    features: int
    images_per_s: float | None  # None: the features were in the cache
    way: str | None  # of computing them
    tried: Mapping[str, float]  # images/s by way
    penalty: float


@dataclass(frozen=True, kw_only=True)
class FrozenHead:
    tensors: Mapping[str, torch.Tensor]  # by the network's names, on the CPU
    scores: Mapping[str, float]  # on validation; empty: there are no examples
    wrong: int  # validation examples whose answer isn't right
    task_settings: Mapping[str, Json]  # of the task, calibrated for this head
    figures: Figures
    kept: bool = True  # it is the head of the run's model

    def calibrate(self, task: Task) -> Task:
        """The task with what was chosen for this head, such as a threshold."""
        return build_task(task.name, task.classes, self.task_settings)

    def load_into(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                state[name].copy_(tensor)

    def describe(self) -> dict[str, Json]:
        """For summary.json."""
        return {"scores": dict(self.scores), "wrong": self.wrong, "kept": self.kept, **asdict(self.figures)}

    def to_json(self) -> dict[str, Json]:
        """All of it but `kept`: `from_json` makes an equal head of it."""
        return {
            "scores": dict(self.scores),
            "wrong": self.wrong,
            "task_settings": dict(self.task_settings),
            "figures": asdict(self.figures),
            "safetensors": base64.b64encode(save(dict(self.tensors))).decode(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Json], *, kept: bool = True) -> Self:
        """Raises KeyError, TypeError, ValueError and SafetensorError."""
        rest = dict(values)
        tensors = load(base64.b64decode(rest.pop("safetensors")))
        return cls(tensors=tensors, figures=Figures(**rest.pop("figures")), kept=kept, **rest)

    @classmethod
    def of_run(cls, run: Run) -> Self | None:
        """None: it has none. Raises DamagedFile."""
        path = run.path / FILE
        if not path.exists():
            return None
        kept = (run.summary.get("frozen") or {}).get("kept", True)
        try:
            return cls.from_json(read_json(path), kept=kept)
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise DamagedFile(f"{path} is damaged ({error}).", fix="Restore it, or train again.") from error
