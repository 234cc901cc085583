"""What a search for engines works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suanli.core.types import Task


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model or graph to build engines from, and the examples on which their answers are compared."""

    model: Path | None  # the model folder; None: there is only the graph
    graph: Path | None  # an ONNX graph that exists already; None: it is exported from the model
    task: Task
    classes: tuple[str, ...]
    rows: np.ndarray  # validation examples (N, *row_shape); random ones where there are no labels
    targets: np.ndarray | None  # (N,); None: there are no labels
    calibration: np.ndarray | None  # training examples (M, *row_shape)
    examples: int  # validation examples that there are; rows may be fewer
    groups: np.ndarray | None = None  # (N,), equal for examples of one group; None: all are independent
    trust_code: bool = False
