"""Whether an engine's answers are right: compared with the reference's, on examples that calibration didn't use.

The reference is the float32 network that was trained. An engine is refused where

- most of its products and convolutions don't run in the precision that it claims,
- its answers depend on how many inputs it gets at once,
- its answers differ from the reference's by more than rounding to its precision explains, whatever the labels say,
- the primary metric is worse than the tolerance, even at the better end of the paired difference's interval,
- without labels: more of its answers decide otherwise than the reference's than the tolerance is, even at the better
  end of the interval.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from suanli.core import compare
from suanli.core.schema import Ragged, Stored
from suanli.core.task import Records
from suanli.engines.candidates import Candidate, Estimate
from suanli.engines.differences import LIST_DRIFT, largest_difference, value_range
from suanli.engines.examples import Examples, load_examples
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.engines.subject import Subject

# The largest difference of an answer between batches of different sizes, and, for float32, to the reference: of a
# probability, or in shares of what an output's values range over.
STEADY = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 0.1, "float16": 1e-2, "int8": 0.1, "float8": 0.1}
# The largest mean drift from the reference's answers, as the task measures it. Rounding to int8 was measured to cause
# 0.002 to 0.03 in classification, calibrating on noise 0.15, normalising with another data set's mean 0.07 and more.
DRIFT = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 2e-2, "float16": 1e-2, "int8": 5e-2, "float8": 5e-2}
# Of lists of boxes, whose places and scores are both rounded, so many times as much, but in float32: a detector whose
# score stayed the same drifted by 0.015 in bfloat16 and by 0.03 to 0.04 in int8; with weights of 4 bits by 0.19.
LISTS = 2.0
FEW = 12  # inputs that are answered in batches of 1 and 3, too
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class AnswerFiles:
    """Folders by which an engine in a sandbox gets inputs and gives answers."""

    examples: Path
    answers: Path
    threads: int
    outputs: tuple[str, ...]

    def ask(self, sandbox: Sandbox, count: int, batch: int, limit_s: float) -> tuple[Examples, float]:
        """The answers to the first `count` examples, computed `batch` at a time, and the seconds that it took. Raises
        SandboxError for other outputs, or numbers that aren't finite."""
        shutil.rmtree(self.answers, ignore_errors=True)
        reply = sandbox.ask(
            limit_s,
            "answer",
            threads=self.threads,
            examples=str(self.examples),
            outputs=self.outputs,
            count=count,
            batch=batch,
            out=str(self.answers),
        )
        answers = load_examples(self.answers)
        for block in answers.blocks():
            for name, array in block.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise SandboxError(f"its answers are not finite numbers ({name})")
        return answers, float(reply["took_s"])


@dataclass(frozen=True, kw_only=True)
class AcceptanceCheck:
    subject: Subject
    reference: Examples  # the reference's answers to the first examples
    files: AnswerFiles
    tolerance: float | None  # the loss of the primary metric that is accepted; None: the metric's own
    limit_s: float  # for one engine's answers

    @property
    def count(self) -> int:
        return len(self.reference)

    @cached_property
    def allowed_loss(self) -> float:
        """Of the primary metric, in its unit; without labels, the share of answers that may decide otherwise."""
        metric = self.subject.task.metric
        if self._records is None:
            return metric.tolerance if self.tolerance is None else self.tolerance
        return metric.allowed_loss(self.subject.task.scores(self._records)[metric.name], self.tolerance)

    @cached_property
    def _records(self) -> Records | None:
        """Of the reference; None: there are no labels."""
        return None if self.subject.targets is None else self._record(self.reference)

    @cached_property
    def _groups(self) -> np.ndarray | None:
        return None if self.subject.groups is None else self.subject.groups[: self.count]

    @cached_property
    def _ranges(self) -> dict[str, float]:
        """What single values of each output are compared by; those of lists aren't."""
        return value_range(self.reference, self.subject.task.listed)

    def _record(self, answers: Examples) -> Records:
        assert self.subject.targets is not None
        blocks = list(answers.blocks())
        predictions = {name: np.concatenate([block[name] for block in blocks]) for name in self.files.outputs}
        targets = {name: _first(column, self.count) for name, column in self.subject.targets.items()}
        return self.subject.task.records(predictions, targets)

    def check(self, candidate: Candidate, sandbox: Sandbox) -> Candidate:
        """The candidate, accepted, or refused with the reason."""
        files, precision = self.files, candidate.precision
        reply = sandbox.ask(120, "find_precision", threads=files.threads, examples=str(files.examples))
        if reply["precision"] != precision:
            return _refuse(candidate, f"most of it ran in {reply['precision']}")
        usual, *others = (BATCH, 1, 3) if self.subject.examples.batches else (1, 1)
        answers, _ = files.ask(sandbox, self.count, usual, self.limit_s)
        self._refuse_other_shapes(answers)
        candidate = self.score(candidate, answers)
        few = min(FEW, self.count)
        for batch in others:
            again, _ = files.ask(sandbox, few, batch, self.limit_s)
            gap, drift = self._compare_batches(answers.first(few), again)
            if gap > STEADY[precision] or drift > LIST_DRIFT:
                return _refuse(candidate, f"answers at batch {batch} and {usual} differ by up to {max(gap, drift):.2g}")
        return self._judge(candidate, answers)

    def _refuse_other_shapes(self, answers: Examples) -> None:
        """Where the task says the shape; else the drift tells."""
        for name, column in self.subject.task.outputs.items():
            shapes = {block[name].shape[1:] for block in answers.blocks()} if None not in column.shape else set()
            if others := shapes - {column.shape}:
                raise SandboxError(f"its answers have the shape {others.pop()}, not {column.shape} ({name})")

    def score(self, candidate: Candidate, answers: Examples) -> Candidate:
        """The candidate with its distance from the reference, and its score if there are labels."""
        drifts = self._drifts(answers)
        candidate = replace(candidate, drift=float(drifts.mean()))
        if self._records is not None:
            task, records = self.subject.task, self._record(answers)
            return replace(
                candidate,
                score=task.scores(records)[task.metric.name],
                difference=compare.difference(task, self._records, records, self._groups),
            )
        if self.subject.origin == "made up":
            return candidate
        return replace(candidate, drifts=self._drifts_by_output(answers, drifts), agreement=self._agreement(answers))

    def _drifts(self, answers: Examples, output: str | None = None) -> np.ndarray:
        """Of each example (N,): of all outputs, or where only one of them is the candidate's."""
        return np.concatenate(
            [
                self.subject.task.drift(
                    expected, answered if output is None else {**expected, output: answered[output]}
                )
                for expected, answered in zip(self.reference.blocks(), answers.blocks(), strict=True)
            ]
        )

    def _drifts_by_output(self, answers: Examples, drifts: np.ndarray) -> tuple[Estimate, ...]:
        outputs = self.files.outputs
        parts = [drifts] if len(outputs) == 1 else [self._drifts(answers, output) for output in outputs]
        return tuple(self._estimate(name, part) for name, part in zip(outputs, parts, strict=True))

    def _agreement(self, answers: Examples) -> Estimate | None:
        task = self.subject.task
        parts = [task.agreement(*pair) for pair in zip(self.reference.blocks(), answers.blocks(), strict=True)]
        same = [part for part in parts if part is not None]
        return self._estimate("same answer", np.concatenate(same)) if same else None

    def _estimate(self, name: str, values: np.ndarray) -> Estimate:
        if values.dtype == bool and self._groups is None:
            low, high = compare.wilson_interval(int(values.sum()), len(values))
        else:
            low, high = compare.mean_interval(values, self._groups)
        return Estimate(name=name, value=float(values.mean()), low=low, high=high)

    def _largest_difference(self, expected: Examples, answers: Examples) -> float:
        pairs = zip(expected.blocks(), answers.blocks(), strict=True)
        return max(largest_difference(*pair, self._ranges) for pair in pairs)

    def _compare_batches(self, answers: Examples, again: Examples) -> tuple[float, float]:
        """The largest difference of a value, and the mean drift where there are lists."""
        pairs = zip(answers.blocks(), again.blocks(), strict=True)
        drifts = [self.subject.task.drift(*pair) for pair in pairs] if self.subject.task.listed else [np.zeros(1)]
        return self._largest_difference(answers, again), float(np.concatenate(drifts).mean())

    def _judge(self, candidate: Candidate, answers: Examples) -> Candidate:
        """Accepts or refuses by the distance from the reference."""
        assert candidate.drift is not None
        if candidate.drift > self._allowed_drift(candidate.precision):
            return _refuse(
                candidate, f"answers differ by {candidate.drift:.2g} on average, which rounding doesn't explain"
            )
        gap = self._largest_difference(self.reference, answers)
        if candidate.precision == "float32" and gap > STEADY["float32"]:
            return _refuse(candidate, f"answers differ by up to {gap:.2g}, which rounding doesn't explain")
        loss = self._describe_loss(candidate)
        return replace(candidate, state="accepted") if loss is None else _refuse(candidate, loss)

    def _allowed_drift(self, precision: str) -> float:
        is_list = bool(self.subject.task.listed) and precision != "float32"
        return DRIFT[precision] * (LISTS if is_list else 1.0)

    def _describe_loss(self, candidate: Candidate) -> str | None:
        """That it certainly loses more than is allowed; None: it may not."""
        difference, agreement = candidate.difference, candidate.agreement
        if difference is not None and difference.exceeds(self.allowed_loss):
            return self.subject.task.metric.describe(difference)
        if agreement is not None and 1 - agreement.high > self.allowed_loss:
            return describe_agreement(agreement)
        return None

    def is_inexact(self, candidate: Candidate) -> bool:
        """Whether it was refused for answers that higher precision in some layers may improve."""
        if candidate.drift is None or self.subject.origin == "made up":
            return False
        is_far = candidate.drift > self._allowed_drift(candidate.precision)
        return is_far or self._describe_loss(candidate) is not None


def describe_agreement(agreement: Estimate) -> str:
    """ "the same answer for 99.41 % of the examples (98.90 to 99.69 %)"."""
    low, high = 100 * agreement.low, 100 * agreement.high
    return f"the same answer for {agreement.value:.2%} of the examples ({low:.2f} to {high:.2f})"


def _first(column: Stored, count: int) -> Stored:
    if isinstance(column, Ragged):
        return Ragged(values=column.values, offsets=column.offsets[: count + 1])
    return column[:count]


def _refuse(candidate: Candidate, reason: str) -> Candidate:
    return replace(candidate, state="refused", reason=reason)
