"""The run directory: the only thing that one verb passes to the next.

    recipe.json  environment.json  data.json  check.json     what is learned, where, from which data
    metrics.jsonl  ledger.jsonl  summary.json                what happened
    checkpoints/                                              all that an exact resume needs
    model/                                                    all that a prediction needs, on any machine
    evaluation/<split>.json                                   scores
    report.html  README.md                                    for people

A lock file lets only one process write a run at a time. A crash can cut short at most the last line of a .jsonl file,
which readers skip.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from suanli.core.errors import DamagedFile, DataError, RunBusy, UsageError
from suanli.core.storage import json_bytes, raise_storage_errors, read_json, write_json
from suanli.core.types import AnyPath, Environment, Json, Measurement, Recipe

RUNS = Path("runs")
LOCK = ".lock"
FINISHED = ("finished", "stopped early")  # what summary.json says of a run that is done


class Run:
    """A run on disk. Creating the object touches nothing."""

    def __init__(self, path: AnyPath, *, writes: bool = True) -> None:
        """With `writes=False`, in all processes of a training but the first, the methods that write do nothing."""
        self.path, self._writes = Path(path), writes

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

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
    def summary(self) -> dict[str, Json]:
        return self._json("summary.json") if (self.path / "summary.json").exists() else {}

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the test split; empty before it is evaluated."""
        path = self.path / "evaluation" / "test.json"
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
    )


def _create_numbered_folder(parent: Path, name: str) -> Path:
    """A new folder <name>-<n> in `parent`, with the first n after those that exist."""
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
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
