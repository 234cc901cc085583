"""What there is to say of a run in one line, for lists of many: of each file only what is needed is looked at.

Nothing here fails because of a run: one with damaged files is "broken", with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from suanli.core import registry
from suanli.core.errors import DamagedFile, SuanliError
from suanli.core.run import FINISHED, Run
from suanli.core.storage import read_json
from suanli.core.task import format_score
from suanli.core.types import Json
from suanli.reporting.parse_record import parse_record
from suanli.reporting.records import Data, Environment, Evaluation, FrozenFeatures, Summary
from suanli.reporting.words import FRACTION

State = Literal["finished", "running", "interrupted", "diverged", "broken"]
DEPTH = 3  # folders below one that is searched for runs
PARTS = ("data.json", "environment.json", "summary.json", "metrics.jsonl")  # of a run, where its recipe is missing
HEAVY = ("mistakes", "samples", "confusion", "per_class")  # of an evaluation, which only the report needs


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """What isn't known is None."""

    path: Path
    state: State
    problem: str | None = None  # why it is broken
    resumable: bool = False  # `suanli train PATH` goes on with it
    is_bench: bool = False  # it measures speed and trains nothing
    data: str | None = None
    task: str | None = None
    model: str | None = None
    metric: str | None = None
    score: float | None = None
    interval: tuple[float, float] | None = None  # 95 %
    unit: str | None = None
    higher_is_better: bool = True
    split: str | None = None  # of the score: "test", or "val" where test isn't evaluated
    contaminated: bool = False  # the weights that training started from may have seen the examples
    train_seconds: float | None = None
    epochs: float | None = None
    frozen_score: float | None = None  # on validation, of the head on frozen features, before all layers were trained
    frozen: bool = False  # the model is the one with that head
    started: str | None = None  # ISO 8601, UTC
    engines: bool = False  # `optimize` has made some

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def __repr__(self) -> str:
        known = [text for text in (self.data, self.model, self.state) if text]
        if self.score is not None and self.metric and self.unit is not None:
            known.append(f"{self.split} {self.metric} {format_score(self.score, self.unit)}")
        return f"RunOverview({', '.join([repr(str(self.path)), *known])})"

    def to_json(self) -> dict[str, Json]:
        return {"run": str(self.path), "name": self.name, **asdict(self), "path": str(self.path)}


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The runs among these folders and at most three levels below them, each once, in order."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in _search(folder, DEPTH):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _search(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if "recipe.json" in names or len(names.intersection(PARTS)) > 1:
        yield folder
    elif depth:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _search(folder / entry.name, depth - 1)


def read_overview(path: Path) -> RunOverview:
    """Reads as much as it can."""
    try:
        return _read(path)
    except (SuanliError, OSError) as error:
        message = error.message if isinstance(error, SuanliError) else error.strerror or str(error)
        return RunOverview(path=path, state="broken", problem=message)


def _read(path: Path) -> RunOverview:
    run = Run.open(path)
    recipe = _object(path / "recipe.json")
    summary, data = _record(Summary, path / "summary.json"), _record(Data, path / "data.json")
    environment = _record(Environment, path / "environment.json")
    trained = (path / "model" / "model.json").is_file()
    is_bench = not trained and any((path / name).is_file() for name in ("bench.json", "scaling.json"))
    state, problem = ("finished", None) if is_bench else _state(run, summary and summary.status, trained)
    task = _text(recipe.get("task")) or "classification"  # older versions had no other
    return RunOverview(
        path=path,
        state=state,
        problem=problem,
        resumable=state == "interrupted" and data is not None,
        is_bench=is_bench,
        data=data.name if data else None,
        task=task,
        model=_text(recipe.get("model")),
        **_score(path, task),
        train_seconds=summary.seconds.get("train") if summary else None,
        epochs=summary.epochs if summary else None,
        frozen_score=_frozen_score(summary and summary.frozen, task),
        frozen=bool(summary and summary.frozen and summary.frozen.kept),
        started=environment.time if environment else None,
        engines=(path / "model" / "engines" / "engines.json").is_file(),
    )


def _state(run: Run, status: str | None, trained: bool) -> tuple[State, str | None]:
    if status in FINISHED:
        return ("finished", None) if trained else ("broken", f"{run.model_path} is missing.")
    if status == "diverged":
        return "diverged", None
    return ("running" if run.is_being_written() else "interrupted"), None


def _score(path: Path, task: str) -> dict[str, Any]:
    """The primary score of the test split; of validation, and so named, while test isn't evaluated."""
    for split in ("test", "val"):
        if (values := _object(path / "evaluation" / f"{split}.json")) and (
            found := parse_record(Evaluation, {k: v for k, v in values.items() if k not in HEAVY}, split)
        ):
            if (name := found.primary) is None:
                continue
            low, high = found.all_intervals.get(name) or (None, None)
            return {
                "metric": name,
                "score": found.scores[name],
                "interval": None if low is None or high is None else (low, high),
                "unit": found.units.get(name) or _unit(task, name),
                "higher_is_better": found.higher_is_better,
                "split": split,
                "contaminated": found.contamination is not None,
            }
    return _validation_score(path, task)


def _frozen_score(frozen: FrozenFeatures | None, task: str) -> float | None:
    if frozen is None or task not in registry.names("tasks"):
        return None
    return frozen.scores.get(registry.load("tasks", task).metric.name)


def _validation_score(path: Path, task: str) -> dict[str, Any]:
    """From the training itself, where there is no evaluation yet."""
    scores = Run(path).validation_scores
    if not scores or task not in registry.names("tasks"):
        return {}
    metric = registry.load("tasks", task).metric
    name = metric.name if metric.name in scores else next(iter(scores))
    return {
        "metric": name,
        "score": scores[name],
        "unit": _unit(task, name),
        "higher_is_better": metric.higher_is_better,
        "split": "val",
    }


def _unit(task: str, score: str) -> str:
    unit: str = registry.load("tasks", task).unit_of(score) if task in registry.names("tasks") else FRACTION
    return unit


def _record(kind: Any, path: Path) -> Any:
    return parse_record(kind, values, str(path)) if (values := _object(path)) else None


def _object(path: Path) -> dict[str, Any]:
    """Empty where the file isn't there. Raises DamagedFile for one that holds no object."""
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not isinstance(values, Mapping):
        raise DamagedFile(f"{path} holds no object.", fix="Restore it.")
    return dict(values)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


ORDERS = ("time", "name", "score", "training")


def sort_overviews(runs: Sequence[RunOverview], order: str) -> list[RunOverview]:
    """By "time" (the newest first), "name", "score" (the best first, for each data set and metric), or the seconds of
    "training" (the shortest first); what isn't known comes last."""
    named = sorted(runs, key=lambda one: _natural(str(one.path)))
    if order == "name":
        return named
    if order == "training":
        return sorted(named, key=lambda one: (one.train_seconds is None, one.train_seconds or 0.0))
    if order == "score":
        return sorted(named, key=_by_score)
    return sorted(named, key=lambda one: one.started or "", reverse=True)


def _by_score(one: RunOverview) -> tuple[Any, ...]:
    score = 0.0 if one.score is None else one.score
    return one.score is None, one.data or "", one.metric or "", -score if one.higher_is_better else score


def _natural(text: str) -> list[tuple[int, int | str]]:
    """ "digits-2" before "digits-10"."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]
