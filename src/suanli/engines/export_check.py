"""Checks an exported file: a new process that knows nothing of suanli reads it, and its answers are compared.

What a graph answers to random inputs is compared with the model in float32, on the CPU. There is no graph in
safetensors, so there the tensors are compared.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suanli.core.errors import GateError, MachineError
from suanli.core.storage import read_json
from suanli.engines.export_formats import ExportFormat
from suanli.models.model_folder import SavedModel

ROUNDING = 1e-3  # of a probability: what float32 in another order may cause
RANDOM_ROWS = 6  # inputs of the check
LIMIT_S = 600.0  # for the other process: to import, load, and answer a few inputs
READER = """
import json, sys
job = json.load(sys.stdin)
sys.path += [path for path in job["paths"] if path not in sys.path]
import numpy
path, tensors, answers = job["path"], {{}}, []
{read}
if answer is not None:
    rows = numpy.load(job["rows"], allow_pickle=False)
    alone = [answer(rows[i : i + 1]) for i in range(len(rows))]
    answers = [answer(rows).tolist(), numpy.concatenate(alone).tolist()]
assert not [name for name in sys.modules if name.split(".")[0] == "suanli"], "reading it needs suanli"
with open(job["result"], "w") as stream:
    json.dump({{"metadata": dict(metadata), "answers": answers, "tensors": tensors}}, stream)
"""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What the other process found in the file."""

    metadata: dict[str, str]
    answers: list[np.ndarray]  # probabilities of all rows at once, and one by one
    tensors: dict[str, list[object]]  # type, shape and digest of the bytes of each, where there is no graph


def check_export(
    saved: SavedModel, path: Path, export_format: ExportFormat, metadata: Mapping[str, str], work: Path
) -> float | None:
    """The largest difference of a probability to the model's; None for weights, which are equal. `work` is a folder
    for temporary files. Raises GateError where the file differs from the model, MachineError where it can't be read.
    """
    rows = _random_rows(saved)
    np.save(work / "rows.npy", rows, allow_pickle=False)
    reading = _read_in_process(path, export_format, list(metadata), work)
    if any(reading.metadata.get(name) != text for name, text in metadata.items()):
        raise MachineError("The exported file doesn't hold the metadata that was written.", fix="Try again.")
    if not export_format.has_graph:
        if reading.tensors != _digest_tensors(saved):
            raise GateError("The exported weights are not the model's.", fix="Nothing was kept; try again.")
        return None
    return _compare(reading.answers, _probabilities(saved, rows))


def _compare(answers: list[np.ndarray], expected: np.ndarray) -> float:
    if any(part.shape != expected.shape for part in answers):
        raise GateError(
            f"The exported file answers in the shape {answers[0].shape}, the model in {expected.shape}.",
            fix="Nothing was kept; choose another --to.",
        )
    difference = max(float(np.abs(part - expected).max()) for part in answers)
    if not difference <= ROUNDING:  # so that NaN is refused too
        raise GateError(
            f"The exported file gives other probabilities than the model: up to {difference:.3g} apart, where rounding "
            f"explains {ROUNDING:g}.",
            fix="Nothing was kept; choose another --to.",
        )
    return difference


def _random_rows(saved: SavedModel) -> np.ndarray:
    """Rows (6, *row_shape) from all zeros to the full range of values: noise of full strength alone may make a
    network so certain that no difference shows."""
    limit = saved.preprocess.model_args.get("vocabulary_size", 256)
    highs = np.geomspace(1, limit, RANDOM_ROWS).round().astype(int)
    random = np.random.default_rng(0)
    rows = [random.integers(0, high, saved.preprocess.row_shape) for high in highs]
    return np.stack(rows).astype(saved.preprocess.row_dtype)


def _probabilities(saved: SavedModel, rows: np.ndarray) -> np.ndarray:
    import torch

    from suanli.engines.inference_module import InferenceModule

    with torch.inference_mode():
        return InferenceModule(saved)(torch.from_numpy(rows)).numpy()  # type: ignore[no-any-return]


def _digest_tensors(saved: SavedModel) -> dict[str, list[object]]:
    """Type, shape and digest of the bytes of every tensor of the model, as READ_SAFETENSORS computes them."""
    import torch

    def describe(tensor: torch.Tensor) -> list[object]:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(tensor.dtype), list(tensor.shape), hashlib.blake2b(content).hexdigest()]

    return {name: describe(tensor) for name, tensor in saved.module.state_dict().items()}


def _read_in_process(path: Path, export_format: ExportFormat, metadata: list[str], work: Path) -> _Reading:
    """Raises MachineError where the file can't be read without suanli."""
    job = {
        "path": str(path),
        "metadata": metadata,
        "rows": str(work / "rows.npy"),
        "result": str(work / "result.json"),
        "paths": [path for path in sys.path if path],  # where this Python finds its packages
    }
    command = [sys.executable, "-I", "-c", READER.format(read=export_format.read)]
    try:
        subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired as error:
        raise _unreadable(f"not done after {LIMIT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise _unreadable(_explain_end(error)) from error
    result = read_json(work / "result.json")
    answers = [np.asarray(part, np.float32) for part in result["answers"]]
    return _Reading(metadata=result["metadata"], answers=answers, tensors=result["tensors"])


def _unreadable(reason: str) -> MachineError:
    return MachineError(
        f"The exported file can't be used without suanli ({reason}).", fix="Nothing was kept; choose another --to."
    )


def _explain_end(error: subprocess.CalledProcessError) -> str:
    """Why the other process ended."""
    if error.returncode < 0:
        with suppress(ValueError):
            return f"its reader crashed: {signal.Signals(-error.returncode).name}"
    lines = error.stderr.decode(errors="replace").rstrip().splitlines()
    stack = [i for i, line in enumerate(lines) if line.startswith("  ")]  # an error's own text follows it
    text = " ".join(" ".join(lines[stack[-1] + 1 if stack else 0 :]).split())
    return text[:300] or f"exit code {error.returncode}"
