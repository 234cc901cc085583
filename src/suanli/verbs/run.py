"""run: data in, a trained, evaluated and reported model out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from suanli.core.run import FINISHED, Run, is_run
from suanli.parallel import group
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


def _trained(data: Any, options: Mapping[str, Any]) -> bool:
    """Whether `data` is a finished run and nothing more is asked of its training: then only its exam
    and its report are due."""
    if not is_run(data) or Run.open(data).summary.get("status") not in FINISHED:
        return False
    usual = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    asked = {name for name, value in options.items() if value not in (usual[name], {})}
    return asked <= {"device", "cache_dir", "trust_code"}


@_with_arguments_of(train)
def run(data: Any, **options: Any) -> Run:
    """Prepare, train, evaluate on the test split and report, in one go. Arguments as for `train`."""
    if _trained(data, options):
        made, trust = Run.open(data), options.get("trust_code", False)
    else:
        made, trust = train(data, **options), True  # its code has just run here
        if not group.current_group().is_first:
            return made
    exam = evaluate(made, device=options.get("device", "auto"), cache_dir=options.get("cache_dir"), trust_code=trust)
    summary = made.summary
    made.write("summary.json", summary | {"seconds": summary["seconds"] | {"evaluate": exam.seconds}})
    report(made)
    return made
