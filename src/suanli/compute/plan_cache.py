"""Measured plans, stored for the next training of the same kind.

Each kind of training has a small JSON file in `plans/` of the cache directory. A file that can't be read counts as
missing. If the directory can't be written, the next training measures again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from suanli.compute.plan import sort_speedups
from suanli.core.errors import DamagedFile, StorageError
from suanli.core.registry import names
from suanli.core.storage import read_json, write_json
from suanli.core.types import Json, Plan, Trial

SCANNED = 100  # of the newest plans, for similar ones
LOCK_TIMEOUT_S = 5.0  # how long a second process waits for the first to stop measuring


@dataclass(frozen=True, kw_only=True)
class CachedPlan:
    plan: Plan
    complete: bool  # nothing is left to try
    refused: Mapping[str, str] = field(default_factory=dict)  # by the gate, after evaluation: speedup to reason
    raced: bool = False  # the combinations were timed on full-size steps
    family: str = ""  # of trainings with the same network on the same machine


class PlanCache:
    """The stored plan of one kind of training; with `cache` None nothing is stored."""

    def __init__(self, cache: Path | None, key: str, threads: int | None, family: str = "") -> None:
        self._family = family
        self._folder = cache / "plans" if cache is not None else None
        self._name = f"{key}.json" if threads is None else f"{key}-threads{threads}.json"

    @property
    def path(self) -> Path | None:
        return self._folder / self._name if self._folder is not None else None

    def read(self) -> CachedPlan | None:
        """None where nothing is stored, or nothing that this version can read."""
        if self.path is None:
            return None
        with suppress(OSError, DamagedFile, KeyError, TypeError, AttributeError, ValueError):
            return _parse(read_json(self.path))
        return None

    def write(self, cached: CachedPlan) -> None:
        if self.path is not None:
            with suppress(StorageError):
                write_json(self.path, asdict(replace(cached, family=self._family)))

    def similar(self, most: int = 2) -> list[tuple[str, ...]]:
        """The speedups of the newest plans of the same family, each once."""
        if self._folder is None or not self._family:
            return []
        newest = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        similar: dict[tuple[str, ...], None] = {}
        for path in newest[:SCANNED]:
            with suppress(OSError, DamagedFile, KeyError, TypeError, AttributeError, ValueError):
                values = read_json(path)
                if values["family"] == self._family and path != self.path:
                    similar[_parse(values).plan.speedups] = None
        return list(similar)[:most]

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this is the only process that measures plans with this cache directory: two that measure at once
        would disturb each other. False where another still measures after LOCK_TIMEOUT_S."""
        from filelock import FileLock, Timeout

        if self._folder is None:
            yield True
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / ".lock", timeout=LOCK_TIMEOUT_S)
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError:  # read-only: no other process can store a plan here either
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def refuse(self, speedups: Mapping[str, str]) -> None:
        """Store that the gate refused these speedups, each with its reason; the next plan does without them."""
        cached = self.read() or CachedPlan(plan=Plan(device="", speedups=()), complete=False)
        plan = cached.plan
        left = tuple(n for n in plan.speedups if n not in speedups)
        self.write(
            CachedPlan(
                plan=replace(plan, speedups=left, dropped={**plan.dropped, **speedups}),
                complete=cached.complete,
                raced=cached.raced,
                refused={**cached.refused, **speedups},
            )
        )


def _parse(values: Json) -> CachedPlan:
    """Raises KeyError, TypeError or ValueError for what is not a stored plan of this version."""
    fields = values["plan"]
    if not set(fields["speedups"]) <= set(names("speedups")):
        raise ValueError("not a plan of this version")
    plan = Plan(
        **{
            **fields,
            "speedups": sort_speedups(fields["speedups"]),
            "trials": tuple(Trial(**trial) for trial in fields["trials"]),
        }
    )
    if not (plan.threads is None or plan.threads >= 1):
        raise ValueError("not a number of threads")
    return CachedPlan(
        plan=plan,
        complete=bool(values["complete"]),
        refused=dict(values["refused"]),
        raced=bool(values.get("raced")),
        family=str(values.get("family", "")),
    )
