"""run: data in, a trained, evaluated and reported model out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

from suanli.rundir import Run
from suanli.verbs.evaluate import evaluate
from suanli.verbs.report import report
from suanli.verbs.train import train

P = ParamSpec("P")


def _with_arguments_of(other: Callable[P, Run]) -> Callable[[Callable[..., Run]], Callable[P, Run]]:
    """For people, type checkers and `inspect`: the same arguments, stated once."""

    def decorate(function: Callable[..., Run]) -> Callable[P, Run]:
        function.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_arguments_of(train)
def run(data: Any, **options: Any) -> Run:
    """Prepare, train, evaluate on the test split and report, in one go. Arguments as for `train`."""
    made = train(data, **options)
    exam = evaluate(made, device=options.get("device", "auto"))
    summary = made.summary
    made.write("summary.json", summary | {"seconds": summary["seconds"] | {"evaluate": exam.seconds}})
    report(made)
    return made
