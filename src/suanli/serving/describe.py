"""Descriptions of the server and its models: the protocol's metadata, Triton's configuration and statistics, status."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cache

from suanli.serving import bodies
from suanli.serving.model import ServedModel
from suanli.serving.tensors import MAX_INPUTS, TensorInfo

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]


@cache
def version() -> str:
    return importlib.metadata.version("suanli")


def server() -> bodies.ServerMetadata:
    return {"name": "suanli", "version": version(), "extensions": EXTENSIONS}


def metadata(model: ServedModel, versions: Sequence[str]) -> bodies.ModelMetadata:
    """Inputs and outputs. A client may also send raw inputs as BYTES: encoded pictures, or texts."""
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": f"suanli_{model.info.engine}",
        "inputs": [_describe(tensor) for tensor in model.signature.inputs],
        "outputs": [_describe(tensor) for tensor in model.signature.outputs],
    }


def _describe(tensor: TensorInfo) -> bodies.TensorMetadata:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": [-1, *tensor.shape]}


def config(model: ServedModel) -> bodies.ModelConfig:
    """Triton's model configuration, whose shapes don't include the batch."""

    def tensor(values: bodies.TensorMetadata) -> bodies.ConfiguredTensor:
        kind = "STRING" if values["datatype"] == "BYTES" else values["datatype"]
        return {"name": values["name"], "data_type": f"TYPE_{kind}", "dims": values["shape"][1:] or [1]}

    tensors = metadata(model, [model.version])
    return {
        "name": model.name,
        "platform": tensors["platform"],
        "backend": model.info.engine,
        "max_batch_size": MAX_INPUTS,
        "input": [tensor(values) for values in tensors["inputs"]],
        "output": [tensor(values) for values in tensors["outputs"]],
        "dynamic_batching": {"preferred_batch_size": [model.policy.batch], "max_queue_delay_microseconds": 0},
    }


def stats(model: ServedModel) -> bodies.ModelStats:
    """Triton's statistics. Durations are in nanoseconds."""
    figures = model.figures
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round(figures.last_s * 1e3),
        "inference_count": figures.inputs,
        "execution_count": figures.infer.count,
        "inference_stats": {
            "success": figures.answered.to_json(),
            "fail": figures.failed.to_json(),
            "queue": figures.queue.to_json(),
            "compute_input": figures.encode.to_json(),
            "compute_infer": figures.infer.to_json(),
            "compute_output": figures.output.to_json(),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": {"count": times.count, "ns": 0},
                "compute_infer": times.to_json(),
                "compute_output": {"count": times.count, "ns": 0},
            }
            for size, times in sorted(figures.batches.items())
        ],
    }


def status(model: ServedModel) -> bodies.ModelStatus:
    """What the pages show of a model."""
    figures, info, preprocess, empty = model.figures, model.info, model.preprocess, model.empty
    settings = preprocess.settings()
    return {
        "name": model.name,
        "version": model.version,
        "state": model.state,
        "reason": model.reason,
        "classes": list(model.task.classes),
        "engine": info.engine,
        "precision": info.precision,
        "threads": info.threads,
        "kind": preprocess.kind,
        "media_types": list(preprocess.media_types),
        "takes_strings": preprocess.takes_strings,
        "fields": preprocess.fields,
        "height": settings.get("height"),
        "width": settings.get("width"),
        "channels": settings.get("channels"),
        "task": model.task.name,
        "answer": {
            "kind": empty.kind,
            "columns": list(empty.columns),
            "values": dict(empty.values),
            "threshold": model.task.shown_from,
        },
        "batch_limit": model.policy.batch,
        "target_ms": 1e3 * model.policy.target_s,
        "p50_ms": figures.percentile_ms(0.5),
        "p99_ms": figures.percentile_ms(0.99),
        "memory_bytes": model.memory_bytes,
        "waiting": model.batcher.waiting,
        "requests": figures.answered.count,
        "refused": figures.refused[503],
        "failed": figures.failed.count - figures.refused[503],
        "restarts": figures.restarts,
    }
