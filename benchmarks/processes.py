"""Whole processes of `suanli`, each with a cache of its own in which only the prepared data is warm: plans and what is
known of the machine are found anew every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from suanli.console import quiet
from suanli.types import Json
from suanli.verbs.prepare import prepare


class Processes:
    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.prepared = folder / "prepared"
        self.prepared.mkdir()
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._numbers = count(1)  # of runs; several threads may ask

    def prepare(self, data: Path | str) -> float:
        """Decodes the data into the cache that all runs share; the seconds it took."""
        started = time.perf_counter()
        with quiet():
            prepare(data, cache_dir=self.folder)
        return time.perf_counter() - started

    def train(self, data: Path | str, options: Sequence[str]) -> tuple[float, dict[str, Json]]:
        """Seconds of the whole process, and its summary with the score on validation. Ends the benchmark where it
        fails."""
        number = next(self._numbers)
        cache, out = self.folder / f"cache{number}", self.folder / f"run{number}"
        cache.mkdir()
        (cache / "prepared").symlink_to(self.prepared)
        command = ["train", str(data), *options, "--out", str(out), "--cache-dir", str(cache)]
        took, found = self._run(command)
        summary = json.loads((out / "summary.json").read_text())
        kept = ("plan", "seconds", "steps", "epochs", "examples_per_s", "peak_memory_bytes", "fallbacks")
        return took, {key: summary.get(key) for key in kept} | {
            "score": found["scores"].get("val_accuracy"),
            "run": str(out),
        }

    def evaluate(self, run: str) -> dict[str, Json]:
        """Scores on the test split, single view."""
        scores: dict[str, Json] = self._run(["evaluate", run, "--cache-dir", str(self.folder)])[1]["scores"]
        return scores

    def _run(self, arguments: Sequence[str]) -> tuple[float, dict[str, Json]]:
        """Seconds of the whole process, and what it answered."""
        command = [sys.executable, "-m", "suanli", *arguments, "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        took = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
        answer: dict[str, Json] = json.loads(done.stdout)
        return took, answer
