"""Plans that were measured, kept for the next training of the same kind.

One small JSON file for each kind of training, in `plans/` of the cache directory. A file that can't be read is
as good as none; a directory that can't be written costs the measuring anew, not the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from suanli.compute.plan import sort_speedups
from suanli.core.errors import DamagedFile, StorageError
from suanli.core.registry import names
from suanli.core.storage import read_json, write_json
from suanli.core.types import Json, Plan, Trial

PATIENCE_S = 5.0  # that a second process waits for the first to end its measuring


@dataclass(frozen=True, kw_only=True)
class CachedPlan:
    plan: Plan
    complete: bool  # nothing is left to try
    refused: Mapping[str, str] = field(default_factory=dict)  # by the gate, after its exam: speedup to reason


class PlanCache:
    """Where the plan of one kind of training is kept; `cache` None keeps nothing."""

    def __init__(self, cache: Path | None, key: str, threads: int | None) -> None:
        self._folder = cache / "plans" if cache is not None else None
        self._name = f"{key}.json" if threads is None else f"{key}-threads{threads}.json"

    @property
    def path(self) -> Path | None:
        return self._folder / self._name if self._folder is not None else None

    def read(self) -> CachedPlan | None:
        """None: nothing is kept, or nothing that this version understands."""
        if self.path is None:
            return None
        with suppress(OSError, DamagedFile, KeyError, TypeError, AttributeError, ValueError):
            return _kept(read_json(self.path))
        return None

    def write(self, kept: CachedPlan) -> None:
        if self.path is not None:
            with suppress(StorageError):
                write_json(self.path, asdict(kept))

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this is the only process that measures plans with this cache directory; False after some
        seconds of waiting for another: two that measure at once would disturb each other."""
        from filelock import FileLock, Timeout

        if self._folder is None:
            yield True
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / ".lock", timeout=PATIENCE_S)
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError:  # read-only: nobody else can keep a plan here either
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def refuse(self, speedups: Mapping[str, str]) -> None:
        """Keeps that the gate has refused these, each with its reason; the next plan does without."""
        known = self.read()
        if known is None:
            known = CachedPlan(plan=Plan(device="", speedups=()), complete=False)
        plan = known.plan
        left = tuple(n for n in plan.speedups if n not in speedups)
        self.write(
            CachedPlan(
                plan=Plan(**{**_fields(plan), "speedups": left, "dropped": {**plan.dropped, **speedups}}),
                complete=known.complete,
                refused={**known.refused, **speedups},
            )
        )


def _fields(plan: Plan) -> dict[str, Json]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def _kept(values: Json) -> CachedPlan:
    """Raises KeyError, TypeError or ValueError for what is no kept plan of this version."""
    found = values["plan"]
    if not set(found["speedups"]) <= set(names("speedups")):
        raise ValueError("not a plan of this version")
    plan = Plan(
        **{
            **found,
            "speedups": sort_speedups(found["speedups"]),
            "trials": tuple(Trial(**trial) for trial in found["trials"]),
        }
    )
    if not (plan.threads is None or plan.threads >= 1):
        raise ValueError("not a number of threads")
    return CachedPlan(plan=plan, complete=bool(values["complete"]), refused=dict(values["refused"]))
