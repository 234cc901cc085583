"""What the files of a run hold, as the report reads them: data, training, examination.

Every field may be absent (a file may come from another version) and has a default. A field of the wrong
type is damage. Nothing is interpreted here.
"""

from __future__ import annotations

from pydantic import Base64Bytes

from suanli.reporting.speed_records import Diagnosis, Fallback, Number, Plan, Record


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


class Summary(Record):
    status: str | None = None
    steps: int | None = None
    epochs: Number = None
    parameters: int | None = None
    seconds: dict[str, Number] = {}
    examples_per_s: Number = None
    peak_memory_bytes: Number = None
    limited_by: str | None = None
    forecast: Forecast = Forecast()
    plan: Plan | None = None
    diagnosis: Diagnosis | None = None
    fallbacks: tuple[Fallback, ...] = ()


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
