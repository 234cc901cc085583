"""The messages of gRPC: a table of their fields, built on first use, and from them to requests and back.

There is no generated code: that would tie suanli to one version of protobuf, and its names would meet those of a client
in the same process. The classes come from a pool of descriptors of their own. Names and numbers of fields are those of
the published interfaces: KServe's open_inference_grpc.proto, Triton Inference Server's grpc_service.proto and
model_config.proto (package `inference`), and gRPC's health.proto (package `grpc.health.v1`).

Answers are always in `raw_output_contents`, like Triton's: its clients read numbers nowhere else. What this doesn't do:
BF16, shared memory, and the fields of a model's configuration that suanli never fills; a reader passes over those.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from suanli.serving.protocol import (
    DATATYPES,
    MAX_ELEMENTS,
    MAX_RANK,
    MAX_STRINGS,
    MAX_TENSORS,
    InferRequest,
    InferResponse,
    Tensor,
    Wanted,
    bad,
    from_bytes,
    to_bytes,
)
from suanli.types import Json

INFERENCE = "inference"
HEALTH = "grpc.health.v1"

# A field is NAME=NUMBER and a type; `*` repeated, `{}` a map from strings, `|GROUP` one of a group.
_NAMED = "name=1 string, version=2 string"
_TENSOR = "name=1 string, datatype=2 string, shape=3 int64*"
_IN_TENSOR = f"{_TENSOR}, parameters=4 InferParameter{{}}, contents=5 InferTensorContents"
_CHANGE = "repository_name=1 string, model_name=2 string, parameters=3 ModelRepositoryParameter{}"
_COMPUTE = "compute_input={} StatisticDuration, compute_infer={} StatisticDuration, compute_output={} StatisticDuration"
_FIELDS: dict[str, dict[str, str]] = {
    INFERENCE: {
        "ServerLiveRequest": "",
        "ServerLiveResponse": "live=1 bool",
        "ServerReadyRequest": "",
        "ServerReadyResponse": "ready=1 bool",
        "ModelReadyRequest": _NAMED,
        "ModelReadyResponse": "ready=1 bool",
        "ServerMetadataRequest": "",
        "ServerMetadataResponse": "name=1 string, version=2 string, extensions=3 string*",
        "ModelMetadataRequest": _NAMED,
        "ModelMetadataResponse": "name=1 string, versions=2 string*, platform=3 string, "
        "inputs=4 ModelMetadataResponse.TensorMetadata*, outputs=5 ModelMetadataResponse.TensorMetadata*",
        "ModelMetadataResponse.TensorMetadata": _TENSOR,
        "InferParameter": "bool_param=1 bool|parameter_choice, int64_param=2 int64|parameter_choice, "
        "string_param=3 string|parameter_choice, double_param=4 double|parameter_choice, "
        "uint64_param=5 uint64|parameter_choice",
        "InferTensorContents": "bool_contents=1 bool*, int_contents=2 int32*, int64_contents=3 int64*, "
        "uint_contents=4 uint32*, uint64_contents=5 uint64*, fp32_contents=6 float*, fp64_contents=7 double*, "
        "bytes_contents=8 bytes*",
        "ModelInferRequest": "model_name=1 string, model_version=2 string, id=3 string, parameters=4 InferParameter{}, "
        "inputs=5 ModelInferRequest.InferInputTensor*, outputs=6 ModelInferRequest.InferRequestedOutputTensor*, "
        "raw_input_contents=7 bytes*",
        "ModelInferRequest.InferInputTensor": _IN_TENSOR,
        "ModelInferRequest.InferRequestedOutputTensor": "name=1 string, parameters=2 InferParameter{}",
        "ModelInferResponse": "model_name=1 string, model_version=2 string, id=3 string, "
        "parameters=4 InferParameter{}, outputs=5 ModelInferResponse.InferOutputTensor*, raw_output_contents=6 bytes*",
        "ModelInferResponse.InferOutputTensor": _IN_TENSOR,
        "ModelStreamInferResponse": "error_message=1 string, infer_response=2 ModelInferResponse",
        "ModelConfigRequest": _NAMED,
        "ModelConfigResponse": "config=1 ModelConfig",
        "ModelConfig": "name=1 string, platform=2 string, backend=17 string, "
        "version_policy=3 ModelVersionPolicy, max_batch_size=4 int32, input=5 ModelInput*, output=6 ModelOutput*, "
        "instance_group=7 ModelInstanceGroup*, dynamic_batching=11 ModelDynamicBatching|scheduling_choice, "
        "parameters=14 ModelParameter{}, model_transaction_policy=19 ModelTransactionPolicy",
        "ModelVersionPolicy": "latest=1 ModelVersionPolicy.Latest|policy_choice, "
        "all=2 ModelVersionPolicy.All|policy_choice, specific=3 ModelVersionPolicy.Specific|policy_choice",
        "ModelVersionPolicy.Latest": "num_versions=1 uint32",
        "ModelVersionPolicy.All": "",
        "ModelVersionPolicy.Specific": "versions=1 int64*",
        "ModelInput": "name=1 string, data_type=2 DataType, dims=4 int64*, allow_ragged_batch=7 bool, optional=8 bool",
        "ModelOutput": "name=1 string, data_type=2 DataType, dims=3 int64*, label_filename=4 string",
        "ModelInstanceGroup": "name=1 string, count=2 int32, gpus=3 int32*, kind=4 InstanceKind",
        "ModelDynamicBatching": "preferred_batch_size=1 int32*, max_queue_delay_microseconds=2 uint64, "
        "preserve_ordering=3 bool",
        "ModelParameter": "string_value=1 string",
        "ModelTransactionPolicy": "decoupled=1 bool",
        "ModelStatisticsRequest": _NAMED,
        "ModelStatisticsResponse": "model_stats=1 ModelStatistics*",
        "ModelStatistics": f"{_NAMED}, last_inference=3 uint64, inference_count=4 uint64, execution_count=5 uint64, "
        "inference_stats=6 InferStatistics, batch_stats=7 InferBatchStatistics*",
        "StatisticDuration": "count=1 uint64, ns=2 uint64",
        "InferStatistics": "success=1 StatisticDuration, fail=2 StatisticDuration, queue=3 StatisticDuration, "
        f"{_COMPUTE.format(4, 5, 6)}, cache_hit=7 StatisticDuration, cache_miss=8 StatisticDuration",
        "InferBatchStatistics": f"batch_size=1 uint64, {_COMPUTE.format(2, 3, 4)}",
        "RepositoryIndexRequest": "repository_name=1 string, ready=2 bool",
        "RepositoryIndexResponse": "models=1 RepositoryIndexResponse.ModelIndex*",
        "RepositoryIndexResponse.ModelIndex": f"{_NAMED}, state=3 string, reason=4 string",
        "ModelRepositoryParameter": "bool_param=1 bool|parameter_choice, int64_param=2 int64|parameter_choice, "
        "string_param=3 string|parameter_choice, bytes_param=4 bytes|parameter_choice",
        "RepositoryModelLoadRequest": _CHANGE,
        "RepositoryModelLoadResponse": "",
        "RepositoryModelUnloadRequest": _CHANGE,
        "RepositoryModelUnloadResponse": "",
    },
    HEALTH: {
        "HealthCheckRequest": "service=1 string",
        "HealthCheckResponse": "status=1 ServingStatus",
    },
}
_ENUMS: dict[str, dict[str, str]] = {
    INFERENCE: {
        "DataType": "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 "
        "TYPE_INT32 TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16",
        "InstanceKind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
    },
    HEALTH: {"ServingStatus": "UNKNOWN SERVING NOT_SERVING SERVICE_UNKNOWN"},
}
_FIELD = re.compile(r"(\w+)=(\d+) ([\w.]+)(\*|\{\})?(?:\|(\w+))?")

# Where the numbers of a datatype are when they aren't raw. FP16 has no field.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


# --- the classes ---


@functools.cache
def message(name: str, package: str = INFERENCE) -> Any:
    """The class of a message, such as "ModelInferRequest". Needs protobuf."""
    from google.protobuf.message_factory import GetMessageClass

    return GetMessageClass(_pool().FindMessageTypeByName(f"{package}.{name}"))


@functools.cache
def _pool() -> Any:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from google.protobuf.descriptor_pool import DescriptorPool

    pool = DescriptorPool()
    for package, table in _FIELDS.items():
        file = FileDescriptorProto(name=f"suanli/{package}.proto", package=package, syntax="proto3")
        for enum, values in _ENUMS[package].items():
            described = file.enum_type.add(name=enum)
            for number, value in enumerate(values.split()):
                described.value.add(name=value, number=number)
        described = {}
        for name, fields in table.items():  # what holds a nested message comes before it
            outer, _, inner = name.rpartition(".")
            described[name] = (described[outer].nested_type if outer else file.message_type).add(name=inner)
            for field, number, kind, label, group in _FIELD.findall(fields):
                full = kind if kind.islower() else f".{package}.{kind}"
                _add_field(described[name], f".{package}.{name}", field, int(number), full, label, group)
        pool.Add(file)
    return pool


def _add_field(described: Any, owner: str, name: str, number: int, kind: str, label: str = "", group: str = "") -> None:
    """Adds the field to a DescriptorProto, whose full name is `owner`; for a map also the message of one entry."""
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto

    field = described.field.add(name=name, number=number, label="LABEL_REPEATED" if label else "LABEL_OPTIONAL")
    if label == "{}":
        entry = described.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, "", "key", 1, "string")
        _add_field(entry, "", "value", 2, kind)
        kind = f"{owner}.{entry.name}"
    if not kind.startswith("."):
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    else:
        enums = {enum for known in _ENUMS.values() for enum in known}
        enum = kind.rpartition(".")[2] in enums
        field.type = FieldDescriptorProto.TYPE_ENUM if enum else FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = kind
    if group:
        if all(known.name != group for known in described.oneof_decl):
            described.oneof_decl.add(name=group)
        field.oneof_index = [known.name for known in described.oneof_decl].index(group)


def filled(name: str, values: Mapping[str, Json]) -> Any:
    """A message with the values of a JSON object; keys that aren't in the table are passed over."""
    from google.protobuf.json_format import ParseDict

    return ParseDict(values, message(name)(), ignore_unknown_fields=True)


# --- from messages, and to them ---


def to_request(asked: Any) -> InferRequest:
    """What a ModelInferRequest asks. Raw bytes are not copied. Raises Refused(400) where it contradicts itself."""
    tensors, raws = asked.inputs, asked.raw_input_contents
    if not tensors:
        raise bad("inputs is missing: at least one tensor.")
    if len(tensors) > MAX_TENSORS or len(asked.outputs) > MAX_TENSORS:
        raise bad(f"There are {len(tensors)} inputs and {len(asked.outputs)} outputs; {MAX_TENSORS} are the most.")
    if raws and len(raws) != len(tensors):
        raise bad(f"raw_input_contents has {len(raws)} elements for {len(tensors)} inputs.")
    inputs = tuple(_tensor(tensor, raw) for tensor, raw in zip(tensors, raws or [None] * len(tensors), strict=True))
    if len({tensor.name for tensor in inputs}) < len(inputs):
        raise bad("Two inputs have one name.")
    return InferRequest(
        id=asked.id or None,
        inputs=inputs,
        outputs=tuple(map(_wanted, asked.outputs)),
        parameters=_values(asked.parameters),
        binary_output=True,
    )


def to_message(response: InferResponse) -> Any:
    """The ModelInferResponse of an answer."""
    answer = message("ModelInferResponse")(
        id=response.id or "", model_name=response.model_name, model_version=response.model_version
    )
    for tensor in response.outputs:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.append(to_bytes(tensor))
    return answer


def _tensor(sent: Any, raw: bytes | None) -> Tensor:
    name, datatype, shape = sent.name, sent.datatype, tuple(sent.shape)
    if not name:
        raise bad("An input has no name.")
    if datatype not in DATATYPES and datatype != "BYTES":
        known = ", ".join((*DATATYPES, "BYTES"))
        raise bad(f"The datatype of input {name[:200]!r} is {datatype[:40]!r}; there are {known}.")
    if len(shape) > MAX_RANK or min(shape, default=0) < 0:
        raise bad(
            f"The shape of input {name[:200]!r} is {list(shape[:MAX_RANK])}: 0 or more, {MAX_RANK} of them at most."
        )
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise bad(f"The shape of input {name[:200]!r} is {list(shape)}: larger than any request.")
    parameters = _values(sent.parameters)
    data: np.ndarray | list[bytes]
    if raw is None:
        data = _typed(name, datatype, shape, sent.contents)
    elif sent.HasField("contents") and sent.contents.ByteSize():
        raise bad(f"Input {name[:200]!r} has contents, and raw_input_contents too: only one of them.")
    else:
        data = from_bytes(name, datatype, shape, raw)
    return Tensor(name=name, datatype=datatype, shape=shape, data=data, parameters=parameters)


def _typed(name: str, datatype: str, shape: tuple[int, ...], contents: Any) -> np.ndarray | list[bytes]:
    """The data of a tensor from the field of its datatype."""
    field = _CONTENTS.get(datatype)
    if field is None:
        raise bad(f"Input {name!r} is {datatype}, which has no field in contents: use raw_input_contents.")
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        raise bad(f"Input {name!r} of {datatype} {list(shape)} has {len(values)} elements in {field}.")
    if datatype == "BYTES":
        if len(values) > MAX_STRINGS:
            raise bad(f"Input {name!r} has {len(values)} elements; {MAX_STRINGS} of BYTES are the most.")
        return list(values)
    dtype = DATATYPES[datatype]
    if dtype.kind not in "iu" or dtype.itemsize >= 4:  # the field is as wide as the datatype
        return np.fromiter(values, dtype, len(values)).reshape(shape)
    limits = np.iinfo(dtype)
    wide = np.fromiter(values, np.int64, len(values))
    if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
        raise bad(f"{field} of input {name!r} doesn't fit into {datatype} ({limits.min} to {limits.max}).")
    return wide.astype(dtype).reshape(shape)


def _wanted(asked: Any) -> Wanted:
    classes = _values(asked.parameters).get("classification", 0)
    if not asked.name:
        raise bad("An output has no name.")
    if type(classes) is not int or classes < 0:
        raise bad(f"classification of output {asked.name[:200]!r} is a number of 0 or more.")
    return Wanted(name=asked.name, binary=True, class_count=classes)


def _values(parameters: Mapping[str, Any]) -> dict[str, Json]:
    """A map of InferParameter as plain values; one that says nothing is None."""
    if not parameters:
        return {}
    if "shared_memory_region" in parameters:
        raise bad("Shared memory is not supported: send the bytes of a tensor in raw_input_contents.")
    chosen = {key: value.WhichOneof("parameter_choice") for key, value in parameters.items()}
    return {key: getattr(parameters[key], choice) if choice else None for key, choice in chosen.items()}
