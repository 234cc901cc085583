"""Checks an exported file: a new process that knows nothing of suanli reads it, and its answers are compared.

Every output that a graph gives for random inputs is compared with the model's in float32, on the CPU. There is no graph
in safetensors, so there the tensors are compared.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suanli.core.errors import GateError, MachineError
from suanli.core.schema import Arrays, random_inputs
from suanli.core.storage import read_json
from suanli.core.task import Task
from suanli.engines.differences import LIST_DRIFT, largest_difference, value_range
from suanli.engines.examples import StackedExamples
from suanli.engines.export_formats import ExportFormat
from suanli.models.model_folder import SavedModel

ROUNDING = 1e-3  # what float32 in another order may cause: of a probability, or of what an output ranges over
RANDOM_INPUTS = 6  # of the check
LIMIT_S = 600.0  # for the other process: to import, load, and answer a few inputs
READER = """
import json, sys
job = json.load(sys.stdin)
sys.path += [path for path in job["paths"] if path not in sys.path]
import numpy
path, tensors = job["path"], {{}}
{read}
if answer is not None:
    inputs = {{name: numpy.load(file, allow_pickle=False) for name, file in job["inputs"].items()}}
    alone = [answer({{name: array[i : i + 1] for name, array in inputs.items()}}) for i in range(job["count"])]
    for part, answers in (("all", answer(inputs)), ("alone", list(map(numpy.concatenate, zip(*alone))))):
        for number, array in enumerate(answers):
            numpy.save(f"{{job['work']}}/{{part}}{{number}}.npy", array)
assert not [name for name in sys.modules if name.split(".")[0] == "suanli"], "reading it needs suanli"
with open(job["result"], "w") as stream:
    json.dump({{"metadata": dict(metadata), "tensors": tensors}}, stream)
"""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What the other process found in the file."""

    metadata: dict[str, str]
    answers: list[dict[str, np.ndarray]]  # to all inputs at once, and to one by one
    tensors: dict[str, list[object]]  # type, shape and digest of the bytes of each, where there is no graph


def check_export(
    saved: SavedModel, path: Path, export_format: ExportFormat, metadata: Mapping[str, str], work: Path
) -> float | None:
    """The largest difference of an answer to the model's, as `differences.py` measures it, of lists their median drift;
    None for weights, which are equal. `work` is a folder for temporary files. Raises GateError where the file differs
    from the model, MachineError where it can't be read.
    """
    inputs = random_inputs(saved.preprocess.inputs, RANDOM_INPUTS)
    outputs = tuple(saved.task.outputs) if export_format.has_graph else ()
    reading = _read_in_process(path, export_format, list(metadata), inputs, outputs, work)
    if any(reading.metadata.get(name) != text for name, text in metadata.items()):
        raise MachineError("The exported file doesn't hold the metadata that was written.", fix="Try again.")
    if not export_format.has_graph:
        if reading.tensors != _digest_tensors(saved):
            raise GateError("The exported weights are not the model's.", fix="Nothing was kept; try again.")
        return None
    return _compare(saved.task, reading.answers, _answers(saved, inputs))


def _compare(task: Task, answers: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> float:
    for part in answers:
        for name, array in expected.items():
            if part[name].shape != array.shape:
                raise GateError(
                    f"The exported file answers in the shape {part[name].shape}, the model in {array.shape} ({name}).",
                    fix="Nothing was kept; choose another --to.",
                )
    ranges = value_range(StackedExamples(arrays=expected), task.listed)
    difference = max(largest_difference(expected, part, ranges) for part in answers)
    # The median: one of the inputs is constant, where all places may be equally likely and any of them is an answer.
    drift = max(float(np.median(task.drift(expected, part))) for part in answers) if task.listed else 0.0
    for what, amount, most in (("up to", difference, ROUNDING), ("in the median", drift, LIST_DRIFT)):
        if not amount <= most:  # so that NaN is refused too
            raise GateError(
                f"The exported file gives other answers than the model: {what} {amount:.3g} apart, where rounding "
                f"explains {most:g}.",
                fix="Nothing was kept; choose another --to.",
            )
    return max(difference, drift)


def _answers(saved: SavedModel, inputs: Arrays) -> dict[str, np.ndarray]:
    import torch

    from suanli.engines.inference_module import InferenceModule, to_arrays, to_tensors

    module = InferenceModule(saved)
    with torch.inference_mode():
        return to_arrays(module.outputs, module(*to_tensors(inputs, tuple(inputs))))


def _digest_tensors(saved: SavedModel) -> dict[str, list[object]]:
    """Type, shape and digest of the bytes of every tensor of the model, as READ_SAFETENSORS computes them."""
    import torch

    def describe(tensor: torch.Tensor) -> list[object]:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(tensor.dtype), list(tensor.shape), hashlib.blake2b(content).hexdigest()]

    return {name: describe(tensor) for name, tensor in saved.module.state_dict().items()}


def _read_in_process(
    path: Path, export_format: ExportFormat, metadata: list[str], inputs: Arrays, outputs: Sequence[str], work: Path
) -> _Reading:
    """Raises MachineError where the file can't be read without suanli."""
    files = {name: f"{work}/input{number}.npy" for number, name in enumerate(inputs)}
    for name, array in inputs.items():
        np.save(files[name], array, allow_pickle=False)
    job = {
        "path": str(path),
        "metadata": metadata,
        "inputs": files,
        "outputs": outputs,
        "count": RANDOM_INPUTS,
        "work": str(work),
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
    answers = [
        {name: np.load(work / f"{part}{number}.npy") for number, name in enumerate(outputs)}
        for part in ("all", "alone")
    ]
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
