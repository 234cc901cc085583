"""The records and abstract classes that the packages of suanli exchange, in the order in which a run meets them.

    data        Reader or Dataset -> Source, a list of Example -> Preprocess -> Split -> Batch
    learning    Model, Task (core/task.py), Augmentation and Optimizer, chosen by a Recipe: what is learned
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NotRequired, Self, TypeAlias, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from suanli.core.errors import BadInput, MachineError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from suanli.core.answers import Answer
    from suanli.core.schema import Arrays, Geometry, Schema, Stored, Tensors, Windows
    from suanli.core.sections import Section

AnyPath: TypeAlias = "str | os.PathLike[str]"  # a `core.run.Run` is one too
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]
PositiveCount: TypeAlias = Annotated[int, Field(ge=1, lt=1 << 63)]
Json: TypeAlias = Any  # any value that json.dumps takes, where no narrower type holds

SPLITS = ("train", "val", "test")
TASK_SETTINGS = ("label_smoothing", "class_weights")  # that a recipe of an older version has among its own


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
    """Where a run was computed: environment.json. It has no host or user names, and of the environment's variables only
    those that decide speed."""

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
    variables: NotRequired[dict[str, str]]  # of the environment, that decide speed; absent in older runs
    cuda: NotRequired[str | None]  # these three on NVIDIA and AMD GPUs only
    cudnn: NotRequired[int | None]
    driver: NotRequired[str | None]


# --- data -----------------------------------------------------------------------------------

# One input before decoding: file bytes, a text, an array such as pixels, arrays by name, or cells by column.
Raw: TypeAlias = "bytes | str | np.ndarray | Mapping[str, Any]"


class RawBlock(Sequence[Raw]):
    """Raw inputs that are stored by column, so that none is an object until somebody reads it."""

    @abstractmethod
    def take(self, positions: np.ndarray) -> Self:
        """Those at these positions (B,)."""

    @abstractmethod
    def digests(self) -> np.ndarray:
        """(N, 16) uint8, equal for equal content."""


Target: TypeAlias = Any  # a raw target as plain values, by the source's annotation: the name of a class, a number, …


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One labelled input, not read yet."""

    name: str  # where a person finds it: "train/cat/001.jpg", "reviews.csv:17"
    target: Target  # of annotation "class": one of Source.classes; "boxes": core.boxes.Boxes
    split: str | None  # one of SPLITS; None: decided by group, time or content (data/splits.py)
    read: Callable[[], Raw]  # raises OSError or BadInput
    group: str | None = None  # patient, speaker, day: never divided where suanli makes the splits
    time: float | None = None  # in any unit; the latest are the test split where suanli makes the splits


@dataclass(frozen=True, kw_only=True)
class Source:
    """A labelled data set: what a reader finds at a path, or the files of a built-in one. Nothing is decoded yet."""

    name: str  # short, valid as a directory name: "cifar10"
    kind: str  # of the inputs, the name of a file in data/preprocess/: "image", "text"
    examples: Sequence[Example]
    annotation: str = "class"  # what the targets are; the tasks that learn from it say so
    classes: tuple[str, ...] = ()  # in the order of the model's outputs; a class may have no examples
    origin: str = ""  # stays when the files change: the place, and how it is read; empty: its splits aren't kept
    fingerprint: str  # changes when the files do; cheap: from names, sizes, times or a checksum
    size_bytes: int | None = None  # of all raw inputs, uncompressed; None: unknown
    licence: str | None = None
    part_of: tuple[str, ...] = ()  # larger data sets that contain it: "imagenet-1k"
    notes: tuple[str, ...] = ()  # what the reader skipped, for the data check


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table to read. None: the reader looks for the usual names."""

    input: str | None = None  # --input-column: a text, or the path of a file
    label: str | None = None  # --label-column
    target: str | None = field(default=None, repr=False)  # --target: all other columns are features
    group: str | None = None  # --group-column
    time: str | None = None  # --time-column
    annotation: str | None = None  # what the labels are, where the user has chosen a task; None: the reader decides


def _no_columns(path: Path) -> str | None:
    return f"{path} has no columns"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One format of data on disk: `data/readers/<name>.py`. The first reader with no reason against a path reads it."""

    name: str
    why_not: Callable[[Path], str | None]  # the reason against reading this path; None: it can be read
    read: Callable[[Path, Columns], Source]
    order: int = 50  # readers are tried from the lowest
    # Where the user names the target: the reason against reading this path; None: it can be read.
    why_no_target: Callable[[Path], str | None] = _no_columns


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
    part_of: tuple[str, ...] = ()  # larger data sets that contain it: "imagenet-1k"
    class_names: tuple[tuple[str, ...], ...] = ()  # by any of which a user's own copy is recognised


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedInput:
    """One input as the cache holds it."""

    arrays: Arrays  # by Preprocess.inputs; where that has windows, with an axis in front that counts them
    digest: bytes  # 16 bytes, equal for the same picture or text in any file format
    geometry: Geometry  # of one with windows: of the whole
    traits: tuple[str, ...] = ()  # what the data check reports: "grey", "palette", "alpha", "16-bit", …
    windows: tuple[Geometry, ...] = ()  # where Preprocess.has_windows: from the whole input to each
    # Why its answer may be worth less, as sentences: "age: 212 is outside of 18 to 95". None: the kind has no such.
    flags: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBlock:
    """The inputs of a `RawBlock` as the cache holds them."""

    arrays: Arrays  # (B, …) by Preprocess.inputs
    digests: np.ndarray  # (B, 16) uint8
    geometry: Geometry  # of each
    traits: Mapping[str, np.ndarray] = field(default_factory=dict)  # (B,) bool: which inputs have it


@dataclass(frozen=True, kw_only=True)
class InputReport:
    """What a kind of data says of the inputs of a data set."""

    remarks: tuple[str, ...] = ()  # sentences, the most important first
    figures: Mapping[str, Json] = field(default_factory=dict)  # plain values; `Preprocess.data_sections` shows them


@dataclass(frozen=True, kw_only=True)
class TreeColumns:
    """Rows of a table as decision trees take them."""

    values: np.ndarray  # (N, F) float64; NaN where a number is missing
    cardinalities: tuple[int, ...]  # (F,): codes of a category are below it; 0: the column has numbers


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One input in a form that a browser shows."""

    media_type: str  # "image/png", "text/plain"
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Marked:
    """One input with marks where an answer rests on it: a picture, or words with weights from -1 (they speak against
    the answer) to 1 (for it)."""

    picture: Preview | None = None
    words: tuple[tuple[str, float], ...] = ()

    def to_html(self) -> str:
        """A fragment."""
        import base64
        from html import escape

        if self.picture is not None:
            content = base64.b64encode(self.picture.content).decode()
            return f'<img alt="" src="data:{self.picture.media_type};base64,{content}">'
        spans = (
            f'<span style="background:rgba({"29,95,174" if weight > 0 else "173,79,18"},{abs(weight) * 0.6:.2f})">'
            f"{escape(word)}</span>"
            for word, weight in self.words
        )
        return f"<p>{' '.join(spans)}</p>"

    def to_file(self) -> tuple[str, bytes]:
        """The suffix and the content of a file that shows it."""
        if self.picture is not None:
            return f".{self.picture.media_type.partition('/')[2]}", self.picture.content
        return ".html", f'<!doctype html><meta charset="utf-8">{self.to_html()}\n'.encode(errors="backslashreplace")


class Preprocess(ABC):
    """Turns a raw input into a model input, in two halves: `encode` runs once per input on the CPU and its arrays are
    cached; `to_model` runs on every batch on the device.

    Training, evaluation, prediction and serving use one object, which is saved with the model, so none of them can
    read an input in another way. A subclass is a frozen dataclass whose fields are plain values:
    `data/preprocess/<kind>.py`.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]  # of its inputs, which are known before it is fitted
    media_types: ClassVar[tuple[str, ...]] = ()  # of a request's body that is one raw input: "image/", "text/"
    takes_strings: ClassVar[bool] = False  # a str is an input itself; else it is the path of one
    trait_names: ClassVar[Mapping[str, str]] = {}  # nouns for the traits of `encode`: "palette" is a "palette image"
    column_names: ClassVar[tuple[str, ...]] = ()  # of a data frame's column with inputs; empty: each is a part of one
    similar_bits: ClassVar[int] = 0  # the keys of near-duplicates differ in at most so many bits
    encodes_blocks: ClassVar[bool] = False  # many inputs at once, see `encode_many`
    inputs_at_once: ClassVar[int] = 64  # that `predict` takes
    features_name: ClassVar[str] = ""  # what `features` are, for people: "the words"
    # Settings of given weights that hold for inputs of another size than they learned from, too.
    sizeless_settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def fit(cls, raws: Callable[[], Iterable[Raw]], settings: Mapping[str, Json]) -> Self:
        """Decides what depends on the training inputs: size, channels, vocabulary.

        Each call of `raws` starts a pass over the raw training inputs, bad ones included; where the source has columns,
        it gives a `RawBlock`. `settings` are the recipe's and take precedence. Raises UsageError for an unknown or
        impossible setting.
        """

    @abstractmethod
    def encode(self, raw: Raw) -> EncodedInput:
        """The arrays to cache, by `inputs`. Raises BadInput."""

    def encode_block(self, raws: RawBlock) -> EncodedBlock:
        """As `encode`, of many at once, for kinds whose sources hold columns. Raises BadInput where none can be
        encoded; what is odd about a single one is a trait."""
        raise NotImplementedError(self.kind)

    def encode_many(self, raws: Sequence[Raw | BadInput]) -> list[EncodedInput | BadInput]:
        """As `encode`, of each, or why that can't be done. Called where a kind `encodes_blocks`."""
        raise NotImplementedError(self.kind)

    @classmethod
    def cells_of(cls, raws: Sequence[Raw | BadInput]) -> Sequence[Mapping[str, Json] | None]:
        """What stands of each input beside its answer in a table, by column; None: its name."""
        return [None] * len(raws)

    def list_json(self, values: Json) -> Sequence[Raw]:
        """The inputs in the JSON body of a request. Raises BadInput, which says what the body must be."""
        texts = values.get("inputs") if isinstance(values, Mapping) else None
        if not self.takes_strings:
            raise UsageError(
                "This model takes no strings: send files, as multipart/form-data, or one as it is.", fix=""
            )
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise BadInput('The body must be {"inputs": ["a text", …]}.', fix="")
        return texts

    def split_upload(self, name: str, content: bytes) -> Sequence[tuple[str, Raw]]:
        """The inputs in a file that was sent, with their names. Raises BadInput."""
        return [(name, content)]

    @property
    def fields(self) -> list[dict[str, Json]]:
        """Of a form in which a person types one input: `name`, `type` ("number", "category", …), `values`, `example`.
        Empty: inputs of this kind aren't typed."""
        return []

    def describe(self) -> list[str]:
        """What a person should know of a fitted one before training, such as the types of columns, as sentences."""
        return []

    def check_inputs(
        self,
        raws: RawBlock,  # noqa: ARG002
        inputs: Mapping[str, Stored],  # noqa: ARG002
        targets: Mapping[str, Stored],  # noqa: ARG002
        train: np.ndarray,  # noqa: ARG002
    ) -> InputReport:
        """What a person should know of N inputs before training, such as a column that has the target in it; `train`:
        positions of the training examples. Called where the source holds columns."""
        return InputReport()

    @classmethod
    def data_sections(cls, figures: Mapping[str, Json]) -> list[Section]:  # noqa: ARG003
        """What the report shows of the figures of `check_inputs`, each of which may be missing."""
        return []

    def similarity_key(self, raw: Raw, encoded: EncodedInput) -> bytes:  # noqa: ARG002
        """By which the data check finds near-duplicates of an input: bytes of the same length for all, or none where it
        can't be distinguished from others. Other kinds of data have no such key."""
        return b""

    @abstractmethod
    def measure(self, inputs: Mapping[str, Stored]) -> Self:
        """A copy with the statistics (mean, spread) of these training inputs (N, …)."""

    @abstractmethod
    def to_model(self, inputs: Tensors) -> Tensors:
        """The network's inputs (B, …), in the order of its arguments, from a batch of cached inputs (B, …) on the same
        device."""

    @property
    @abstractmethod
    def inputs(self) -> Schema:
        """Of `encode`: the columns of the cache, and the inputs of an exported graph."""

    @property
    def has_windows(self) -> bool:
        """Whether `encode` cuts an input into windows, which the network answers one by one (core/windows.py)."""
        return False

    def join_windows(self, windows: Arrays, geometries: Sequence[Geometry]) -> Arrays:
        """The cached arrays of the windows of one input (T, …) as the whole, for `preview` and its like."""
        raise NotImplementedError

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of the network's first input, without the batch: (C, H, W) for images, (L,) for text."""

    @property
    @abstractmethod
    def model_args(self) -> dict[str, Json]:
        """What `Model.build` must know of the inputs: {"in_channels": 3, "image_size": [32, 32]} for images,
        {"vocabulary_size": 20000} for text."""

    @abstractmethod
    def preview(self, inputs: Arrays) -> Preview:
        """The cached arrays of one example for people to look at."""

    def thumbnail(self, inputs: Arrays) -> Preview:
        """As `preview`, in fewer bytes: the report shows many beside each other."""
        return self.preview(inputs)

    def close_up(self, inputs: Arrays) -> Preview:
        """As `preview`, with more details: the report draws places over it."""
        return self.preview(inputs)

    def copies(self, inputs: Arrays) -> Sequence[Arrays]:  # noqa: ARG002
        """The cached arrays of one example as copies of it that `similarity_key` doesn't find, such as an image that is
        mirrored: they show how near a near-duplicate is, and an image that is only similar isn't. Others have none."""
        return ()

    def mark(self, inputs: Arrays, weights: np.ndarray) -> Marked:  # noqa: ARG002
        """The cached arrays of one example with the weights of their positions, which `engines/saliency.py` finds:
        (H, W) from 0 to 1 of an image, (L,) from -1 to 1 of a text. Raises MachineError for a kind without any."""
        raise MachineError(f"Inputs of the kind {self.kind} can't be marked.", fix="Predict without --explain.")

    @classmethod
    def draw(cls, raw: Raw, answer: Answer, classes: Sequence[str]) -> Preview:  # noqa: ARG003
        """A raw input in its own size with its answer on it, for people; `classes` are all that an answer may have.
        Raises BadInput, and UsageError for a kind that isn't drawn."""
        raise UsageError(f"Inputs of the kind {cls.kind} can't be drawn.", fix="Leave --draw out.")

    @classmethod
    def size_of(cls, raw: Raw) -> tuple[int, ...]:  # noqa: ARG003
        """Of a raw input, in the coordinates of answers: height and width of an image in px, upright. Raises BadInput,
        and UsageError for a kind that has none."""
        raise UsageError(f"Inputs of the kind {cls.kind} have no sizes.", fix="Choose another format.")

    @classmethod
    @abstractmethod
    def find_inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """The unlabelled inputs of a file or folder, for `predict`: the name of each and a function that reads it.
        `Path("-")` is standard input. Raises DataError where there are none."""

    def features(self, inputs: Mapping[str, Stored], positions: np.ndarray) -> Any:  # noqa: ARG002
        """A few hundred plain numbers of each of these inputs, or some of many (N, F), as an array or a sparse matrix,
        for a linear baseline. The length of a row is about 1. None: inputs of this kind have none."""
        return None

    def columns_for_trees(self, inputs: Mapping[str, Stored], positions: np.ndarray) -> TreeColumns | None:  # noqa: ARG002
        """The columns of these inputs, for decision trees. None: inputs of this kind are no rows of a table."""
        return None

    @property
    def geometry(self) -> Geometry:
        """Of an input that comes encoded, such as the tensor of a request: its own coordinates are the model's."""
        from suanli.core.schema import Geometry

        return Geometry.unchanged(self.input_shape[1:] or self.input_shape)

    @property
    def encoding_code(self) -> str | None:
        """Lines of Python that do the first half without suanli, from the file `path` to the inputs of an exported
        graph (1, …), by name; None: there are none."""
        return None

    def split_file(self, name: str, read: Callable[[], Raw]) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """The inputs in one of `find_inputs`, for kinds whose files hold several."""
        return [(name, read)]

    def split_batch(self, raw: Raw) -> Sequence[Raw] | None:  # noqa: ARG002
        """The raw inputs in one that holds several, such as pictures (N, H, W, C); None: it holds one, or none."""
        return None

    def check_size(self, raw: Raw, max_pixels: int) -> None:  # noqa: B027  # only pictures have pixels
        """Raises BadInput for an input that would take a server too much time or memory."""

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

    inputs: Mapping[str, Stored]  # of M examples, memory maps: the cached inputs of all splits
    index: np.ndarray  # (N,) int64, which of them belong to this split; with windows, one for each
    targets: Mapping[str, Stored]  # of N examples
    names: Sequence[str]  # (N,), each an Example.name
    geometries: np.ndarray  # (N, 3, axes) float64, each a Geometry
    groups: np.ndarray | None = None  # (N,) int64, equal for examples of one group; None: there are no groups
    leaks: np.ndarray | None = None  # (N,) uint8: 0 where it isn't in training, see data/leaks.py; None: unknown
    windows: Windows | None = None  # that answers are merged of; None: each example is one input of the network

    def __len__(self) -> int:
        return len(self.names)

    def input_rows(self, position: int) -> Mapping[str, Stored]:
        """The cached input of one example; of one with windows, all of them (T, …)."""
        if self.windows is None:
            return {name: column[int(self.index[position])] for name, column in self.inputs.items()}
        from suanli.core.schema import select

        rows = self.index[self.windows.of(position)]
        return {name: select(column, rows) for name, column in self.inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of one step in this process, as augmentations receive and return them, on the device."""

    inputs: Tensors  # of Preprocess.to_model (B, …)
    targets: Tensors  # of Task.targets (B, …); "class" is (B, K) shares of the classes, once inputs were mixed
    index: torch.Tensor  # (B,) int64, positions in the training split, the same in every epoch
    epoch: int
    classes: int = 0  # K
    # Where several processes train together: the positions (B,) of these examples in the batch of all processes, and
    # its size. None: there is only one process.
    global_positions: torch.Tensor | None = None
    global_size: int | None = None

    def with_input(self, name: str, tensor: torch.Tensor) -> Batch:
        """A copy with one input replaced."""
        return replace(self, inputs={**self.inputs, name: tensor})


class Augmentation(ABC):
    """Changes training inputs at random. A subclass is a frozen keyword-only dataclass whose fields are its
    settings: `training/augments/<name>.py`."""

    input: ClassVar[str]  # the role of the inputs that it changes, and their name in a batch: "image", "tokens"
    keeps: ClassVar[frozenset[str]]  # roles of targets that stay true, or that it changes with the inputs
    # Examples in each group of a batch that it mixes, which one process must compute: a power of two.
    neighbours: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A changed batch; the one that was passed stays as it is. All randomness comes from `generator`, which is
        on the device of the batch: the same state gives the same result."""

    def views(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """The deterministic variants of its input over which test-time augmentation averages, `inputs` first."""
        return [inputs]


# --- learning -------------------------------------------------------------------------------


Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of the tensors in a file, by name


def _recognize_nothing(shapes: Shapes, config: Mapping[str, Json]) -> dict[str, Json] | None:  # noqa: ARG001
    return None


def _convert_nothing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network that suanli knows by name: `models/networks/<name>.py`.

    `build(**preprocess.model_args, **task.model_args, **recipe.model_args)` returns a module that maps the tensors of
    `Preprocess.to_model`, as positional arguments, to what `Task.loss` and `Task.predict` take: for classification
    logits (B, K), or (B, M, K) of M members, each of which learns every example (core/members.py). The module may have
    a method `initialize(inputs)` for weights that depend on data: it is called once, with some training inputs, before
    the first step. It may freeze a parameter with `requires_grad_(False)`.
    """

    name: str
    kinds: tuple[str, ...]  # of Preprocess, whose inputs it takes
    build: Callable[..., nn.Module]
    head: str  # name of the submodule with the output layer, which other classes replace
    source: str  # the paper or repository that describes it
    class_layer: str = ""  # the part of the head that other classes replace; empty: all of it
    # The submodule that gives the maps which the others read. `build` takes as `backbone` the name of a network to be
    # it, with `backbone_args`, and weights of that network are read into it. Empty: there is none.
    backbone: str = ""
    # What it gives, as a task's `learns_from` has it: "scores" (B, K), a number for each class, or "boxes", see
    # `tasks/detection.py`; empty: that isn't known.
    returns: str = "scores"
    # Arguments of `build` with which the network has the tensors of a published file, by their names and shapes; None:
    # the file is of another network. The second is the publisher's config.json, or empty: from it comes what no shape
    # shows, such as the number of heads, and without it what is usual. Not among them is what data and task decide.
    recognize: Callable[[Shapes, Mapping[str, Json]], dict[str, Json] | None] = _recognize_nothing
    # The tensors of a file that `recognize` knows, under the network's own names; those that have these names already
    # stay as they are. Parts of the original that the network doesn't have, such as CLIP's text tower, are left out.
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = _convert_nothing


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights to start from: what `--weights` named, found on this machine. A run keeps it, with its model."""

    name: str  # finds the same weights again: "efficientnet_lite0", "hf:ORG/NAME@REVISION", an absolute path
    file: Path  # safetensors
    model: str | None = None  # the network that has these weights; None: unknown, so the recipe's is tried
    model_args: Mapping[str, Json] = field(default_factory=dict)
    preprocess: Mapping[str, Json] = field(default_factory=dict)  # settings that they learned with: size, mean, std, …
    fitted_preprocess: Mapping[str, Json] | None = None  # of a run: kind and fields, which are taken as they are
    classes: tuple[str, ...] | None = None  # of the head; None: unknown
    title: str = ""  # for people: "EfficientNet-Lite0"
    homepage: str = ""
    revision: str | None = None
    licence: str | None = None  # as its publisher states it
    commercial: bool | None = None  # whether the licence allows commercial use; None: unknown
    checksum: str = ""  # of the file: "sha256:…"
    accuracy: float | None = None  # of the original on ImageNet-1k, as its publisher states it
    learned_from: tuple[str, ...] = ()  # data sets: "imagenet-1k"


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """One place that weights come from: `models/pretrained/<name>.py`. The first that knows a name finds it."""

    name: str
    # None: the name isn't for this source. Raises UsageError for one that doesn't exist, DataError and MachineError
    # for one that can't be had here. It reaches for the network only where the name says so.
    find: Callable[[str], Pretrained | None]
    present: Callable[[], Sequence[str]] = tuple  # the names that are on this machine already
    order: int = 50  # sources are asked from the lowest


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
    task_args: dict[str, Json] = Field(default_factory=dict)  # its settings, such as label_smoothing
    preprocess: dict[str, Json] = Field(default_factory=dict)
    augment: tuple[str, ...] = ()  # in order: "crop(padding=2)"
    # In the last so many epochs, `final_augment` replaces `augment`: what training ends with looks like what follows.
    final_epochs: float = Field(default=0.0, ge=0)
    final_augment: tuple[str, ...] = ()
    progressive_resizing: tuple[tuple[Share, Share], ...] = ()  # (until this share of the steps, scale of each side)
    # Each step draws the scale of each side from these and 1.
    mixed_sizes: tuple[Share, ...] = Field(default=(), max_length=7)
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    # The head is first fitted to features of the frozen backbone: of so many views of each training image, the first as
    # it is, the others augmented. 0: it isn't.
    frozen_views: int = Field(default=0, ge=0, le=64)
    epochs: float = Field(default=10.0, ge=0)  # of all layers; 0, with `frozen_views`: the head alone is trained
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)  # micro-batches that a batch is computed in
    optimizer: str = "sgd"
    lr: float = Field(default=0.1, gt=0)
    optimizer_args: dict[str, Json] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0)
    backbone_lr_scale: float = Field(default=1.0, ge=0)  # for all but the head; 0 freezes it
    layer_lr_decay: float = Field(default=1.0, gt=0, le=1)  # of the rate, from each layer to the one before it
    unfreeze_epochs: float = Field(default=0.0, ge=0)  # in which layers are unfrozen, from the head down
    fixed_norms: bool = False  # batch norms outside of the head keep the statistics that the weights brought
    lora_rank: int = Field(default=0, ge=0)  # of low-rank adapters, which learn in place of the backbone; 0: none
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    early_stop: int | None = Field(default=None, ge=1)  # validations without improvement
    validate_every: float = Field(default=1.0, gt=0)  # epochs
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _move_task_settings(cls, values: Json) -> Json:
        """Recipes of older versions have the settings of classification among their own."""
        if not isinstance(values, Mapping):
            return values
        moved = {name: values[name] for name in TASK_SETTINGS if name in values}
        rest = {name: value for name, value in values.items() if name not in moved}
        defaults = {"label_smoothing": 0.0, "class_weights": "none"}
        moved = {name: value for name, value in moved.items() if value != defaults[name]}
        return {**rest, "task_args": {**moved, **rest.get("task_args", {})}} if moved else rest

    @field_validator("progressive_resizing")
    @classmethod
    def _ascending(cls, stages: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        shares = [share for share, _ in stages]
        if shares != sorted(set(shares)):
            raise ValueError("the shares of the steps must ascend")
        return stages

    @field_validator("epochs")
    @classmethod
    def _trains_something(cls, epochs: float, info: ValidationInfo) -> float:
        if epochs == 0 and not info.data.get("frozen_views"):
            raise ValueError("0 epochs train nothing, unless frozen_views fits the head first")
        return epochs

    @field_validator("mixed_sizes")
    @classmethod
    def _one_way_to_choose_sizes(cls, sizes: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(sizes)) < len(sizes):
            raise ValueError("each size counts once")
        if sizes and info.data.get("progressive_resizing"):
            raise ValueError("progressive_resizing decides the sizes already: set it to [] to draw them")
        return sizes

    @field_validator("unfreeze_epochs", "lora_rank")
    @classmethod
    def _trains_the_backbone(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("backbone_lr_scale") == 0:
            raise ValueError("with a backbone_lr_scale of 0 only the head learns")
        return value

    @property
    def digest(self) -> str:
        text = json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What is known before a recipe is chosen."""

    kind: str
    annotation: str  # what the targets are: "class", "value", …
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
class UsualWeights:
    """Weights that help a recipe whose user names none."""

    name: str  # as `--weights` takes it: "imagenet"
    # Why a training starts from them by default, where this machine has them: "these are 245 photos"; None: it doesn't.
    reason: Callable[[Traits], str | None]
    gain: Callable[[Traits], str | None]  # what they usually gain, as a sentence; None: it isn't known for such data


@dataclass(frozen=True, kw_only=True)
class RecipeChoice:
    """A shipped recipe and the data that it suits: `training/recipes/<name>.py`."""

    recipe: Recipe
    suits: Callable[[Traits], int | None]  # the recipe with the highest value is chosen; None: never this one
    budgets: tuple[Budget, ...] = ()  # from the cheapest to the most expensive
    weights: UsualWeights | None = None  # for a recipe that starts from weights


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Builds a torch optimizer: `training/optimizers/<name>.py`.

    `build(named_parameters, head=…, lr=…, weight_decay=…, backbone_lr_scale=…, layer_lr_decay=…, **args)` gets all
    parameters of the network, in its order, and sets `initial_lr` in every group; the schedule scales it. The `lr` of a
    group may become a scalar tensor, so that a captured graph sees it change.
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
    unfreezes: bool = False  # which parameters get gradients changes between steps
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


def _nothing_to_undo(step: Step) -> None:
    """For a speedup that changes the record of the step alone."""


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
    raced: bool = False  # what it gains depends on the others: the planner races all combinations of such speedups
    switchable: bool = (
        False  # can be turned on and off between two steps; `undo` takes back what `apply` changed in place
    )
    undo: Callable[[Step], None] = _nothing_to_undo
    rate: str | None = None  # the precision whose rate, measured once on each machine, tells what to expect of it
    slow_start: bool = False  # compiles first: tried only where the run is long enough to win that time back
    delayed_effect: bool = False  # the gain shows only from the second step on
    saves_memory: bool = False  # costs time: used only where memory runs out
    beside_others: bool = False  # gains where other programs use the cores: tried in training when they do
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
    # "plain", "named", "measured", "cached", "raced" on the training's own steps, or "short list": not measured
    origin: str = "named"
    seconds: float = 0.0  # spent on planning

    def __repr__(self) -> str:
        threads = "" if self.threads is None else f", threads={self.threads}"
        return f"Plan({'+'.join(self.speedups) or 'plain PyTorch'}{threads}, {self.origin}, {self.device})"

    def _repr_html_(self) -> str:
        from suanli.core.notebook import html_table

        kept = [
            (f"tried {trial.change}", f"{trial.reason}{'' if trial.kept else ' (left out)'}") for trial in self.trials
        ]
        unused = [(f"without {name}", reason) for name, reason in self.dropped.items()]
        return html_table(repr(self), [*kept, *unused])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better the second of two models is, with the 95 % interval, in the unit of the score. Negative: it is
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
    contaminated: bool = False  # the weights that training started from may have seen the test examples


# --- running a trained model ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how an engine runs."""

    device: Device
    threads: int  # that an operation on the CPU uses
    trust_code: bool = False  # code that isn't suanli's may build the network
    tuning: bool = False  # before the engine is stored: what it measures of itself is kept in its folder


@dataclass(frozen=True, kw_only=True)
class EngineInputs:
    """What an engine is built from."""

    model: Path | None  # the model folder; None: there is only the graph
    onnx: Path | None  # a float32 graph from cached inputs to predictions; None: the network can't be exported
    calibration: Sequence[Arrays] | None  # batches of cached training inputs; None: there is no data
    kept: tuple[str, ...] = ()  # nodes of the graph that stay in float32
    batches: bool = True  # the first axis of every input and output counts examples, and is free


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """An engine that is ready to answer."""

    answer: Callable[[Arrays], Arrays]  # from cached inputs (B, …) to predictions (B, …)
    find_precision: Callable[[Arrays], str]  # of most products and convolutions, as they really ran


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
