"""The files of a run directory as the report reads them.

Every file may be absent: a run can be interrupted at any time. A field of the wrong type is damage and
raises DamagedFile. Nothing is interpreted here, and nothing but these files is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from suanli.core.errors import DamagedFile
from suanli.core.run import Run, read_lines
from suanli.core.storage import read_json
from suanli.core.types import SPLITS, AnyPath
from suanli.reporting.engine_records import Engines
from suanli.reporting.records import Check, Data, Environment, Evaluation, Measured, Metric, Summary
from suanli.reporting.speed_records import Bench, Record, Roofline, Scaling

REBUILD = "Restore it, or make the run again."


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run directory, read; what isn't there is None or empty."""

    path: Path
    recipe: dict[str, Any]
    environment: Environment | None
    data: Data | None
    check: Check | None
    metrics: list[Metric]
    ledger: list[Measured]
    summary: Summary | None
    evaluations: dict[str, Evaluation]  # by split
    roofline: Roofline | None
    bench: Bench | None
    scaling: Scaling | None
    engines: Engines | None
    trained: bool

    @property
    def only_bench(self) -> bool:
        """Whether this directory measures speed and trains nothing."""
        measured = self.bench is not None or self.scaling is not None
        return measured and not self.trained and not self.metrics


RecordType = TypeVar("RecordType", bound=Record)


def read_run(path: AnyPath) -> RunFiles:
    """Raises DataError where no run is, DamagedFile for a file that can't be used."""
    path = Run.open(path).path
    exams = {split: _read(path / "evaluation" / f"{split}.json", Evaluation) for split in SPLITS}
    return RunFiles(
        path=path,
        recipe=_recipe(path / "recipe.json"),
        environment=_read(path / "environment.json", Environment),
        data=_read(path / "data.json", Data),
        check=_read(path / "check.json", Check),
        metrics=_without_repeats(_read_lines(path / "metrics.jsonl", Metric)),
        ledger=_read_lines(path / "ledger.jsonl", Measured),
        summary=_read(path / "summary.json", Summary),
        evaluations={split: exam for split, exam in exams.items() if exam is not None},
        roofline=_read(path / "roofline.json", Roofline),
        bench=_read(path / "bench.json", Bench),
        scaling=_read(path / "scaling.json", Scaling),
        engines=_read(path / "model" / "engines" / "engines.json", Engines),
        trained=(path / "model" / "model.json").is_file(),
    )


def _recipe(path: Path) -> dict[str, Any]:
    """As it was written, whatever fields the recipes of that version had."""
    recipe = _json(path)
    if not isinstance(recipe, dict):
        raise DamagedFile(f"{path} doesn't hold a recipe.", fix=REBUILD)
    return recipe


def _read(path: Path, record: type[RecordType]) -> RecordType | None:
    value = _json(path)
    return None if value is None else _validated(record, value, str(path))


def _json(path: Path) -> Any:
    try:
        return _encodable(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _validated(record: type[RecordType], value: Any, where: str) -> RecordType:
    try:
        return record.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DamagedFile(f"{where} can't be used, at {field}: {first['msg']}.", fix=REBUILD) from error


def _read_lines(path: Path, record: type[RecordType]) -> list[RecordType]:
    return [_validated(record, _encodable(line), f"A line of {path}") for line in read_lines(path)]


def _without_repeats(metrics: Iterable[Metric]) -> list[Metric]:
    """After a resume, steps since the checkpoint are in the file twice: the later ones count."""
    kept: list[Metric] = []
    for metric in metrics:
        while kept and kept[-1].step > metric.step:
            kept.pop()
        kept.append(metric)
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
