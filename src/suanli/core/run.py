"""The run directory: the only thing that one verb passes to the next.

    recipe.json  environment.json  data.json  check.json     what is learned, where, from which data
    weights.json                                              of whom the weights are that it started from, if any
    examples.npz  leaks.csv                                   its examples, and those in training and another split
    samples.json                                              some of them to look at
    metrics.jsonl  ledger.jsonl  summary.json                what happened
    frozen.json                                              the head that was fitted to frozen features first
    checkpoints/                                              all that an exact resume needs
    model/                                                    all that a prediction needs, on any machine
    evaluation/<split>.json                                   scores
    evaluation/<split>.safetensors                            what `compare` needs of each example
    evaluation/embeddings.npz  embeddings.json                embeddings of examples, and what follows from them
    evaluation/label_errors.csv                               targets that are likely wrong
    report.html  README.md                                    for people

A lock file lets only one process write a run at a time. A crash can cut short at most the last line of a .jsonl file,
which readers skip.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from suanli.core.console import duration
from suanli.core.errors import DamagedFile, DataError, RunBusy, SuanliError, UsageError
from suanli.core.paths import safe_name
from suanli.core.storage import atomic_file, json_bytes, raise_storage_errors, read_json, write_json
from suanli.core.types import AnyPath, Environment, Json, Measurement, Recipe

if TYPE_CHECKING:
    from suanli.core.task import Metric

RUNS = Path("runs")
LOCK = ".lock"
CROSS_VALIDATION = "cross-validation"  # in place of a split, of an evaluation
FINISHED = ("finished", "stopped early")  # what summary.json says of a run that is done


class Run:
    """A run on disk. Creating the object touches nothing."""

    def __init__(self, path: AnyPath, *, writes: bool = True) -> None:
        """With `writes=False`, in all processes of a training but the first, the methods that write do nothing."""
        self.path, self._writes = Path(path), writes

    def __repr__(self) -> str:
        """With its state and primary score, as far as the files say: "Run('runs/digits-1', finished, test accuracy
        98.50%)"."""
        return f"Run({', '.join([repr(str(self.path)), *(text for _, text in self._headline())])})"

    def _repr_html_(self) -> str:
        from suanli.core.notebook import html_table

        with suppress(SuanliError, OSError, LookupError, TypeError, ValueError):
            summary, recipe = self.summary, self.recipe
            rows: list[tuple[str, object]] = [
                ("data", self.data.get("name")),
                ("model", recipe.model),
                *self._headline(),
                ("epochs", summary.get("epochs")),
                ("training", duration(s) if (s := summary.get("seconds", {}).get("train")) is not None else None),
            ]
            return html_table(f"Run {self.path}", rows)
        return html_table(f"Run {self.path}", [("state", "its files can't be read")])

    def _headline(self) -> list[tuple[str, str]]:
        """State and primary score, without those that aren't known."""
        with suppress(SuanliError, OSError, LookupError, TypeError, ValueError, AttributeError):
            found = [("state", str(status))] if (status := self.summary.get("status")) else []
            if (scores := self.scores) and (metric := self.metric).name in scores:
                split = "test" if self.scores_split == "test" else "validation"
                found.append(("score", f"{split} {metric.name} {metric.format(scores[metric.name])}"))
            return found
        return []

    @property
    def metric(self) -> Metric:
        """The primary one of its task."""
        from suanli.core.registry import load

        metric: Metric = load("tasks", self.recipe.task).metric
        return metric

    def __fspath__(self) -> str:
        return str(self.path)

    # --- creating and opening ---

    @classmethod
    def create(
        cls, name: str, out: AnyPath | None, recipe: Recipe, data: Mapping[str, object], environment: Environment
    ) -> Self:
        """A new run in `out`, or else in runs/<name>-<n> with the first free n. Raises UsageError where `out` has
        files."""
        if out is None:
            path = _create_numbered_folder(RUNS, name)
        else:
            path = Path(out).expanduser()
            refuse_occupied(path)
            with raise_storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        with run.lock():
            refuse_occupied(path)  # again: another process may have been faster
            write_json(path / "environment.json", environment)
            write_json(path / "data.json", data)
            write_json(path / "recipe.json", recipe.model_dump(mode="json"))
        return run

    @classmethod
    def open(cls, path: AnyPath) -> Self:
        """An existing run. Raises DataError where there is none."""
        run = cls(Path(path).expanduser())
        if not run.exists():
            raise DataError(
                f"{run.path} is not a run directory (it has no recipe.json).",
                fix="Name the directory that `suanli train` printed, such as runs/digits-1.",
            )
        return run

    def exists(self) -> bool:
        return (self.path / "recipe.json").is_file()

    @contextmanager
    def lock(self, wait_s: float = 0) -> Iterator[None]:
        """Only this process writes the run while the block runs. Raises RunBusy if another one still does after
        `wait_s` seconds."""
        from filelock import FileLock, Timeout

        if not self._writes:
            yield
            return
        with raise_storage_errors(self.path):
            lock = FileLock(self.path / LOCK, timeout=wait_s)
            try:
                lock.acquire()
            except Timeout as error:
                raise RunBusy(
                    f"Another process is writing {self.path}.",
                    fix="Wait until it ends, or choose another --out.",
                ) from error
        try:
            yield
        finally:
            lock.release()

    def is_being_written(self) -> bool:
        """Whether another process of this machine holds the lock; False where that can't be known."""
        from filelock import FileLock, Timeout

        path = self.path / LOCK
        if not path.is_file():  # taking it would create it
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # it may not be opened
            return False

    # --- what is inside ---

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def recipe(self) -> Recipe:
        from pydantic import ValidationError

        try:
            return Recipe.model_validate(read_json(self.path / "recipe.json"))
        except ValidationError as error:
            raise DamagedFile(
                f"{self.path / 'recipe.json'} is not a recipe of this version.",
                fix="Restore it, or train again.",
            ) from error

    @property
    def data(self) -> dict[str, Json]:
        return self._json("data.json")

    @property
    def weights(self) -> dict[str, Json] | None:
        """What is known of the weights that it started from; None: it started from none."""
        return self._json("weights.json") if (self.path / "weights.json").exists() else None

    @property
    def summary(self) -> dict[str, Json]:
        return self._json("summary.json") if (self.path / "summary.json").exists() else {}

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the split that `scores_split` names: on the test split, once it is evaluated, and before that
        on the validation split, of the weights that were kept. Empty before the first validation. A score that isn't
        defined for these examples is None."""
        if self.scores_split == "test":
            return dict(read_json(self.path / "evaluation" / "test.json")["scores"])
        return self.validation_scores

    @property
    def scores_split(self) -> str | None:
        """ "test", "val", or None where there are no scores yet."""
        if (self.path / "evaluation" / "test.json").exists():
            return "test"
        return "val" if self.validation_scores else None

    @property
    def validation_scores(self) -> dict[str, float]:
        """On the validation split, during training, of the weights that are kept: with early stopping the best ones."""
        frozen = self.summary.get("frozen") or {}
        if frozen.get("kept") and frozen.get("scores"):
            return dict(frozen["scores"])
        scores = [dict(m["scores"]) for m in self.metrics if m.get("split") == "val"]
        if not scores or self.recipe.early_stop is None:
            return scores[-1] if scores else {}
        metric = self.metric
        return max(scores, key=lambda one: metric.gain(0.0, one.get(metric.name, math.nan)))

    def scored_examples(self, split: str) -> Path:
        """The file with the records of each example of an evaluation (`core/scored_examples.py`)."""
        return self.path / "evaluation" / f"{split}.safetensors"

    @property
    def cross_validation(self) -> dict[str, float]:
        """The scores of `evaluate --folds`; empty without it."""
        path = self.path / "evaluation" / f"{CROSS_VALIDATION}.json"
        return dict(read_json(path)["scores"]) if path.exists() else {}

    @property
    def metrics(self) -> list[dict[str, Json]]:
        return read_lines(self.path / "metrics.jsonl")

    def _json(self, name: str) -> dict[str, Json]:
        try:
            return dict(read_json(self.path / name))
        except FileNotFoundError as error:
            raise DamagedFile(f"{self.path} has no {name}.", fix="Train again.") from error

    # --- writing ---

    def write(self, name: str, value: object) -> None:
        if self._writes:
            write_json(self.path / name, value)

    def copy(self, name: str, file: Path) -> None:
        """A copy of a file."""
        if self._writes:
            with atomic_file(self.path / name) as stream, file.open("rb") as content:
                shutil.copyfileobj(content, stream)

    def log(self, **metrics: object) -> None:
        self._append("metrics.jsonl", metrics)

    def record(self, measurement: Measurement) -> None:
        self._append("ledger.jsonl", asdict(measurement))

    def _append(self, name: str, value: object) -> None:
        if not self._writes:
            return
        with raise_storage_errors(self.path / name), (self.path / name).open("a+b") as stream:
            if stream.tell():  # a crash may have cut the last line short: this one must not be joined to it
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(json_bytes(value))


def refuse_occupied(path: Path) -> None:
    """Raises UsageError where `path` has files of something else."""
    with raise_storage_errors(path):
        occupied = path.exists() and (not path.is_dir() or any(p.name != LOCK for p in path.iterdir()))
    if occupied:
        hint = f" To resume it: suanli train {path}" if (path / "recipe.json").exists() else ""
        raise UsageError(f"{path} exists and is not an empty directory.", fix=f"Choose a new --out.{hint}")


def refuse_inside(data: AnyPath, out: AnyPath | None) -> None:
    """Raises UsageError for a folder of runs, and where a new run would be in the folder of the data: it would look
    like one more class."""
    folder = Path(data).expanduser()
    if folder.is_dir():
        _refuse_runs(folder)
    if folder.is_dir() and Path(out or RUNS).expanduser().resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"The run would be written into {folder} and then be read as data.",
            fix="Choose an --out outside of it.",
        )


def _refuse_runs(folder: Path) -> None:
    """Raises UsageError for a folder whose folders are runs."""
    with suppress(ValueError):
        folder = folder.resolve().relative_to(Path.cwd())  # as the user would write it
    with suppress(OSError):  # reading the data reports that better
        folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if folders and all(map(is_run, folders)):
            raise UsageError(f"{folder} holds runs, not data.", fix=f"To resume a run, name it, such as {folders[-1]}.")


def is_run(path: AnyPath) -> bool:
    with suppress(OSError):  # a name that is too long is no run either
        return Run(Path(path).expanduser()).exists()
    return False


def now() -> str:
    """The time in UTC: "2026-11-30T13:28:00+00:00"."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_lines(path: Path) -> list[dict[str, Json]]:
    """The objects of a JSON-lines file; a line that was cut short is skipped."""
    lines: list[dict[str, Json]] = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                lines.append(value)
    return lines


def measurement(
    metric: str,
    value: float,
    unit: str,
    *,
    environment: Environment,
    recipe: Recipe,
    variant: str,
    scores: Mapping[str, float],
    spread: float | None = None,
    count: int = 1,
    contaminated: bool = False,
) -> Measurement:
    """A measurement that was taken now, with this environment and recipe."""
    return Measurement(
        metric=metric,
        value=value,
        unit=unit,
        spread=spread,
        count=count,
        scores=scores,
        variant=variant,
        device=str(environment["device"]["name"]),
        versions=environment["versions"],
        recipe=recipe.digest,
        time=now(),
        contaminated=contaminated,
    )


def _create_numbered_folder(parent: Path, name: str) -> Path:
    """A new folder <name>-<n> in `parent`, with the first n after those that exist."""
    name = safe_name(name, "run")
    with raise_storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        numbers = [int(m[1]) for p in os.listdir(parent) if (m := re.fullmatch(re.escape(name) + r"-(\d+)", p))]
        number = max(numbers, default=0) + 1
        while True:
            path = parent / f"{name}-{number}"
            try:
                path.mkdir()  # fails if another process was faster
                return path
            except FileExistsError:
                number += 1
