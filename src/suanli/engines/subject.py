"""What a search for engines works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from suanli.core.schema import Stored
from suanli.core.task import Task
from suanli.engines.examples import Examples

Origin: TypeAlias = Literal["labelled", "unlabelled", "made up"]  # real inputs, with or without targets; random ones


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model or graph to build engines from, and the examples on which their answers are compared."""

    model: Path | None  # the model folder; None: there is only the graph
    graph: Path | None  # an ONNX graph that exists already; None: it is exported from the model
    task: Task
    examples: Examples  # N, by the model's inputs, in random order: any first part is a fair sample
    origin: Origin
    count: int  # of examples that there are; `examples` may be fewer
    calibration: Examples | None  # inputs that no answer is compared on, for int8
    targets: Mapping[str, Stored] | None = None  # of the N examples; where `origin` is "labelled"
    groups: np.ndarray | None = None  # (N,), equal for examples of one group; None: all are independent
    trust_code: bool = False
