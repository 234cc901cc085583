"""Whole processes of `suanli`, each with a cache of its own that contains only the prepared data and how fast the
machine computes in each precision: plans are measured anew every time. They run one at a time, or many short trainings
in parallel for their scores.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from suanli.core.console import hide_progress
from suanli.core.types import Json
from suanli.data.cache import PreparedData
from suanli.machine import device, precisions
from suanli.verbs.prepare import prepare


class Processes:
    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.prepared = folder / "prepared"
        self.prepared.mkdir()
        places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # of networks and suanli
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(places)}
        self._numbers = count(1)  # of runs; several threads may ask

    def prepare(self, data: Path | str) -> PreparedData:
        """Decodes the data into the cache that all runs share, and measures the machine's precisions there."""
        precisions.measure(device.detect("cpu"), self.folder)
        with hide_progress():
            return prepare(data, cache_dir=self.folder)

    def train(self, data: Path | str, options: Sequence[str]) -> tuple[float, dict[str, Json]]:
        """Seconds of the whole process, and its summary with the validation score. Exits where the process fails."""
        number = next(self._numbers)
        cache, out = self.folder / f"cache{number}", self.folder / f"run{number}"
        cache.mkdir()
        for shared in ("prepared", "probe"):
            (cache / shared).symlink_to(self.folder / shared)
        command = ["train", str(data), *options, "--out", str(out), "--cache-dir", str(cache)]
        took, answer = self._run(command)
        summary = json.loads((out / "summary.json").read_text())
        kept = ("plan", "seconds", "steps", "epochs", "examples_per_s", "peak_memory_bytes", "fallbacks")
        return took, {key: summary.get(key) for key in kept} | {
            "score": answer["scores"].get("val_accuracy"),
            "run": str(out),
        }

    def evaluate(self, run: str) -> dict[str, Json]:
        """Scores on the test split, single view."""
        command = ["evaluate", run, "--no-augmented-views", "--cache-dir", str(self.folder)]
        scores: dict[str, Json] = self._run(command)[1]["scores"]
        return scores

    def _run(self, arguments: Sequence[str]) -> tuple[float, dict[str, Json]]:
        """Seconds of the whole process, and its JSON answer."""
        command = [sys.executable, "-m", "suanli", *arguments, "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        took = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
        answer: dict[str, Json] = json.loads(done.stdout)
        return took, answer


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Trainings that differ only in their seed."""

    scores: list[float]  # on validation
    seconds: list[float]  # of training

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    def __str__(self) -> str:
        error = standard_error(self.scores)
        return (
            f"{100 * self.mean:.2f} % (standard error {100 * error:.2f}, {len(self.scores)} seeds), "
            f"{statistics.mean(self.seconds):.1f} s"
        )


def train_all(
    data: Path | str, ways: Mapping[str, Mapping[str, Json]], options: Sequence[str], seeds: int
) -> Iterator[tuple[str, Scored]]:
    """Trains with `seeds` seeds for each way: a set of changes of the recipe's fields. Each training is a process with
    one thread and fixed speedups; as many run in parallel as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(device.cores()) as side_by_side:
        processes = Processes(Path(folder), 1)
        processes.prepare(data)
        fast = "bfloat16" in device.detect("cpu").fast_dtypes
        speedups = "channels_last,bf16" if fast else "channels_last"

        def train(changes: Mapping[str, Json], seed: int) -> dict[str, Json]:
            usual = ["--seed", str(seed), "--threads", "1", "--speedups", speedups]
            sets = [part for field, value in changes.items() for part in ("--set", f"{field}={json.dumps(value)}")]
            return processes.train(data, [*usual, *options, *sets])[1]

        submitted = {way: [side_by_side.submit(train, ways[way], seed) for seed in range(seeds)] for way in ways}
        for way, runs in submitted.items():
            done = [run.result() for run in runs]
            yield way, Scored(scores=[d["score"] for d in done], seconds=[d["seconds"]["train"] for d in done])


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
