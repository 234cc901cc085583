"""Whether an engine's answers are right: compared with the reference's, on examples that calibration didn't use.

The reference is the float32 network that was trained. An engine is refused where

- most of its products and convolutions don't run in the precision that it claims,
- its answers depend on how many inputs it gets at once,
- its answers differ from the reference's by more than rounding to its precision explains, whatever the labels say,
- the primary metric is worse than the tolerance, even at the better end of the paired difference's interval.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from suanli.core import compare
from suanli.engines.candidates import Candidate
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.engines.subject import Subject

# The largest difference of a probability between batches of different sizes, and, for float32, to the reference.
STEADY = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 0.1, "float16": 1e-2, "int8": 0.1, "float8": 0.1}
# The largest mean total variation distance to the reference's answers. Rounding to int8 was measured to cause 0.002 to
# 0.03, calibrating on noise 0.15, normalising with another data set's mean 0.07 and more.
DRIFT = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 2e-2, "float16": 1e-2, "int8": 5e-2, "float8": 5e-2}
FEW = 12  # inputs that are answered in batches of 1 and 3, too
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class AnswerFiles:
    """Files by which an engine in a sandbox gets inputs and gives answers."""

    rows: Path
    answers: Path
    threads: int
    classes: int

    def ask(self, sandbox: Sandbox, count: int, batch: int, limit_s: float) -> tuple[np.ndarray, float]:
        """Probabilities (count, K) of the first `count` rows, `batch` at a time, and the seconds that it took. Raises
        SandboxError for answers of another shape, or that aren't finite."""
        reply = sandbox.ask(
            limit_s,
            "answer",
            threads=self.threads,
            rows=str(self.rows),
            count=count,
            batch=batch,
            out=str(self.answers),
        )
        answers: np.ndarray = np.load(self.answers, allow_pickle=False)
        if answers.shape[1] != self.classes:
            raise SandboxError(f"it answers for {answers.shape[1]} classes, not {self.classes}")
        if not np.isfinite(answers).all():
            raise SandboxError("its answers are not finite numbers")
        return answers, float(reply["took_s"])


@dataclass(frozen=True, kw_only=True)
class AcceptanceCheck:
    subject: Subject
    reference: np.ndarray  # the reference's probabilities (N, K) of the first rows
    files: AnswerFiles
    tolerance: float  # the loss of the primary metric that is accepted, as a fraction
    limit_s: float  # for one engine's answers

    @property
    def count(self) -> int:
        return len(self.reference)

    def check(self, candidate: Candidate, sandbox: Sandbox) -> Candidate:
        """The candidate, accepted, or refused with the reason."""
        files = self.files
        reply = sandbox.ask(120, "find_precision", threads=files.threads, rows=str(files.rows))
        if reply["precision"] != candidate.precision:
            return _refuse(candidate, f"most of it ran in {reply['precision']}")
        answers, _ = files.ask(sandbox, self.count, BATCH, self.limit_s)
        candidate = self.score(candidate, answers)
        few = min(FEW, self.count)
        for batch in (1, 3):
            again, _ = files.ask(sandbox, few, batch, self.limit_s)
            gap = float(np.abs(again - answers[:few]).max())
            if gap > STEADY[candidate.precision]:
                return _refuse(candidate, f"answers at batch {batch} and {BATCH} differ by up to {gap:.2g}")
        return self._compare(candidate, answers)

    def score(self, candidate: Candidate, answers: np.ndarray) -> Candidate:
        """The candidate with its score, if there are labels, and its distance from the reference."""
        drift = float(np.abs(answers - self.reference).sum(1).mean() / 2)
        if self.subject.targets is None:
            return replace(candidate, drift=drift)
        task, targets = self.subject.task, self.subject.targets[: self.count]
        before, after = task.records(self.reference, targets), task.records(answers, targets)
        groups = None if self.subject.groups is None else self.subject.groups[: self.count]
        return replace(
            candidate,
            score=task.scores(after)[task.metric],
            difference=compare.difference(task, before, after, groups),
            drift=drift,
        )

    def _compare(self, candidate: Candidate, answers: np.ndarray) -> Candidate:
        """Accepts or refuses by the distance from the reference."""
        assert candidate.drift is not None
        if candidate.drift > DRIFT[candidate.precision]:
            return _refuse(
                candidate, f"answers differ by {candidate.drift:.2g} on average, which rounding doesn't explain"
            )
        gap = float(np.abs(answers - self.reference).max())
        if candidate.precision == "float32" and gap > STEADY["float32"]:
            return _refuse(candidate, f"answers differ by up to {gap:.2g}, which rounding doesn't explain")
        difference = candidate.difference
        if difference is not None and difference.exceeds(self.tolerance):
            return _refuse(
                candidate,
                f"{self.subject.task.metric} {100 * difference.median:+.2f} points "
                f"({100 * difference.low:+.2f} to {100 * difference.high:+.2f})",
            )
        return replace(candidate, state="accepted")

    def is_inexact(self, candidate: Candidate) -> bool:
        """Whether it was refused for answers that higher precision in some layers may improve."""
        if candidate.drift is None or candidate.difference is None:
            return False
        return candidate.drift > DRIFT[candidate.precision] or candidate.difference.exceeds(self.tolerance)


def _refuse(candidate: Candidate, reason: str) -> Candidate:
    return replace(candidate, state="refused", reason=reason)
