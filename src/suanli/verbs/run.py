"""run: data in, a trained, evaluated and reported model out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from suanli.core.console import say
from suanli.core.errors import Interrupted
from suanli.core.run import FINISHED, Run, is_run
from suanli.parallel import group
from suanli.training.prepare import DataOptions, move_data
from suanli.verbs._folds import parse_folds
from suanli.verbs.evaluate import evaluate
from suanli.verbs.report import report
from suanli.verbs.train import train

P = ParamSpec("P")


def _take_arguments_of(other: Callable[P, Run]) -> Callable[[Callable[..., Run]], Callable[P, Run]]:
    """Gives a function the signature of `other`, for people, type checkers and `inspect`."""

    def decorate(function: Callable[..., Run]) -> Callable[P, Run]:
        function.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return function

    return decorate


def _needs_no_training(data: Any, options: Mapping[str, Any]) -> bool:
    """Whether `data` is a finished run and no option is about training: then it is only evaluated and reported."""
    if not is_run(data) or Run.open(data).summary.get("status") not in FINISHED:
        return False
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    given = {name for name, value in options.items() if value not in (defaults[name], {}, ())}
    return given <= {"device", "data_dir", "cache_dir", "moved_to", "trust_code"}


@_take_arguments_of(train)
def run(data: Any, **options: Any) -> Run:
    """Prepare, train, evaluate on the test split and report, in one go. Arguments as for `train`."""
    folds = options.pop("folds", None)
    if folds is not None:
        parse_folds(folds)  # before any work is done
    if _needs_no_training(data, options):
        trained, trust_code = Run.open(data), options.get("trust_code", False)
        if (moved_to := options.get("moved_to")) is not None:
            folders = {name: options.get(name) for name in ("data_dir", "cache_dir")}
            with trained.lock():
                move_data(trained, DataOptions.of_run(trained, subject=moved_to, **folders), verb="run")
    else:
        try:
            trained, trust_code = train(data, **options), True  # its code has just run here
        except Interrupted as error:  # `run` goes on to the report
            raise Interrupted(error.message, fix=error.fix.replace("suanli train", "suanli run")) from error
        if not group.current_group().is_first:
            return trained
    places = {"device": options.get("device", "auto"), "cache_dir": options.get("cache_dir")}
    try:
        evaluation = evaluate(trained, **places, trust_code=trust_code)
        if folds is not None:
            evaluate(trained, **places, folds=folds, trust_code=trust_code)
        for one in evaluation.baselines:
            say(one.describe(evaluation.as_metric()))
        summary = trained.summary
        trained.write("summary.json", summary | {"seconds": summary["seconds"] | {"evaluate": evaluation.seconds}})
        report(trained)
    except KeyboardInterrupt as error:
        raise Interrupted(
            "Stopped; the trained model is kept.", fix=f"Go on with: suanli run {trained.path}"
        ) from error
    return trained
