"""The records and abstract classes that the packages of suanli exchange, in the order in which a run meets them.

    data        Reader or Dataset -> Source, a list of Row -> Preprocess -> Split -> Batch
    learning    Model, Task, Augmentation and Optimizer, chosen by a Recipe: what is learned
    computing   Step, changed by each Speedup of a Plan: how it is computed
    running     Engine: how a trained model answers

What is learned and how it is computed never mix: a Recipe has no field for speed, and a Speedup changes no result
by more than rounding. Records are frozen and only hold values; nothing here touches the disk, the network or a
device. Shapes are written with single letters: B batch, C channels, H height, W width, L tokens, K classes,
N examples of a split.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NotRequired, Self, TypeAlias, TypedDict

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

AnyPath: TypeAlias = "str | os.PathLike[str]"  # a `core.run.Run` is one too
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]
PositiveCount: TypeAlias = Annotated[int, Field(ge=1, lt=1 << 63)]
Records: TypeAlias = "Mapping[str, np.ndarray]"  # columns with one row an example: all that scores depend on
Json: TypeAlias = Any  # any value that json.dumps takes, where no narrower type holds

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where work runs. How fast it is isn't here: that is measured (`machine/peak.py`)."""

    name: str  # "AMD EPYC 9R14", "NVIDIA H100 80GB HBM3"
    torch_name: str  # "cpu", "cuda:0", "mps"
    memory_bytes: int | None  # None: unknown
    fast_dtypes: tuple[str, ...]  # with hardware support: "float32", "bfloat16", …

    @property
    def type(self) -> str:
        """ "cpu", "cuda" or "mps"."""
        return self.torch_name.partition(":")[0]


class Environment(TypedDict):
    """Where a run was computed: environment.json. It has no host or user names and no environment variables."""

    command: list[str]  # a home directory in it is written as ~
    time: str  # ISO 8601, UTC
    python: str
    os: str
    versions: dict[str, str]  # of packages
    device: dict[str, object]  # the fields of Device
    cpu: str
    instruction_sets: list[str]
    cores: int
    threads: int
    cuda: NotRequired[str | None]  # these three on NVIDIA and AMD GPUs only
    cudnn: NotRequired[int | None]
    driver: NotRequired[str | None]


# --- data -----------------------------------------------------------------------------------

Raw: TypeAlias = "bytes | str | np.ndarray"  # one input before decoding: file bytes, a text, or an array of pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One labelled input, not read yet."""

    name: str  # where a person finds it: "train/cat/001.jpg", "reviews.csv:17"
    label: str  # one of Source.classes
    split: str | None  # one of SPLITS; None: decided by group, time or content (data/splits.py)
    read: Callable[[], Raw]  # raises OSError or BadInput
    group: str | None = None  # patient, speaker, day: never divided where suanli makes the splits
    time: float | None = None  # in any unit; the latest are the test split where suanli makes the splits


@dataclass(frozen=True, kw_only=True)
class Source:
    """A labelled data set: what a reader finds at a path, or the files of a built-in one. Nothing is decoded yet."""

    name: str  # short, valid as a directory name: "cifar10"
    kind: str  # of the inputs, the name of a file in data/preprocess/: "image", "text"
    rows: Sequence[Row]
    classes: tuple[str, ...]  # in the order of the model's outputs; a class may have no rows
    fingerprint: str  # changes when the files do; cheap: from names, sizes, times or a checksum
    size_bytes: int | None = None  # of all raw inputs, uncompressed; None: unknown
    licence: str | None = None
    notes: tuple[str, ...] = ()  # what the reader skipped, for the data check


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table to read. None: the reader looks for the usual names."""

    input: str | None = None  # --input-column: a text, or the path of a file
    label: str | None = None  # --label-column
    group: str | None = None  # --group-column
    time: str | None = None  # --time-column


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One format of data on disk: `data/readers/<name>.py`. The first reader with no reason against a path reads it."""

    name: str
    why_not: Callable[[Path], str | None]  # the reason against reading this path; None: it can be read
    read: Callable[[Path, Columns], Source]
    order: int = 50  # readers are tried from the lowest


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file that a publisher offers."""

    url: str
    checksum: str  # as the publisher states it: "sha256:…" or "md5:…"
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set that suanli knows by name: `data/datasets/<name>.py`."""

    name: str
    kind: str
    licence: str
    homepage: str
    downloads: tuple[Download, ...]  # empty: it comes with an installed package
    read: Callable[[Path], Source]  # from the directory of the downloaded files


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedInput:
    """One input as the cache holds it."""

    row: np.ndarray  # (*row_shape)
    digest: bytes  # 16 bytes, equal for the same picture or text in any file format
    traits: tuple[str, ...] = ()  # what the data check reports: "grey", "palette", "alpha", "16-bit", …
    size: tuple[int, ...] = ()  # before preprocessing: (H, W), or (L,)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One input in a form that a browser shows."""

    media_type: str  # "image/png", "text/plain"
    content: bytes


class Preprocess(ABC):
    """Turns a raw input into a model input, in two halves: `encode` runs once per input on the CPU and its rows are
    cached; `to_model` runs on every batch on the device.

    Training, evaluation, prediction and serving use one object, which is saved with the model, so none of them can
    read an input in another way. A subclass is a frozen dataclass whose fields are plain values:
    `data/preprocess/<kind>.py`.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls, raws: Callable[[], Iterator[Raw]], settings: Mapping[str, Json]) -> Self:
        """Decides what depends on the training inputs: size, channels, vocabulary.

        Each call of `raws` starts a pass over the raw training inputs, bad ones included. `settings` are the
        recipe's and take precedence. Raises UsageError for an unknown or impossible setting.
        """

    @abstractmethod
    def encode(self, raw: Raw) -> EncodedInput:
        """The row to cache, of shape `row_shape` and dtype `row_dtype`. Raises BadInput."""

    @abstractmethod
    def measure(self, rows: np.ndarray) -> Self:
        """A copy with the statistics (mean, spread) of these training rows (N, *row_shape)."""

    @abstractmethod
    def to_model(self, rows: torch.Tensor) -> torch.Tensor:
        """The model's inputs (B, *input_shape) from a batch of cached rows (B, *row_shape), on the same device."""

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def row_dtype(self) -> str: ...

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one model input, without the batch: (C, H, W) for images, (L,) for text."""

    @property
    @abstractmethod
    def model_args(self) -> dict[str, Json]:
        """What `Model.build` must know of the inputs: {"in_channels": 3, "image_size": [32, 32]} for images,
        {"vocabulary_size": 20000} for text."""

    @abstractmethod
    def preview(self, row: np.ndarray) -> Preview:
        """A cached row for people to look at."""

    @classmethod
    @abstractmethod
    def inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """The unlabelled inputs of a file or folder, for `predict`: the name of each and a function that reads it.
        `Path("-")` is standard input. Raises DataError where there are none."""

    def settings(self) -> dict[str, Json]:
        """Every field as a plain value: `type(self)(**settings)` makes an equal object."""
        from dataclasses import asdict

        values: dict[str, Json] = asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses
        return values

    def to_json(self) -> dict[str, object]:
        """What `model.json` holds; `models.model_folder` makes an equal object of it."""
        return {"kind": self.kind, "settings": self.settings()}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The examples of one split, by columns."""

    inputs: np.ndarray  # (M, *row_shape), a memory map: the cached rows of all splits
    index: np.ndarray  # (N,) int64, which rows of `inputs` belong to this split
    targets: np.ndarray  # (N,) int64
    names: Sequence[str]  # (N,), each a Row.name
    classes: tuple[str, ...]
    groups: np.ndarray | None = None  # (N,) int64, equal for examples of one group; None: there are no groups

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of one step in this process, as augmentations receive and return them, on the device."""

    inputs: torch.Tensor  # (B, *input_shape)
    targets: torch.Tensor  # (B,) int64; or (B, K) shares of the classes, once inputs were mixed
    index: torch.Tensor  # (B,) int64, positions in the training split, the same in every epoch
    epoch: int
    classes: int  # K
    # Where several processes train together: the positions (B,) of these examples in the batch of all processes, and
    # its size. None: there is only one process.
    global_positions: torch.Tensor | None = None
    global_size: int | None = None


class Augmentation(ABC):
    """Changes training inputs at random. A subclass is a frozen keyword-only dataclass whose fields are its
    settings: `training/augments/<name>.py`."""

    kinds: ClassVar[tuple[str, ...]]  # of Preprocess, whose inputs it can change

    @abstractmethod
    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A changed batch; the one that was passed stays as it is. All randomness comes from `generator`, which is
        on the device of the batch: the same state gives the same result."""

    def views(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """The deterministic variants over which test-time augmentation averages, `inputs` first."""
        return [inputs]


# --- learning -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network that suanli knows by name: `models/networks/<name>.py`.

    `build(classes=K, **preprocess.model_args, **recipe.model_args)` returns a module that maps (B, *input_shape) to
    logits (B, K). The module may have a method `initialize(inputs)` for weights that depend on data: it is called
    once, with some training inputs, before the first step. It may freeze a parameter with `requires_grad_(False)`.
    """

    name: str
    kinds: tuple[str, ...]  # of Preprocess, whose inputs it takes
    build: Callable[..., nn.Module]
    head: str  # name of the submodule with the output layer, which other classes replace
    source: str  # the paper or repository that describes it


class Task(ABC):
    """What is learned, and how well: the loss, the scores and the tolerance of the gate. `tasks/<name>.py`."""

    name: ClassVar[str]
    metric: ClassVar[str]  # the primary metric, a key of `scores`: runs are compared by it; higher is better
    tolerance: ClassVar[float]  # how much of the primary metric the gate lets a speedup or an engine cost
    distances: ClassVar[frozenset[str]] = frozenset()  # scores that are never below 0 and that noise makes larger

    @abstractmethod
    def loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        *,
        label_smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar: logits (B, K), targets (B,) int64 or (B, K) shares of the classes."""

    @abstractmethod
    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 (B, K) from logits (B, K)."""

    @abstractmethod
    def records(self, probabilities: np.ndarray, targets: np.ndarray) -> Records:
        """Probabilities (N, K), targets (N,). Raises DataError for no examples and Diverged for probabilities that
        aren't finite."""

    @abstractmethod
    def scores(self, records: Records, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every score by its name, as a fraction. `weights` (N,), integers or not, say how often each example counts;
        None: once. Every score must be defined where a class has no weight."""

    def resampled_scores(self, records: Records, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`scores` (R,) for each row of weights (R, N). A task overrides it where it can do better than one row after
        another."""
        import numpy as np

        rows = [self.scores(records, row) for row in weights]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def closed_intervals(self, records: Records) -> dict[str, tuple[float, float]]:  # noqa: ARG002
        """95 % intervals of scores that have a closed form, which needs no resamples; examples are independent."""
        return {}

    def closed_difference(self, before: Records, after: Records) -> Difference | None:  # noqa: ARG002
        """The difference of the primary metric on the same independent examples; None: it has no closed form."""
        return None

    @abstractmethod
    def evaluate(self, records: Records, classes: Sequence[str]) -> dict[str, object]:
        """What the report shows beyond `scores`, as plain values for JSON."""


Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


class Recipe(BaseModel):
    """Everything that decides what is learned, as plain values; `digest` identifies the experiment.

    `batch_size` is that of all processes together, so their number doesn't change the experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    name: str = "custom"
    model: str = "speednet"
    model_args: dict[str, Json] = Field(default_factory=dict)
    weights: str | None = None
    task: str = "classification"
    preprocess: dict[str, Json] = Field(default_factory=dict)
    augment: tuple[str, ...] = ()  # in order: "crop(padding=2)"
    progressive_resizing: tuple[tuple[Share, Share], ...] = ()  # (until this share of the steps, scale of each side)
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    epochs: float = Field(default=10.0, gt=0)
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)  # micro-batches that a batch is computed in
    optimizer: str = "sgd"
    lr: float = Field(default=0.1, gt=0)
    optimizer_args: dict[str, Json] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0)
    backbone_lr_scale: float = Field(default=1.0, ge=0)  # for all but the head; 0 freezes it
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = "none"
    clip_norm: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    early_stop: int | None = Field(default=None, ge=1)  # validations without improvement
    validate_every: float = Field(default=1.0, gt=0)  # epochs
    seed: int = Field(default=0, ge=0)

    @field_validator("progressive_resizing")
    @classmethod
    def _ascending(cls, stages: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        shares = [share for share, _ in stages]
        if shares != sorted(set(shares)):
            raise ValueError("the shares of the steps must ascend")
        return stages

    @property
    def digest(self) -> str:
        text = json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What is known before a recipe is chosen."""

    kind: str
    input_shape: tuple[int, ...]  # of one model input: (C, H, W) for images, (L,) for text
    examples: int
    classes: int
    weights: bool  # training starts from pretrained weights
    model: str | None  # the model that the user named


@dataclass(frozen=True, kw_only=True)
class MeasuredScore:
    """A score that a recipe was measured to reach."""

    data: str  # the name of a data set
    classes: int
    examples: int  # of its training split
    score: float  # the primary metric, on validation data: the mean of three to five seeds, less its standard error


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A recipe with another network or length, for less or more time."""

    changes: Mapping[str, Json]  # of the recipe's fields, "epochs" among them
    scores: tuple[MeasuredScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RecipeChoice:
    """A shipped recipe and the data that it suits: `training/recipes/<name>.py`."""

    recipe: Recipe
    suits: Callable[[Traits], int | None]  # the recipe with the highest value is chosen; None: never this one
    budgets: tuple[Budget, ...] = ()  # from the cheapest to the most expensive


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Builds a torch optimizer: `training/optimizers/<name>.py`.

    `build(named_parameters, head=…, lr=…, weight_decay=…, backbone_lr_scale=…, **args)` sets `initial_lr` in every
    parameter group; the schedule scales it. The `lr` of a group may become a scalar tensor, so that a captured
    graph sees it change.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    source: str
    usual_lr: float = 1e-3  # where the user chooses this optimizer without a learning rate


# --- computing ------------------------------------------------------------------------------


Setting: TypeAlias = "Callable[[], AbstractContextManager[object]]"  # inside it, a flag of the process is changed


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a training step is computed; the default is plain PyTorch. A speedup returns a changed copy.

    `model` and `optimizer` stay the objects that own weights and state: a speedup may change their memory layout and
    flags, never their values.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None  # None: the step is only inspected, not run
    compute: Callable[..., Any] | None = None  # maps inputs to outputs in training; None: the model itself
    autocast_dtype: torch.dtype | None = None
    loss_scaling: bool = False  # for dtypes whose range is too small for gradients
    memory_format: torch.memory_format | None = None  # of inputs with four dimensions
    micro_batches: int = 1  # that a batch is computed in, one after another
    recomputes: bool = False  # blocks recompute their activations in the backward pass (activation checkpointing)
    reads_cache: bool = False  # batches come from a cached split; else the caller passes them
    can_reside: bool = False  # the device's memory has room for the training split
    resident: bool = False  # the training split is in the device's memory
    read_ahead: bool = False  # a thread reads the next batches while this one is computed
    graph: bool = False  # the whole step is captured as a CUDA graph and replayed
    distributed: bool = False  # several processes train together: gradients are averaged in the backward pass
    communicates: bool = False  # layers exchange data with the other processes in the forward pass
    reduce_dtype: torch.dtype | None = None  # in which gradients are summed over the processes; None: their own
    sharded: bool = False  # each process holds a shard of every weight
    settings: tuple[Setting, ...] = ()  # on while the step computes


def _never_needless(step: Step, device: Device) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """One way to compute faster that changes what is learned by rounding at most: `compute/speedups/<name>.py`."""

    name: str
    stage: int  # speedups are applied from the lowest
    apply: Callable[[Step, Device], Step]
    why_not: Callable[[Device], str | None]  # the reason why it can't run there; None: it can
    needless: Callable[[Step, Device], str | None] = (
        _never_needless  # the reason why this training can't gain; None: it may
    )
    usual: bool = False  # used where a run is too short to measure; elsewhere tried first
    tolerance: float = 1e-3  # relative error (L2) of outputs that is accepted; of gradients, four times as much
    risks: tuple[str, ...] = ()  # what may fail later because of it: "memory", "numerics", "backend"
    group: str | None = None  # "precision", "compile": at most one speedup of a group is used
    slow_start: bool = False  # compiles first: tried only where the run is long enough to win that time back
    delayed_effect: bool = False  # the gain shows only from the second step on
    saves_memory: bool = False  # costs time: used only where memory runs out
    distributed_only: bool = False  # gains only between processes, and planning runs in one: used only by name


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One change that the planner measured against the best plan so far."""

    change: str  # "+bf16", "-channels_last", "threads=1", or several joined by spaces
    kept: bool  # the change became part of the best plan
    reason: str  # "1.42 times as fast (spread 0.03, 5 rounds)"
    ratio: float | None = None  # time before over time after; None: it was refused before it was timed
    spread: float | None = None
    rounds: int = 0
    error: float | None = None  # largest relative error of outputs and gradients against plain PyTorch
    step_s: float | None = None  # median seconds of a step with the change
    start_s: float = 0.0  # seconds that its first step took longer than that: compiling


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The speedups in use, the measurements that chose them, and the reasons against the others."""

    device: str
    speedups: tuple[str, ...]
    threads: int | None = None  # that an operation on the CPU uses; None: torch's default
    dropped: Mapping[str, str] = field(default_factory=dict)  # speedups that aren't in use, with the reason
    trials: tuple[Trial, ...] = ()
    origin: str = "named"  # "plain", "named", "measured", "cached", or "short list": the run is too short to measure
    seconds: float = 0.0  # spent on planning


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a score between two models, with its 95 % interval, as fractions. Negative: the second is
    worse."""

    median: float  # as measured
    low: float
    high: float

    def exceeds(self, tolerance: float) -> bool:
        """Whether the score dropped by more than `tolerance` even at the better end of the interval."""
        return self.high < -tolerance

    def resolves(self, tolerance: float) -> bool:
        """Whether the interval is narrow enough to detect a drop of `tolerance`."""
        return (self.high - self.low) / 2 <= tolerance

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured figure, a line of ledger.jsonl. A speed-up is computed from a pair of them and never stored."""

    metric: str  # ends in its unit: "examples_per_s"
    value: float
    unit: str
    spread: float | None  # half the interquartile range, in the same unit
    count: int  # of measurements
    scores: Mapping[str, float]
    variant: str  # what was measured: the speedups of a plan, or the name of another program
    device: str
    versions: Mapping[str, str]
    recipe: str  # digest
    time: str  # ISO 8601, UTC


# --- running a trained model ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how an engine runs."""

    device: Device
    threads: int  # that an operation on the CPU uses
    trust_code: bool = False  # code that isn't suanli's may build the network


@dataclass(frozen=True, kw_only=True)
class EngineInputs:
    """What an engine is built from."""

    model: Path | None  # the model folder; None: there is only the graph
    onnx: Path | None  # a float32 graph from cached rows to probabilities; None: the network can't be exported
    calibration: np.ndarray | None  # cached training rows (N, *row_shape); None: there is no data
    kept: tuple[str, ...] = ()  # nodes of the graph that stay in float32


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """An engine that is ready to answer."""

    answer: Callable[[np.ndarray], np.ndarray]  # cached rows (B, *row_shape) to probabilities (B, K) float32
    find_precision: Callable[[np.ndarray], str]  # of most products and convolutions, as they really ran


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run a trained model: `engines/backends/<name>.py`. `build` and `load` run in a sandbox process."""

    name: str
    precisions: tuple[str, ...]  # "float32", "bfloat16", "int8": the most promising first
    packages: tuple[str, ...]  # distributions that it needs to run
    build_packages: tuple[str, ...] = ()  # distributions that it needs besides to be built
    why_not: Callable[[Device, str], str | None]  # the reason against this device and precision; None: it can run
    build: Callable[[EngineInputs, str, Path, Placement], None]  # for a precision, writes files into an empty folder
    load: Callable[[Path, str, Placement], LoadedEngine]  # from that folder
    needs: Literal["model", "onnx"]  # which of its inputs can't be missing
    order: int = 50  # engines are tried from the lowest
    portable: bool = True  # its files run on any machine of the same kind; False: only where they were built
    quantized_ops: tuple[str, ...] = ()  # ONNX operators that its int8 covers; empty: it can't exclude single nodes


class Tracker(ABC):
    """Sends metrics to a tracking tool that the user names: `training/trackers/<name>.py`."""

    @classmethod
    @abstractmethod
    def why_not(cls) -> str | None:
        """The command that installs its package; None: it is installed."""

    @abstractmethod
    def __init__(self, run_path: Path, config: Mapping[str, object]) -> None: ...

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def close(self) -> None: ...
