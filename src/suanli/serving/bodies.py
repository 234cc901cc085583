"""The types of all JSON bodies over HTTP: mypy checks the code against them, and the OpenAPI document is made of them.

An answer has exactly the keys of its type; unknown keys of a request are ignored. Sources: Open Inference Protocol, and
Triton Inference Server's extensions for binary tensors, classification, model configuration, statistics and the model
repository. Not here: checking requests, since `codec` says more exactly what is wrong with one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypeAliasType, TypedDict  # pydantic needs typing_extensions' before Python 3.12

from suanli.serving.protocol import DATATYPES, MAX_RANK, MAX_TENSORS

State = Literal["loading", "ready", "failed", "draining", "closed"]
Availability = Literal["READY", "LOADING", "UNAVAILABLE"]
Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Datatype = Annotated[str, Field(json_schema_extra={"enum": [*DATATYPES, "BYTES"]})]
Shape = Annotated[list[Count], Field(max_length=MAX_RANK)]
Sides = list[Annotated[int, Field(ge=-1)]]  # -1: any number
Files = Annotated[dict[str, bytes], Field(min_length=1)]
TensorData = TypeAliasType(
    "TensorData",
    Annotated[
        "list[float | str | bool | TensorData]",
        Field(description=f"Row by row, nested (up to {MAX_RANK} deep) or flat."),
    ],
)


class Error(TypedDict):
    error: str


class Versioned(TypedDict):
    name: str
    version: str


# --- the Open Inference Protocol: requests ---


class RequestInput(TypedDict):
    name: Text
    shape: Shape
    datatype: Datatype
    data: TensorData
    parameters: NotRequired[dict[str, Any] | None]


class OutputParameters(TypedDict, total=False):
    binary_data: bool
    classification: Annotated[Count, Field(description="Number of the likeliest classes.")]


class RequestOutput(TypedDict):
    name: Text
    parameters: NotRequired[OutputParameters | None]


class InferParameters(TypedDict, total=False):
    binary_data_output: bool
    timeout: Annotated[int, Field(ge=0, lt=1 << 62, description="Microseconds; 0 means none.")] | None


class InferRequest(TypedDict):
    id: NotRequired[str | None]
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=MAX_TENSORS)]
    outputs: NotRequired[Annotated[list[RequestOutput], Field(max_length=MAX_TENSORS)] | None]
    parameters: NotRequired[InferParameters | None]


# --- and answers ---


class BinarySize(TypedDict):
    binary_data_size: Count


class ResponseOutput(TypedDict):
    name: str
    datatype: Datatype
    shape: Shape
    data: NotRequired[list[float | str | bool]]
    parameters: NotRequired[BinarySize]


class InferResponse(TypedDict):
    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[ResponseOutput]


class ServerMetadata(Versioned):
    extensions: list[str]


class ServerLive(TypedDict):
    live: bool


class ServerReady(TypedDict):
    ready: bool


class ModelReady(TypedDict):
    name: str
    ready: bool


class TensorMetadata(TypedDict):
    name: str
    datatype: Datatype
    shape: Sides


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


# --- Triton's extensions ---


class ConfiguredTensor(TypedDict):
    name: str
    data_type: Annotated[str, Field(pattern="^TYPE_")]
    dims: Sides


class DynamicBatching(TypedDict):
    preferred_batch_size: list[Count]
    max_queue_delay_microseconds: Count


class ModelConfig(TypedDict):
    name: str
    platform: str
    backend: str
    max_batch_size: Count
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: DynamicBatching


class Duration(TypedDict):
    count: Count
    ns: Count


class Computed(TypedDict):
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class InferenceStats(Computed):
    success: Duration
    fail: Duration
    queue: Duration


class BatchStats(Computed):
    batch_size: Count


class ModelStats(Versioned):
    last_inference: Annotated[Count, Field(description="Milliseconds since 1970; 0: never.")]
    inference_count: Count
    execution_count: Count
    inference_stats: InferenceStats
    batch_stats: list[BatchStats]


class Statistics(TypedDict):
    model_stats: list[ModelStats]


class IndexRequest(TypedDict, total=False):
    ready: Annotated[bool, Field(description="Only models that are ready.")]


class ModelState(Versioned):
    state: Availability
    reason: str


class Nothing(TypedDict):
    """An object without keys."""


# --- /predict and /status ---


class Texts(TypedDict):
    inputs: Annotated[list[str], Field(min_length=1)]


class Rows(TypedDict):
    """Of a model that reads tables."""

    rows: Annotated[list[dict[str, float | str | bool | None]], Field(min_length=1)]


TextsOrRows = Texts | Rows


class Prediction(TypedDict):
    """Also the values of the task's answer, such as a label and probabilities; all null or empty after an error."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # a type checker sees a key

    name: str
    error: str | None


class Predictions(TypedDict):
    model: str
    version: str
    engine: str
    precision: str
    seconds: float
    texts: Annotated[list[str], Field(description="Each answer in a line for people; empty after an error.")]
    predictions: list[Prediction]


class Unreadable(Predictions):
    """Of inputs of which none can be read; each has its own error."""

    error: str


class EmptyAnswer(TypedDict):
    """What answers of a model have in common."""

    kind: Annotated[str, Field(description='How to show them: "classes", "value", "boxes", …')]
    columns: Annotated[list[str], Field(description="The values that a table has room for.")]
    values: Annotated[dict[str, Any], Field(description="Their names; all null or empty.")]
    threshold: Annotated[
        float | None,
        Field(description="The probability from which an entry is given; null: answers are no such lists."),
    ]


class ModelStatus(Versioned):
    """A model that never came up has only the required keys."""

    state: State
    reason: str
    classes: list[str]
    engine: NotRequired[str | None]
    precision: NotRequired[str | None]
    threads: NotRequired[Count | None]
    kind: NotRequired[str | None]
    media_types: NotRequired[list[str]]
    takes_strings: NotRequired[bool]
    fields: NotRequired[
        Annotated[list[dict[str, Any]], Field(description="Of a form for one input: name, type, values, example.")]
    ]
    height: NotRequired[Count | None]
    width: NotRequired[Count | None]
    channels: NotRequired[Count | None]
    task: NotRequired[str]
    answer: NotRequired[EmptyAnswer]
    batch_limit: NotRequired[Count | None]
    target_ms: NotRequired[Milliseconds | None]
    p50_ms: NotRequired[Milliseconds | None]
    p99_ms: NotRequired[Milliseconds | None]
    memory_bytes: NotRequired[Count | None]
    waiting: NotRequired[Count]
    requests: NotRequired[Count]
    refused: NotRequired[Count]
    failed: NotRequired[Count]
    restarts: NotRequired[Count]


class Status(Versioned):
    ready: bool
    draining: bool
    uptime_s: float
    key_needed: bool
    models: list[ModelStatus]
