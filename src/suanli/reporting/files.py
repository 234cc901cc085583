"""The files of a run directory as the report reads them.

Every file may be absent (a run can be interrupted at any time) and every field may be absent (a
file may come from another version), so each field has a default. A field of the wrong type is
damage and raises DamagedFile. Nothing is interpreted here, and nothing but these files is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError, model_validator

from suanli.errors import DamagedFile
from suanli.rundir import Run, read_lines
from suanli.storage import read_json
from suanli.types import SPLITS, AnyPath

REBUILD = "Restore it, or make the run again."

Number = float | None  # None and NaN: not known


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class DeviceName(Record):
    name: str | None = None
    torch_name: str | None = None
    memory_bytes: Number = None


class Environment(Record):
    command: tuple[str, ...] = ()
    time: str | None = None
    device: DeviceName = DeviceName()
    cpu: str | None = None
    cores: int | None = None
    threads: int | None = None
    os: str | None = None
    python: str | None = None
    driver: str | None = None
    cuda: str | None = None
    cudnn: int | None = None
    versions: dict[str, str | None] = {}


class Data(Record):
    name: str | None = None
    kind: str | None = None
    source: str | None = None
    licence: str | None = None
    classes: tuple[str, ...] = ()
    counts: dict[str, dict[str, int]] = {}  # split -> class -> inputs
    input_shape: tuple[int, ...] = ()
    digest: str | None = None


class BadFile(Record):
    name: str = "?"
    reason: str = ""


class Duplicate(Record):
    names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()  # in which any of them is
    labels: tuple[str, ...] = ()  # one for each name


class Sizes(Record):
    min: tuple[int, ...] = ()
    median: tuple[float, ...] = ()
    max: tuple[int, ...] = ()
    distinct: int | None = None


class Check(Record):
    total: int | None = None
    bad: tuple[BadFile, ...] = ()
    bad_share: Number = None
    duplicates_across_splits: tuple[Duplicate, ...] = ()
    duplicates_within: tuple[Duplicate, ...] = ()
    label_conflicts: tuple[Duplicate, ...] = ()
    counts: dict[str, int] = {}  # how long the lists are in full
    traits: dict[str, int] = {}
    sizes: Sizes | None = None
    imbalance: Number = None
    empty_classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Metric(Record):
    step: int = 0
    epoch: Number = None
    loss: Number = None
    lr: Number = None
    examples_per_s: Number = None
    split: str | None = None  # None: a line of training
    scores: dict[str, Number] = {}


class Measured(Record):
    metric: str = "?"
    value: Number = None
    unit: str = ""
    spread: Number = None
    count: int | None = None
    scores: dict[str, Number] = {}
    variant: str = ""


class Forecast(Record):
    train_seconds: Number = None
    memory_bytes: Number = None
    disk_bytes: Number = None


class PlanInUse(Record):
    device: str | None = None
    speedups: tuple[str, ...] = ()
    dropped: dict[str, str] = {}


class Summary(Record):
    status: str | None = None
    steps: int | None = None
    epochs: Number = None
    parameters: int | None = None
    seconds: dict[str, Number] = {}
    examples_per_s: Number = None
    peak_memory_bytes: Number = None
    limited_by: str | None = None
    input_share: Number = None
    forecast: Forecast = Forecast()
    plan: PlanInUse | None = None


class ClassScore(Record):
    name: str = "?"
    count: int | None = None
    precision: Number = None
    recall: Number = None
    f1: Number = None


class Confused(Record):
    true: str = "?"
    predicted: str = "?"
    count: int = 0


class Bin(Record):
    confidence: Number = None
    accuracy: Number = None
    count: int = 0


class Augmented(Record):
    views: int | None = None
    scores: dict[str, Number] = {}


class Shown(Record):
    media_type: str = ""
    base64: Base64Bytes = b""


class Example(Record):
    name: str = "?"
    true: str | None = None
    predicted: str | None = None
    probability: Number = None
    true_probability: Number = None
    preview: Shown | None = None


class Evaluation(Record):
    split: str | None = None
    headline: str | None = None  # which of `scores` runs are compared by; None: the first
    count: int | None = None
    scores: dict[str, Number] = {}
    interval: tuple[Number, Number] | None = None
    per_class: tuple[ClassScore, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    confused: tuple[Confused, ...] = ()
    reliability: tuple[Bin, ...] | None = None
    with_augmentation: Augmented | None = None
    mistakes: tuple[Example, ...] = ()
    samples: tuple[Example, ...] = ()
    seconds: Number = None


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
    trained: bool


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
