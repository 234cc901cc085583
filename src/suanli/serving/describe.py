"""What a served model says of itself, in the words of those who ask: the protocol, Triton's extensions, the pages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from suanli.serving.figures import Figures
from suanli.serving.protocol import NAMES
from suanli.types import Json

if TYPE_CHECKING:
    from suanli.serving.model import ServedModel

MAX_INPUTS = 4096  # of one request
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]


@cache
def version() -> str:
    return importlib.metadata.version("suanli")


def server() -> dict[str, Json]:
    """Open Inference Protocol, "Server Metadata"."""
    return {"name": "suanli", "version": version(), "extensions": EXTENSIONS}


def metadata(model: ServedModel, versions: Sequence[str]) -> dict[str, Json]:
    """Open Inference Protocol, "Model Metadata". Every input may also be BYTES: encoded pictures, or texts."""
    row: dict[str, Json] = {"datatype": NAMES[np.dtype(model.about.row_dtype)], "shape": [-1, *model.about.row_shape]}
    given = row if model.preprocess.kind == "image" else {"datatype": "BYTES", "shape": [-1]}
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": f"suanli_{model.about.engine}",
        "inputs": [{"name": model.input_name} | given],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(model.about.classes)]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }


def config(model: ServedModel) -> dict[str, Json]:
    """Triton Inference Server's "Model Configuration": shapes are without the batch."""

    def tensor(values: Mapping[str, Json]) -> dict[str, Json]:
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


def stats(name: str, version: str, figures: Figures) -> dict[str, Json]:
    """Triton Inference Server's "Statistics"; durations in nanoseconds, the last inference in ms since 1970."""
    return {
        "name": name,
        "version": version,
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


def status(model: ServedModel) -> dict[str, Json]:
    """For the pages. What isn't known of a model that never came up is null."""
    figures = model.figures
    found: dict[str, Json] = {
        "name": model.name,
        "version": model.version,
        "state": model.state,
        "reason": model.reason,
        "requests": figures.answered.count,
        "refused": figures.refused[503],
        "failed": figures.failed.count - figures.refused[503],
        "p50_ms": figures.percentile_ms(0.5),
        "p99_ms": figures.percentile_ms(0.99),
        "restarts": figures.restarts,
        "memory_bytes": model.memory_bytes,
        "classes": [],
        "draws": False,
        "waiting": 0,
    } | dict.fromkeys(
        ("engine", "precision", "threads", "kind", "height", "width", "channels", "batch_limit", "target_ms")
    )
    if not model.known:
        return found
    kind, settings, classes = model.preprocess.kind, model.preprocess.settings(), list(model.about.classes)
    found |= {
        "engine": model.about.engine,
        "precision": model.about.precision,
        "threads": model.about.threads,
        "kind": kind,
        "classes": classes,
        "waiting": model.batcher.waiting,
        "batch_limit": model.policy.batch,
        "target_ms": 1e3 * model.policy.target_s,
    }
    if kind == "image":
        found |= {key: settings[key] for key in ("height", "width", "channels")}
        found["draws"] = settings["channels"] == 1 and set(classes) == set("0123456789")
    return found
