"""The files of a run that no class of suanli writes, as the report reads them: data, training and evaluation.

What a class writes, the report reads as that class. Every field has a default, since a file may come from another
version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Base64Bytes, Field

from suanli.core.baselines import Baseline
from suanli.core.overlaps import Contamination
from suanli.core.types import Plan
from suanli.data.leaks import describe_leaks
from suanli.engines.candidates import SearchResult
from suanli.training.diagnose import Diagnosis

Number = float | None  # None and NaN: not known
Scores = Mapping[str, Number]
Intervals = Mapping[str, tuple[Number, Number]]  # 95 %, by the name of the score


@dataclass(frozen=True, kw_only=True)
class DeviceName:
    name: str | None = None
    torch_name: str | None = None
    memory_bytes: Number = None


@dataclass(frozen=True, kw_only=True)
class Environment:
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
    versions: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Data:
    name: str | None = None
    kind: str | None = None
    source: str | None = None
    licence: str | None = None
    classes: tuple[str, ...] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # split -> class or range -> inputs
    sizes: Mapping[str, int] = field(default_factory=dict)  # by split; older versions wrote none, since counts added up
    input_shape: tuple[int, ...] = ()
    digest: str | None = None


# --- weights.json ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """What is known of the weights that a training started from."""

    name: str | None = None
    title: str | None = None
    model: str | None = None
    homepage: str | None = None
    revision: str | None = None
    licence: str | None = None
    commercial: bool | None = None  # whether the licence allows commercial use; None: unknown
    checksum: str | None = None
    accuracy: float | None = None  # of the original on ImageNet-1k, says its publisher
    learned_from: tuple[str, ...] = ()

    @property
    def caution(self) -> str:
        """What a user of the model must know of the licence."""
        if self.commercial is False:
            return "This licence forbids commercial use, as a rule also of a model that was trained from these weights."
        if self.commercial is None and self.homepage:
            return "Whether this licence allows commercial use isn't known: read the publisher's terms."
        return ""


# --- check.json -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BadFile:
    name: str = "?"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()  # in which any of them is
    labels: tuple[str, ...] = ()  # one for each name


@dataclass(frozen=True, kw_only=True)
class LeakCounts:
    """How many examples of a split are also in training."""

    examples: int = 0
    exact: int = 0
    near: int = 0
    only_validation: int = 0  # of these, in validation alone

    @property
    def total(self) -> int:
        return self.exact + self.near

    def describe(self, split: str) -> str:
        """ "251 of 394 test examples (63.7 %) are also training examples"."""
        counts = {name: getattr(self, name) for name in ("examples", "exact", "near", "only_validation")}
        return describe_leaks(split, **counts)


@dataclass(frozen=True, kw_only=True)
class Copy:
    name: str = "?"
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class Leak:
    example: str = "?"
    split: str = ""
    kind: str = ""
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DividedGroup:
    group: str = "?"
    splits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    min: tuple[int, ...] = ()
    median: tuple[float, ...] = ()
    max: tuple[int, ...] = ()
    distinct: int | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    total: int | None = None
    bad: tuple[BadFile, ...] = ()
    bad_share: Number = None
    duplicates_across_splits: tuple[Duplicate, ...] = ()
    duplicates_within: tuple[Duplicate, ...] = ()
    label_conflicts: tuple[Duplicate, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)  # how long the lists are in full
    traits: Mapping[str, int] = field(default_factory=dict)
    sizes: Sizes | None = None
    imbalance: Number = None  # of classes
    empty_classes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()  # the task's, on how many targets of each kind there are
    target_remarks: tuple[str, ...] = ()  # and on how they fit their inputs
    input_remarks: tuple[str, ...] = ()  # of the kind of data, such as on columns that have the target in them
    notes: tuple[str, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)  # by split; empty: examples have no groups
    groups_across_splits: tuple[DividedGroup, ...] = ()
    test_before_train: int = 0
    leakage: Mapping[str, LeakCounts] = field(default_factory=dict)  # by split; empty: an older version
    leaks: tuple[Leak, ...] = ()


# --- metrics.jsonl and summary.json ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One line: of training, or of a validation."""

    step: int = 0
    epoch: Number = None
    loss: Number = None
    lr: Number = None
    examples_per_s: Number = None
    split: str | None = None  # None: a line of training
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    train_seconds: Number = None
    memory_bytes: Number = None
    disk_bytes: Number = None


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """Why a training went on with another plan: a speedup failed, plans raced, other programs used the cores."""

    step: int | None = None  # after which it happened
    message: Annotated[str, Field(alias="said")] = ""
    speedups: tuple[str, ...] | None = None  # in use from then on


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """The head that was fitted to features of the frozen backbone, before any layer was trained."""

    scores: Scores = field(default_factory=dict)  # on validation
    kept: bool = False  # it is the head of the run's model
    seconds: Number = None
    images: int | None = None  # of the training split
    views: int | None = None  # of each image
    features: int | None = None
    images_per_s: Number = None  # None: the features were in the cache
    way: str | None = None  # of computing them
    penalty: Number = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    status: str | None = None
    steps: int | None = None
    epochs: Number = None
    parameters: int | None = None
    seconds: Mapping[str, Number] = field(default_factory=dict)
    examples_per_s: Number = None
    peak_memory_bytes: Number = None
    limited_by: str | None = None
    forecast: Forecast = Forecast()
    frozen: FrozenFeatures | None = None
    plan: Plan | None = None
    diagnosis: Diagnosis | None = None
    fallbacks: tuple[PlanChange, ...] = ()
    plan_changes: tuple[PlanChange, ...] = ()  # to what was faster


# --- evaluation/<split>.json ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AugmentedScores:
    views: int | None = None
    scores: Scores = field(default_factory=dict)
    intervals: Intervals = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """Of some examples of a split."""

    count: int | None = None
    scores: Scores = field(default_factory=dict)
    intervals: Intervals = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Leakage(LeakCounts):
    excluded: bool = False  # all other figures of the evaluation are of the new examples
    whole: PartScores = PartScores()
    new: PartScores | None = None


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Of a cross-validation."""

    count: int | None = None
    repetitions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How an input is shown to a person."""

    media_type: str = ""
    content: Annotated[Base64Bytes, Field(alias="base64")] = b""


@dataclass(frozen=True, kw_only=True)
class Box:
    box: tuple[Number, Number, Number, Number] | None = None  # left, top, right, bottom in pixels of the input
    label: str | None = None
    probability: Number = None
    verdict: str | None = None  # "right", or what is wrong with it; None: not known, or it doesn't count


@dataclass(frozen=True, kw_only=True)
class ClassesAnswer:
    label: str | None = None
    probability: Number = None
    probabilities: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BoxesAnswer:
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    kind: str = "text"
    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)  # by kind: `ClassesAnswer`, `BoxesAnswer`


@dataclass(frozen=True, kw_only=True)
class View:
    """What a preview shows: a coordinate c of axis a of the input is c * scale[a] + shift[a] there. Axes are height and
    width."""

    size: tuple[Number, ...] = ()
    scale: tuple[Number, ...] = ()
    shift: tuple[Number, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """What an answer rests on."""

    method: str | None = None
    picture: Preview | None = None
    words: tuple[tuple[str, float], ...] = ()  # with weights from -1 to 1


@dataclass(frozen=True, kw_only=True)
class Example:
    name: str = "?"
    answer: Answer | None = None
    expected: Answer | None = None
    error: Number = None
    view: View | None = None
    preview: Preview | None = None
    saliency: Saliency | None = None
    # In place of answers in older versions, which knew classes only.
    true: str | None = None
    predicted: str | None = None
    probability: Number = None
    true_probability: Number = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    split: str | None = None
    metric: Annotated[str | None, Field(alias="headline")] = None  # the primary one; None: the first of `scores`
    higher_is_better: bool = True
    units: Mapping[str, str] = field(default_factory=dict)  # of scores; older versions wrote none
    count: int | None = None
    scores: Scores = field(default_factory=dict)
    interval: tuple[Number, Number] | None = None  # of the primary score
    intervals: Intervals = field(default_factory=dict)  # older versions wrote the primary score's only
    with_augmentation: AugmentedScores | None = None
    baselines: tuple[Baseline, ...] = ()  # older versions wrote none
    leakage: Leakage | None = None
    folds: Folds | None = None
    remarks: tuple[str, ...] = ()  # the task's, on its scores
    contamination: Contamination | None = None
    mistakes: tuple[Example, ...] = ()
    samples: tuple[Example, ...] = ()
    seconds: Number = None

    @property
    def primary(self) -> str | None:
        """The score by which runs are compared; None: there are no scores."""
        return self.metric if self.metric in self.scores else next(iter(self.scores), None)

    @property
    def all_intervals(self) -> Intervals:
        if self.interval is None or self.primary is None:
            return self.intervals
        return {self.primary: self.interval, **self.intervals}


# --- model/engines/engines.json -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    device: str | None = None
    cores: int | None = None


@dataclass(frozen=True, kw_only=True)
class Engines:
    machine: Machine = Machine()
    metric: Annotated[str, Field(alias="headline")] = "score"
    search: Annotated[SearchResult | None, Field(alias="found")] = None
