"""suanli (算力, computing power): data in, a trained, measured, optimised and served model out.

    import suanli

    run = suanli.run("digits")
    print(run.scores["accuracy"])
    suanli.predict(run, "images/*.png")

Every verb of the command line is a function here with the same arguments. They are imported on
first use, so that `import suanli` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from suanli.core.errors import DataError, Diverged, GateError, Interrupted, MachineError, SuanliError, UsageError

if TYPE_CHECKING:
    from suanli.compute.speed_up import speed_up
    from suanli.core.run import Run
    from suanli.engines.predictor import load
    from suanli.verbs.bench import bench
    from suanli.verbs.compare import compare
    from suanli.verbs.convert import convert
    from suanli.verbs.device import device
    from suanli.verbs.embed import embed
    from suanli.verbs.evaluate import evaluate
    from suanli.verbs.export import export
    from suanli.verbs.optimize import optimize
    from suanli.verbs.predict import predict
    from suanli.verbs.prepare import prepare
    from suanli.verbs.report import report
    from suanli.verbs.run import run
    from suanli.verbs.runs import runs
    from suanli.verbs.serve import serve
    from suanli.verbs.train import train

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "Diverged",
    "GateError",
    "Interrupted",
    "MachineError",
    "Run",
    "SuanliError",
    "UsageError",
    "bench",
    "compare",
    "convert",
    "device",
    "embed",
    "evaluate",
    "export",
    "load",
    "optimize",
    "predict",
    "prepare",
    "report",
    "run",
    "runs",
    "serve",
    "speed_up",
    "train",
]

_VERBS = {
    *("bench", "compare", "convert", "device", "embed", "evaluate", "export", "optimize", "predict", "prepare"),
    *("report", "run", "runs", "serve", "train"),
}


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(importlib.import_module(f"suanli.verbs.{name}"), name)
    if name == "speed_up":
        return importlib.import_module("suanli.compute.speed_up").speed_up
    if name == "load":
        return importlib.import_module("suanli.engines.predictor").load
    if name == "Run":
        return importlib.import_module("suanli.core.run").Run
    raise AttributeError(f"module 'suanli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
