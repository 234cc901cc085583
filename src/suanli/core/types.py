"""The words of suanli: frozen records that the rooms export and the verbs pass on.

A record only holds what it was given; nothing here touches the disk, the network or a device.
Shapes are written with single letters: B batch, C channels, H height, W width, L tokens,
K classes, N examples.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

AnyPath: TypeAlias = "str | os.PathLike[str]"  # a Run is one, too
Json: TypeAlias = Any  # what json.dumps takes: dict, list, str, int, float, bool or None

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where work runs. What it can reach is not here: ceilings are measurements."""

    name: str  # "AMD EPYC 9R14", "NVIDIA H100 80GB HBM3"
    torch_name: str  # "cpu", "cuda:0", "mps"
    memory_bytes: int | None
    fast_dtypes: tuple[str, ...]  # dtypes with hardware support: "float32", "bfloat16", ...

    @property
    def type(self) -> str:
        return self.torch_name.partition(":")[0]


# --- data -----------------------------------------------------------------------------------

Raw: TypeAlias = "bytes | str | np.ndarray"  # one input as its publisher wrote it: file bytes, text, pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One labelled input, not read yet."""

    name: str  # by which a person finds it again: "train/cat/001.jpg", "reviews.csv:17"
    label: str  # a class name, one of Source.classes
    split: str | None  # "train", "val", "test"; None: suanli decides by content
    read: Callable[[], Raw]  # raises OSError or BadInput


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader finds at a path, or a built-in data set in its files. Nothing is decoded yet."""

    name: str  # short, fit for a directory name: "cifar10"
    kind: str  # which file of preprocess/ reads the inputs: "image", "text"
    rows: Sequence[Row]
    classes: tuple[str, ...]  # in the order of the model's outputs; a class may have no rows
    fingerprint: str  # changes when the files change; cheap (names, sizes, times or a checksum)
    size_bytes: int | None = None  # of all raw inputs, uncompressed; None: unknown
    licence: str | None = None
    notes: tuple[str, ...] = ()  # what the reader passed over, for the data check


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table file to read; None: found by name."""

    input: str | None = None  # --input-column: the text, or the path of the file
    label: str | None = None  # --label-column


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way to read what lies at a path."""

    name: str
    why_not: Callable[[Path], str | None]  # None: this reader reads that path
    read: Callable[[Path, Columns], Source]
    order: int = 50  # asked from the lowest; the first without a reason reads


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file of a publisher."""

    url: str
    checksum: str  # "sha256:…" or "md5:…", as the publisher states it
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with a name. `read` gets the directory that holds the downloaded files."""

    name: str
    kind: str
    licence: str
    homepage: str
    downloads: tuple[Download, ...]  # empty: comes with an installed package
    read: Callable[[Path], Source]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedInput:
    """One input in the form that the cache holds."""

    row: np.ndarray
    digest: bytes  # 16 bytes; equal for the same picture or text, however it was stored
    traits: tuple[str, ...] = ()  # what is odd about it: "grey", "palette", "alpha", "16-bit", …
    size: tuple[int, ...] = ()  # before preprocessing: (H, W), or (tokens,)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How one input is shown to a person."""

    media_type: str  # "image/png", "text/plain"
    content: bytes


class Preprocess(ABC):
    """From raw input to model input. One object serves train, evaluate, predict, optimize and
    serve, and is saved with the model; a subclass is a frozen dataclass whose fields are plain
    values, and is the file `preprocess/<kind>.py`.

    Two halves: `encode` runs once per input on the CPU, its rows are cached; `to_model` runs on
    each batch on the device.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls, raws: Callable[[], Iterator[Raw]], settings: Mapping[str, Json]) -> Self:
        """Decide what depends on the training inputs (size, channels, vocabulary).

        `raws()` starts a pass over the raw training inputs (bad ones included); `settings` are
        the recipe's, and win. Raises UsageError for an unknown or impossible setting.
        """

    @abstractmethod
    def encode(self, raw: Raw) -> EncodedInput:
        """One cached row of shape `row_shape` and dtype `row_dtype`. Raises BadInput."""

    @abstractmethod
    def measure(self, rows: np.ndarray) -> Self:
        """A copy that knows the statistics (mean, spread) of the training rows (N, *row_shape)."""

    @abstractmethod
    def to_model(self, rows: torch.Tensor) -> torch.Tensor:
        """A batch of cached rows (B, *row_shape) to the model's input (B, *input_shape)."""

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def row_dtype(self) -> str: ...

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Of one model input, without the batch: (C, H, W) for images, (L,) for text."""

    @property
    @abstractmethod
    def model_args(self) -> dict[str, Json]:
        """What a model builder must know of the input: {"in_channels": 3, "image_size": (32, 32)}
        for images, {"vocabulary_size": 20000} for text."""

    @abstractmethod
    def preview(self, row: np.ndarray) -> Preview:
        """How a cached row is shown."""

    @classmethod
    @abstractmethod
    def inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """The unlabelled inputs at a path (a file or a folder), for `predict`: name and reader.
        `Path("-")` is standard input."""

    def settings(self) -> dict[str, Json]:
        """Every field as plain values: `type(self)(**settings)` is an equal object."""
        from dataclasses import asdict

        values: dict[str, Json] = asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses
        return values

    def to_json(self) -> dict[str, Json]:
        """As `model.json` has it; `saved.preprocess_of` makes an equal object of it."""
        return {"kind": self.kind, "settings": self.settings()}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The examples of one split: columns, on disk or in memory."""

    inputs: np.ndarray  # cached rows of the whole data set (a memory map), (M, *row_shape)
    index: np.ndarray  # which of them are in this split, (N,) int64
    targets: np.ndarray  # (N,) int64
    names: Sequence[str]  # (N,)
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an augmentation gets and gives. `inputs` (B, *input_shape) are model inputs on the
    device; `targets` are (B,) int64, or (B, K) class shares once pictures were mixed."""

    inputs: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor  # (B,) int64, position in the training split, the same every epoch
    epoch: int
    classes: int
    global_positions: torch.Tensor | None = (
        None  # (B,) int64, of these examples in the batch of all processes; None: it is this
    )
    global_size: int | None = None  # how many examples that batch has


class Augmentation(ABC):
    """Changes training inputs at random. A subclass is a frozen keyword-only dataclass whose
    fields are its settings, and is the file `augments/<name>.py`.

    `generator` lives on the device of the batch; all randomness comes from it, so the same
    generator state gives the same batch. Never changes the batch in place.
    """

    kinds: ClassVar[tuple[str, ...]]  # kinds of Preprocess whose inputs it can change

    @abstractmethod
    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch: ...

    def views(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """The deterministic views that test-time augmentation averages over, `inputs` first."""
        return [inputs]


# --- learning -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """A named network. `build(classes=K, **preprocess.model_args, **recipe.model_args)` returns
    a module that maps (B, *input_shape) to logits (B, K).

    A module may have `initialize(inputs)`, called once before the first step with some training
    inputs, for initialisation that depends on data; and a parameter may be frozen with
    `requires_grad_(False)`.
    """

    name: str
    kinds: tuple[str, ...]
    build: Callable[..., nn.Module]
    head: str  # name of the submodule with the output layer: what a new set of classes replaces
    source: str  # paper or repository that describes it


class Task(ABC):
    """What is learned and how it is examined. A subclass is the file `tasks/<name>.py`."""

    name: ClassVar[str]
    metric: ClassVar[str]  # the primary one: key of `scores` by which runs are compared; higher is better
    tolerance: ClassVar[float]  # the drop of the primary metric that the gate accepts

    @abstractmethod
    def loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        *,
        label_smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean loss of a batch: logits (B, K), targets (B,) int64 or (B, K) shares."""

    @abstractmethod
    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, K) logits to (B, K) float32."""

    @abstractmethod
    def scores(self, probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Name to value, fractions: probabilities (N, K), targets (N,)."""

    @abstractmethod
    def evaluate(self, probabilities: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> dict[str, Json]:
        """Everything that the report shows beyond `scores`, as JSON."""


Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


class Recipe(BaseModel):
    """Everything that decides what is learned; plain values. `digest` names the experiment.

    `batch_size` is global: the number of processes cannot change the experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    name: str = "custom"
    model: str = "speednet"
    model_args: dict[str, Json] = Field(default_factory=dict)
    weights: str | None = None
    task: str = "classification"
    preprocess: dict[str, Json] = Field(default_factory=dict)
    augment: tuple[str, ...] = ()  # "crop(padding=2)", in order
    progressive_resizing: tuple[tuple[Share, Share], ...] = ()  # (share of the steps, scale of each side until there)
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    epochs: float = Field(default=10.0, gt=0)
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: str = "sgd"
    lr: float = Field(default=0.1, gt=0)
    optimizer_args: dict[str, Json] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0)
    backbone_lr_scale: float = Field(default=1.0, ge=0)  # all but the head; 0 freezes it
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
    """What is known of the data before a recipe is chosen."""

    kind: str
    input_shape: tuple[int, ...]  # of one model input: (C, H, W) for images, (L,) for text
    examples: int
    classes: int
    weights: bool  # training starts from given weights
    model: str | None  # the model that the user named


@dataclass(frozen=True, kw_only=True)
class MeasuredScore:
    """What a recipe was measured to reach."""

    data: str  # the name of a data set
    classes: int
    examples: int  # of its training split
    score: float  # the primary metric, on validation data: the mean of three to five seeds, less its standard error


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One size of a recipe: another network, another length."""

    changes: Mapping[str, Json]  # of the recipe's fields, "epochs" among them
    scores: tuple[MeasuredScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RecipeChoice:
    """A shipped recipe and when it suits: the highest `suits(traits)` wins; None: not at all."""

    recipe: Recipe
    suits: Callable[[Traits], int | None]
    budgets: tuple[Budget, ...] = ()  # from the cheapest to the dearest, for a wanted score or a given time


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Builds a torch optimizer from named parameters.

    `build(named_parameters, head=…, lr=…, weight_decay=…, backbone_lr_scale=…, **args)`; every
    parameter group has `initial_lr`, which the schedule scales. `lr` of a group may become a tensor of no
    dimensions, where a recorded step must be able to change it.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    source: str
    usual_lr: float = 1e-3  # where a user names this optimizer and no learning rate


# --- computing ------------------------------------------------------------------------------


Setting: TypeAlias = "Callable[[], AbstractContextManager[object]]"  # a switch of the whole process


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a training step is computed: what speedups may change.

    `model` and `optimizer` stay the objects that own weights and state; a speedup may change their layout
    and flags, never their values. `settings` are on while the step computes and are put back afterwards.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None  # None: only to ask, not to learn
    compute: Callable[..., Any] | None = None  # what maps inputs to outputs in training; None: the model itself
    autocast_dtype: torch.dtype | None = None
    loss_scaling: bool = False  # for dtypes whose range is too small for gradients
    memory_format: torch.memory_format | None = None  # of inputs with four dimensions
    micro_batches: int = 1  # in which a batch is computed, one after the other
    recomputes: bool = False  # blocks compute again in the backward pass what they didn't keep
    reads_cache: bool = False  # batches come from a cached split, not from the caller
    can_reside: bool = False  # the training split fits into the device's memory
    resident: bool = False  # the training split lies on the device as a whole
    read_ahead: bool = False  # the next batches are read and copied while this one is computed
    graph: bool = False  # the whole step is recorded once and replayed
    distributed: bool = False  # with other processes: gradients are averaged in the backward pass
    communicates: bool = False  # layers of the network ask the other processes on the way
    reduce_dtype: torch.dtype | None = None  # in which gradients are sent and added up; None: in their own
    sharded: bool = False  # each process holds a part of every weight
    settings: tuple[Setting, ...] = ()


def _always(step: Step, device: Device) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """One way to compute faster that leaves what is learned unchanged up to rounding."""

    name: str
    stage: int  # applied from the lowest
    apply: Callable[[Step, Device], Step]
    why_not: Callable[[Device], str | None]  # None: usable there
    needless: Callable[[Step, Device], str | None] = _always  # why this training can't gain; None: try it
    usual: bool = False  # used where a run is too short to measure, and tried first where it isn't
    tolerance: float = 1e-3  # relative error (L2) that outputs may show; gradients four times as much
    risks: tuple[str, ...] = ()  # what may fail later because of it: "memory", "numerics", "backend"
    group: str | None = None  # at most one of a group is in use: "precision", "compile"
    slow_start: bool = False  # compiles first: tried only where the run is long enough to win that back
    delayed_effect: bool = False  # shows from the second step on
    saves_memory: bool = False  # costs time: used only where memory is what limits
    distributed_only: bool = False  # shows only where they talk, and planning computes alone: used only by name


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One change that the planner measured against the best plan so far."""

    change: str  # "+bf16", "-channels_last", "threads=1", or several joined by spaces
    kept: bool
    reason: str  # "1.42 times as fast (spread 0.03, 5 rounds)"
    ratio: float | None = None  # None: it was refused before it was timed
    spread: float | None = None
    rounds: int = 0
    error: float | None = None  # largest relative error of outputs and gradients against plain PyTorch
    step_s: float | None = None  # median seconds of a step with the change
    start_s: float = 0.0  # that its first step took longer (compiling)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The speedups in use, the measurements that chose them, and why others aren't in use."""

    device: str
    speedups: tuple[str, ...]
    threads: int | None = None  # of operations on the CPU; None: torch's default
    dropped: Mapping[str, str] = field(default_factory=dict)  # name to reason
    trials: tuple[Trial, ...] = ()
    origin: str = "named"  # "plain", "named", "measured", "cached", "short list" (a run too short to measure)
    seconds: float = 0.0  # that planning took


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured figure; an uplift is derived from a pair of them, never stored."""

    metric: str  # with its unit's name: "examples_per_s"
    value: float
    unit: str
    spread: float | None  # half the interquartile range, same unit
    count: int
    scores: Mapping[str, float]
    variant: str  # what was measured: the plan's speedups, or a peer's name
    device: str
    versions: Mapping[str, str]
    recipe: str  # digest
    time: str  # ISO 8601, UTC


# --- running a trained model ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how an engine runs."""

    device: Device
    threads: int  # of operations on the CPU
    trust_code: bool = False  # the network may be built by code that isn't suanli's


@dataclass(frozen=True, kw_only=True)
class EngineInputs:
    """What an engine is built from."""

    model: Path | None  # the model folder; None: there is nothing but the graph
    onnx: Path | None  # a float32 graph from cached rows to probabilities; None: the network can't be exported
    calibration: np.ndarray | None  # cached training rows (N, *row_shape); None: there is no data
    kept: tuple[str, ...] = ()  # nodes of the graph that a lower precision must leave alone


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """An engine that is ready: `answer` maps cached rows (B, *row_shape) to probabilities (B, K) float32."""

    answer: Callable[[np.ndarray], np.ndarray]
    find_precision: Callable[[np.ndarray], str]  # the precision of most of its products and convolutions: looked up


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run a trained model. `build` and `load` are called in a process of their own."""

    name: str
    precisions: tuple[str, ...]  # "float32", "bfloat16", "int8"; the most promising first
    packages: tuple[str, ...]  # distributions that it needs to run
    build_packages: tuple[str, ...] = ()  # and to be built
    why_not: Callable[[Device, str], str | None]  # device and precision; None: usable there
    build: Callable[[EngineInputs, str, Path, Placement], None]  # writes files into the folder, which is empty
    load: Callable[[Path, str, Placement], LoadedEngine]  # from that folder
    needs: Literal["model", "onnx"]
    order: int = 50  # tried from the lowest
    portable: bool = True  # its files run on any machine of the same kind; False: only where they were built
    quantized_ops: tuple[str, ...] = ()  # of nodes in the graph that its int8 covers; empty: it can't keep any out


class Tracker(ABC):
    """An optional writer of metrics to a place of the user's. `trackers/<name>.py`."""

    @classmethod
    @abstractmethod
    def why_not(cls) -> str | None:
        """None: its package is installed; else the command that installs it."""

    @abstractmethod
    def __init__(self, run_path: Path, config: Mapping[str, Json]) -> None: ...

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def close(self) -> None: ...
