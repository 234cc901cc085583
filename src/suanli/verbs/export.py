"""export: a trained model as a plain file, for use without suanli.

    onnx           one .onnx file
    openvino       a folder with model.xml and model.bin
    pt2            one .pt2 file, a program of torch.export
    safetensors    the weights alone, with what built the network

A graph takes cached rows (images: uint8 (B, H, W, C) of the working size; texts: token ids) and gives probabilities
(B, K) float32, so the second half of preprocessing, such as normalising, is inside it and must not be done again. The
metadata "preprocess" says how to get to such rows (height, width, channels, resize; vocabulary, length), "classes"
which class each column is, "rows" the shape and type of one row; all of it is JSON.

Every file is read again before it gets its name, in a new process that knows nothing of suanli, and what it answers to
made-up inputs is held against the model in float32. There is no graph in safetensors, so there the tensors are
compared, and no probabilities. What this doesn't do: lower precision (see optimize), or a check on another device than
the CPU. OpenVINO by itself computes in bfloat16 where the processor can; INFERENCE_PRECISION_HINT says otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suanli.core.console import size
from suanli.core.errors import GateError, MachineError, UsageError, pip_install, unknown
from suanli.core.run import is_run
from suanli.core.storage import json_bytes, raise_storage_errors, read_json
from suanli.core.types import AnyPath, Json
from suanli.machine import device
from suanli.models import build
from suanli.models.model_folder import SavedModel, find_model_folder, load_model

if TYPE_CHECKING:
    import torch

ROUNDING = 1e-3  # of a probability: what float32 in another order may cause
MADE_UP = 6  # inputs of the check
LIMIT_S = 600.0  # for the other process: to import, load, and answer a few inputs
XML = "model.xml"
ROW = "As the first half of preprocessing leaves it; the second half, such as normalising, is inside the graph."

# --- what the other process runs: `about` is the metadata, `answer` maps rows to probabilities ---

READ_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
answer = lambda rows: session.run(None, {"rows": rows})[0]
"""
READ_OPENVINO = f"""
sys.modules["openvino_telemetry"] = None  # else the import is reported to a server
import openvino
core = openvino.Core()
model = core.read_model(path + "/{XML}")
about = {{name: model.get_rt_info([name]).value for name in job["metadata"]}}
compiled = core.compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
answer = lambda rows: numpy.array(compiled(rows)[0])
"""
READ_PT2 = """
import torch
extra = {name + ".json": "" for name in job["metadata"]}
module = torch.export.load(path, extra_files=extra).module()
about = {name.removesuffix(".json"): text for name, text in extra.items()}
answer = lambda rows: module(torch.from_numpy(rows)).numpy()
"""
READ_SAFETENSORS = """
import hashlib
import torch
from safetensors import safe_open
with safe_open(path, framework="pt") as file:
    about = file.metadata()
    for name in file.keys():
        tensor = file.get_tensor(name)
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        tensors[name] = [str(tensor.dtype), list(tensor.shape), hashlib.blake2b(content).hexdigest()]
answer = None
"""
READER = """
import json, sys
job = json.load(sys.stdin)
sys.path += [place for place in job["places"] if place not in sys.path]
import numpy
path, tensors, answers = job["path"], {{}}, []
{read}
if answer is not None:
    rows = numpy.load(job["rows"], allow_pickle=False)
    alone = [answer(rows[i : i + 1]) for i in range(len(rows))]
    answers = [answer(rows).tolist(), numpy.concatenate(alone).tolist()]
assert not [name for name in sys.modules if name.split(".")[0] == "suanli"], "reading it needs suanli"
with open(job["found"], "w") as stream:
    json.dump({{"about": dict(about), "answers": answers, "tensors": tensors}}, stream)
"""


@dataclass(frozen=True, kw_only=True)
class Form:
    """One kind of file that can be written."""

    suffix: str  # behind the name of the run
    packages: tuple[str, ...]  # what writes it and reads it, beside suanli's own requirements
    write: Callable[[SavedModel, Path, Mapping[str, str]], None]  # model, path, metadata
    read: str  # source of what reads it
    use: str  # how to use it, in one line; {path} is the file
    folder: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A file that was written and checked."""

    path: Path
    to: str
    size_bytes: int
    difference: float | None  # largest one of a probability to the model's; None: weights, and they are equal
    use: str  # how to use it, in one line

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"path": str(self.path)}


def export(subject: AnyPath, *, to: str, out: AnyPath | None = None, trust_code: bool = False) -> ExportResult:
    """Write the model of a run or a model folder as a plain file, and hold it against the model in a new process.

    `to` is "onnx", "openvino", "pt2" or "safetensors"; `out` the file, for openvino the folder (default: the name of
    the run and the form's suffix, in the current directory). Raises UsageError for an unknown form and where `out`
    exists, MachineError where a package is missing, the network can't be exported or the file can't be read again,
    GateError where a probability differs by more than 0.001 or a weight at all, StorageError where nothing can be
    written. After an error nothing is left behind. The check of safetensors compares tensors, not probabilities.
    """
    if to not in FORMS:
        raise unknown("form to export to", to, FORMS)
    form = FORMS[to]
    folder = find_model_folder(subject)
    target = Path(f"{_name(folder)}{form.suffix}") if out is None else Path(out).expanduser()
    _refuse_taken(target, form)
    _refuse_missing(to, form)
    saved = load_model(folder, trust_code=trust_code)
    metadata = _metadata(saved, to)
    with _work(target) as work:
        made = work / f"model{form.suffix}"
        form.write(saved, made, metadata)
        difference = _checked(saved, made, form, metadata, work)
        files = [made] if made.is_file() else sorted(made.iterdir())
        size_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        _refuse_taken(target, form)  # again: another may have written meanwhile
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, target)
    use = form.use.format(path=str(target), row=_row(saved), model=saved.recipe.model)
    return ExportResult(path=target, to=to, size_bytes=size_bytes, difference=difference, use=use)


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and is_run(folder.parent) else folder.name


def _refuse_taken(target: Path, form: Form) -> None:
    with raise_storage_errors(target):
        empty_folder = target.is_dir() and not any(target.iterdir())
        if os.path.lexists(target) and not (form.folder and empty_folder):
            what = " and is not an empty directory" if form.folder else ""
            raise UsageError(f"{target} exists{what}.", fix="Choose a new --out, or remove it.")


def _refuse_missing(to: str, form: Form) -> None:
    if missing := [package for package in form.packages if importlib.util.find_spec(package) is None]:
        raise MachineError(
            f"Export to {to} needs {', '.join(missing)}.", fix=f"Install it: {pip_install('suanli[engines]')}"
        )


@contextmanager
def _work(target: Path) -> Iterator[Path]:
    """A folder on the target's file system that is gone afterwards. The target's own folder may still have to be
    made, and is made last."""
    with raise_storage_errors(target):
        place = next(parent for parent in target.absolute().parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=place, prefix=".suanli-export-", suffix=".tmp") as work:
            yield Path(work)


def _row(saved: SavedModel) -> str:
    return f"{saved.preprocess.row_dtype} ({', '.join(map(str, ('B', *saved.preprocess.row_shape)))})"


def _metadata(saved: SavedModel, to: str) -> dict[str, str]:
    about: dict[str, Json] = {
        "classes": list(saved.classes),
        "preprocess": saved.preprocess.to_json(),
    }
    if to != "safetensors":
        about["rows"] = {
            "shape": list(saved.preprocess.row_shape),
            "dtype": saved.preprocess.row_dtype,
            "about": ROW,
        }
    else:
        about["model_args"] = build.builder_arguments(saved.recipe, saved.preprocess, len(saved.classes))
    texts = {name: json_bytes(value).decode().strip() for name, value in about.items()}
    return texts if to != "safetensors" else texts | {"model": saved.recipe.model, "format": "pt"}


# --- writing ---


def _write_onnx(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    from suanli.engines.inference_module import write_onnx

    try:
        write_onnx(saved, path, metadata)
    except MachineError as error:
        fix = "Choose another form: --to pt2 needs no ONNX, --to safetensors holds the weights alone."
        raise MachineError(error.message, fix=fix) from error


def _write_openvino(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    from suanli.engines.backends.openvino import import_openvino
    from suanli.engines.inference_module import innermost_cause

    given = path.with_suffix(".onnx")
    _write_onnx(saved, given, {})
    graph = given.read_bytes()
    given.unlink()
    openvino = import_openvino()
    fix = "Choose another form: --to onnx or pt2."
    try:
        model = openvino.Core().read_model(graph)
    except RuntimeError as error:
        raise MachineError(f"OpenVINO can't take this network ({innermost_cause(error)}).", fix=fix) from error
    for name, text in metadata.items():
        model.set_rt_info(text, [name])
    path.mkdir()
    try:
        openvino.save_model(model, path / XML, compress_to_fp16=False)
    except RuntimeError as error:
        (path / XML).write_bytes(graph)  # as much; where the disk is the reason, this says so
        raise MachineError(f"OpenVINO can't write this network ({innermost_cause(error)}).", fix=fix) from error


def _write_pt2(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    import torch

    from suanli.engines.inference_module import MAX_BATCH, InferenceModule, example_rows, innermost_cause

    whole, rows = (
        InferenceModule(saved),
        example_rows(saved.preprocess, 3),
    )  # a batch of one would be taken for a constant
    stream = io.BytesIO()  # written to disk by Python, whose errors say what is wrong with the disk
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            whole(rows)  # constants that are made at the first call and kept must not be made by the exporter
            shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
            program = torch.export.export(whole, (rows,), dynamic_shapes=shapes)
            for part in program.graph_module.modules():
                for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # names files of this machine
            extra = {f"{name}.json": text for name, text in metadata.items()}
            torch.export.save(program, stream, extra_files=extra)
    except Exception as error:  # a user's network may raise anything while it is traced
        if device.is_out_of_memory(error):
            raise
        raise MachineError(
            f"This network can't be written as a program of torch.export ({innermost_cause(error)}).",
            fix="Choose another form: --to safetensors holds the weights alone.",
        ) from error
    path.write_bytes(stream.getbuffer())


def _write_safetensors(saved: SavedModel, path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    state = {name: value.contiguous().clone() for name, value in saved.module.state_dict().items()}
    path.write_bytes(save(state, metadata=dict(metadata)))


# --- checking ---


def _checked(saved: SavedModel, made: Path, form: Form, metadata: Mapping[str, str], work: Path) -> float | None:
    """The largest difference of a probability to the model's; None for weights, which are equal. Raises GateError."""
    rows = _made_up(saved)
    np.save(work / "rows.npy", rows, allow_pickle=False)
    found = _read_apart(made, form, list(metadata), work)
    if any(found["about"].get(name) != text for name, text in metadata.items()):
        raise MachineError("The exported file doesn't hold the metadata that was written.", fix="Try again.")
    if form.read == READ_SAFETENSORS:
        if found["tensors"] != _digests(saved):
            raise GateError("The exported weights are not the model's.", fix="Nothing was kept; try again.")
        return None
    expected = _probabilities(saved, rows)
    given = [np.asarray(answers, np.float32) for answers in found["answers"]]
    if any(answers.shape != expected.shape for answers in given):
        raise GateError(
            f"The exported file answers in the shape {given[0].shape}, the model in {expected.shape}.",
            fix="Nothing was kept; choose another --to.",
        )
    difference = max(float(np.abs(answers - expected).max()) for answers in given)
    if not difference <= ROUNDING:  # so that NaN is refused too
        raise GateError(
            f"The exported file gives other probabilities than the model: up to {difference:.3g} apart, where rounding "
            f"explains {ROUNDING:g}.",
            fix="Nothing was kept; choose another --to.",
        )
    return difference


def _made_up(saved: SavedModel) -> np.ndarray:
    """Rows (6, *row_shape) from all zeros to all that a row can hold: noise of full strength alone may drive a
    network to certainty, where no difference shows."""
    limit = saved.preprocess.model_args.get("vocabulary_size", 256)
    highs = np.geomspace(1, limit, MADE_UP).round().astype(int)
    random = np.random.default_rng(0)
    rows = [random.integers(0, high, saved.preprocess.row_shape) for high in highs]
    return np.stack(rows).astype(saved.preprocess.row_dtype)


def _probabilities(saved: SavedModel, rows: np.ndarray) -> np.ndarray:
    import torch

    from suanli.engines.inference_module import InferenceModule

    with torch.inference_mode():
        return InferenceModule(saved)(torch.from_numpy(rows)).numpy()  # type: ignore[no-any-return]


def _digests(saved: SavedModel) -> dict[str, Json]:
    """Type, shape and digest of the bytes of every tensor of the model, as the other process tells them."""
    import torch

    def told(tensor: torch.Tensor) -> Json:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(tensor.dtype), list(tensor.shape), hashlib.blake2b(content).hexdigest()]

    return {name: told(tensor) for name, tensor in saved.module.state_dict().items()}


def _read_apart(made: Path, form: Form, metadata: list[str], work: Path) -> dict[str, Json]:
    """What a new process without suanli finds in the file. Raises MachineError where it can't read it."""
    job = {
        "path": str(made),
        "metadata": metadata,
        "rows": str(work / "rows.npy"),
        "found": str(work / "found.json"),
        "places": [place for place in sys.path if place],  # where this Python finds its packages
    }
    command = [sys.executable, "-I", "-c", READER.format(read=form.read)]
    try:
        subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired as error:
        raise _unreadable(f"not done after {LIMIT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise _unreadable(_end(error)) from error
    return dict(read_json(work / "found.json"))


def _unreadable(why: str) -> MachineError:
    return MachineError(
        f"The exported file can't be used without suanli ({why}).", fix="Nothing was kept; choose another --to."
    )


def _end(error: subprocess.CalledProcessError) -> str:
    """Why the other process ended."""
    if error.returncode < 0:
        with suppress(ValueError):
            return f"its reader crashed: {signal.Signals(-error.returncode).name}"
    lines = error.stderr.decode(errors="replace").rstrip().splitlines()
    stack = [i for i, line in enumerate(lines) if line.startswith("  ")]  # an error's own text follows it
    told = " ".join(" ".join(lines[stack[-1] + 1 if stack else 0 :]).split())
    return told[:300] or f"exit code {error.returncode}"


FORMS = {
    "onnx": Form(
        suffix=".onnx",
        packages=("onnx", "onnxscript", "onnxruntime"),
        write=_write_onnx,
        read=READ_ONNX,
        use="onnxruntime.InferenceSession({path!r}).run(None, {{'rows': rows}})[0], rows: {row}",
    ),
    "openvino": Form(
        suffix="-openvino",
        packages=("onnx", "onnxscript", "openvino"),
        write=_write_openvino,
        read=READ_OPENVINO,
        use=f"openvino.compile_model({{path!r}} + '/{XML}', 'CPU')(rows)[0], rows: {{row}}",
        folder=True,
    ),
    "pt2": Form(
        suffix=".pt2",
        packages=(),
        write=_write_pt2,
        read=READ_PT2,
        use="torch.export.load({path!r}).module()(torch.from_numpy(rows)), rows: {row}",
    ),
    "safetensors": Form(
        suffix=".safetensors",
        packages=(),
        write=_write_safetensors,
        read=READ_SAFETENSORS,
        use="safetensors.torch.load_file({path!r}), for the network {model} that the metadata tells how to build",
    ),
}


# --- for people ---


def summarize(exported: ExportResult) -> str:
    """Where the file is, its size, how it was checked, and how to use it."""
    if exported.difference is None:
        held = "every tensor is the model's"
    else:
        held = f"read without suanli, its probabilities are within {exported.difference:.2g} of the model's"
    return f"{exported.path} ({size(exported.size_bytes)}): {held}.\nUse it: {exported.use}"
