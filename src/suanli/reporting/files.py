"""The files of a run directory as the report reads them.

Every file may be absent: a run can be interrupted at any time. A field of the wrong type is damage and raises
DamagedFile. Nothing is interpreted here, and nothing but these files is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from suanli.compute.roofline_records import Roofline
from suanli.core import registry
from suanli.core.errors import DamagedFile, UsageError
from suanli.core.run import CROSS_VALIDATION, Run, read_lines
from suanli.core.sections import Section
from suanli.core.storage import read_json
from suanli.core.task import Metric, Task
from suanli.core.types import SPLITS, AnyPath, Measurement, Preprocess
from suanli.models.model_folder import build_preprocess
from suanli.reporting.embedding_records import Embeddings
from suanli.reporting.parse_record import FIX, parse_record
from suanli.reporting.records import (
    Check,
    Data,
    Engines,
    Environment,
    Evaluation,
    Example,
    Metrics,
    StartingWeights,
    Summary,
)
from suanli.reporting.words import FRACTION
from suanli.training.ablation_records import Ablation
from suanli.training.scaling_records import Scaling

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run directory, read; what isn't there is None or empty."""

    path: Path
    recipe: dict[str, Any]
    environment: Environment | None
    data: Data | None
    weights: StartingWeights | None  # that training started from; None: from none
    check: Check | None
    samples: tuple[Example, ...]  # of the training split, with their targets
    metrics: list[Metrics]
    ledger: list[Measurement]
    summary: Summary | None
    evaluations: dict[str, Evaluation]  # by split
    embeddings: Embeddings | None
    roofline: Roofline | None
    ablation: Ablation | None
    scaling: Scaling | None
    engines: Engines | None
    trained: bool
    only_bench: bool  # it measures speed and trains nothing
    encoding_code: str | None  # Python that prepares an input without suanli; None: there is none
    task: type[Task] | None  # None: this version doesn't know it
    data_sections: list[Section]  # what the task shows of the targets in the data
    sections: dict[str, list[Section]]  # of each evaluation, by split: what the task shows of its figures

    def unit_of(self, score: str) -> str:
        """Of a score, as an evaluation names it; older versions didn't, so it is the task's."""
        stated = {name: unit for one in self.evaluations.values() for name, unit in one.units.items()}
        return stated.get(score, self.task.unit_of(score) if self.task else FRACTION)

    def metric(self, name: str) -> Metric:
        """How a primary score is shown that `bench` or `optimize` compared."""
        if self.task is not None and self.task.metric.name == name:
            return self.task.metric
        evaluation = next((one for one in self.evaluations.values() if one.metric == name), Evaluation())
        return Metric(name=name, tolerance=0.0, unit=self.unit_of(name), higher_is_better=evaluation.higher_is_better)


def read_run(path: AnyPath) -> RunFiles:
    """Raises DataError where no run is, DamagedFile for a file that can't be used."""
    path = Run.open(path).path
    recipe = _recipe(path / "recipe.json")
    task = _task(recipe)
    files = {split: path / "evaluation" / f"{split}.json" for split in (*SPLITS, CROSS_VALIDATION)}
    evaluations = {split: _read(file, Evaluation) for split, file in files.items()}
    metrics = _without_repeats(_read_lines(path / "metrics.jsonl", Metrics))
    trained = (path / "model" / "model.json").is_file()
    measured = any((path / name).is_file() for name in ("bench.json", "scaling.json"))
    return RunFiles(
        path=path,
        recipe=recipe,
        environment=_read(path / "environment.json", Environment),
        data=_read(path / "data.json", Data),
        weights=_read(path / "weights.json", StartingWeights),
        check=_read(path / "check.json", Check),
        samples=_read(path / "samples.json", tuple[Example, ...]) or (),
        metrics=metrics,
        ledger=_read_lines(path / "ledger.jsonl", Measurement),
        summary=_read(path / "summary.json", Summary),
        evaluations={split: evaluation for split, evaluation in evaluations.items() if evaluation},
        embeddings=_read(path / "evaluation" / "embeddings.json", Embeddings),
        roofline=_read(path / "roofline.json", Roofline),
        ablation=_read(path / "bench.json", Ablation),
        scaling=_read(path / "scaling.json", Scaling),
        engines=_read(path / "model" / "engines" / "engines.json", Engines),
        trained=trained,
        only_bench=measured and not trained and not metrics,
        encoding_code=_encoding_code(path / "model" / "model.json"),
        task=task,
        data_sections=_data_sections(task, path),
        sections={
            split: _sections(task.name, file, task.sections)
            for split, file in files.items()
            if task and evaluations[split]
        },
    )


def _encoding_code(model: Path) -> str | None:
    if not model.is_file():
        return None
    try:
        return build_preprocess(_json(model)["preprocess"]).encoding_code
    except (LookupError, TypeError, UsageError):  # of a kind or with settings that this version doesn't know
        return None


def _task(recipe: Mapping[str, Any]) -> type[Task] | None:
    name = recipe.get("task") or "classification"  # older versions had no other
    task: type[Task] | None = registry.load("tasks", name) if name in registry.names("tasks") else None
    return task


def _data_sections(task: type[Task] | None, run: Path) -> list[Section]:
    """What kind of data and task show of the figures of the data check."""
    file, kind = run / "check.json", (_json(run / "data.json") or {}).get("kind")
    sections: list[Section] = []
    if kind in registry.names("preprocess"):
        preprocess: type[Preprocess] = registry.load("preprocess", kind)
        sections += _sections(
            kind, file, lambda found: preprocess.data_sections((found or {}).get("input_figures", {}))
        )
    if task:
        sections += _sections(
            task.name, file, lambda found: task.data_sections((found or {}).get("target_figures", {}))
        )
    return sections


def _sections(name: str, file: Path, make: Callable[[Any], list[Section]]) -> list[Section]:
    """Of the figures in a file. Raises DamagedFile for those that the task or kind of this name can't read."""
    try:
        return make(_json(file))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedFile(f"{file} can't be used: its figures aren't those of {name} ({error}).", fix=FIX) from error


def _recipe(path: Path) -> dict[str, Any]:
    """As it was written, whatever fields the recipes of that version had."""
    recipe = _json(path)
    if not isinstance(recipe, dict):
        raise DamagedFile(f"{path} doesn't hold a recipe.", fix=FIX)
    return recipe


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    value = _json(path)
    return None if value is None else parse_record(kind, value, str(path))


def _json(path: Path) -> Any:
    try:
        return _encodable(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    lines = (parse_record(kind, _encodable(line), f"A line of {path}") for line in read_lines(path))
    return [line for line in lines if line is not None]


def _without_repeats(lines: Iterable[Metrics]) -> list[Metrics]:
    """After a resume, steps since the checkpoint are in the file twice: the later ones count."""
    kept: list[Metrics] = []
    for line in lines:
        while kept and kept[-1].step > line.step:
            kept.pop()
        kept.append(line)
    return kept


def _encodable(value: Any) -> Any:
    """Names of files may hold bytes that are no UTF-8; JSON carries them as lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value
