"""run: data in, a trained, evaluated and reported model out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from suanli.rundir import Run, is_run
from suanli.verbs.evaluate import evaluate
from suanli.verbs.report import report
from suanli.verbs.train import FINISHED, train

P = ParamSpec("P")


def _with_arguments_of(other: Callable[P, Run]) -> Callable[[Callable[..., Run]], Callable[P, Run]]:
    """For people, type checkers and `inspect`: the same arguments, stated once."""

    def decorate(function: Callable[..., Run]) -> Callable[P, Run]:
        function.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return function

    return decorate


def _untrained(data: Any, options: Mapping[str, Any]) -> bool:
    """Whether there is anything to train: not where only the exam or the report of a run was cut short."""
    if not is_run(data) or options.get("more_epochs") is not None:
        return True
    return Run.open(data).summary.get("status") not in FINISHED


@_with_arguments_of(train)
def run(data: Any, **options: Any) -> Run:
    """Prepare, train, evaluate on the test split and report, in one go. Arguments as for `train`."""
    made = train(data, **options) if _untrained(data, options) else Run.open(data)
    # The code of a user's model has run in this process already.
    exam = evaluate(made, device=options.get("device", "auto"), trust_code=True)
    summary = made.summary
    made.write("summary.json", summary | {"seconds": summary["seconds"] | {"evaluate": exam.seconds}})
    report(made)
    return made
