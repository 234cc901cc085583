"""What a served model says of itself: the protocol's metadata, Triton's configuration and statistics, status."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cache

import numpy as np

from suanli.serving import bodies
from suanli.serving.model import MAX_INPUTS, ServedModel
from suanli.serving.protocol import NAMES

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]


@cache
def version() -> str:
    return importlib.metadata.version("suanli")


def server() -> bodies.ServerMetadata:
    return {"name": "suanli", "version": version(), "extensions": EXTENSIONS}


def metadata(model: ServedModel, versions: Sequence[str]) -> bodies.ModelMetadata:
    """Every input may also be BYTES: encoded pictures, or texts."""
    about, name = model.about, model.input_name
    taken: bodies.TensorMetadata = {"name": name, "datatype": "BYTES", "shape": [-1]}
    if model.preprocess.kind == "image":
        taken = {"name": name, "datatype": NAMES[np.dtype(about.row_dtype)], "shape": [-1, *about.row_shape]}
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": f"suanli_{about.engine}",
        "inputs": [taken],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(about.classes)]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }


def config(model: ServedModel) -> bodies.ModelConfig:
    """Shapes are without the batch."""

    def tensor(values: bodies.TensorMetadata) -> bodies.ConfiguredTensor:
        kind = "STRING" if values["datatype"] == "BYTES" else values["datatype"]
        return {"name": values["name"], "data_type": f"TYPE_{kind}", "dims": values["shape"][1:] or [1]}

    about = metadata(model, [model.version])
    return {
        "name": model.name,
        "platform": about["platform"],
        "backend": model.about.engine,
        "max_batch_size": MAX_INPUTS,
        "input": [tensor(values) for values in about["inputs"]],
        "output": [tensor(values) for values in about["outputs"]],
        "dynamic_batching": {"preferred_batch_size": [model.policy.batch], "max_queue_delay_microseconds": 0},
    }


def stats(model: ServedModel) -> bodies.ModelStats:
    """Durations in nanoseconds."""
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
    figures, about, settings = model.figures, model.about, model.preprocess.settings()
    return {
        "name": model.name,
        "version": model.version,
        "state": model.state,
        "reason": model.reason,
        "classes": list(about.classes),
        "engine": about.engine,
        "precision": about.precision,
        "threads": about.threads,
        "kind": model.preprocess.kind,
        "height": settings.get("height"),
        "width": settings.get("width"),
        "channels": settings.get("channels"),
        "draws": settings.get("channels") == 1 and set(about.classes) == set("0123456789"),
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
