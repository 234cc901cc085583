"""export: a trained model as a plain file, for use without suanli.

The formats are in `engines/export_formats.py`. Before a file gets its name it is read again, in a new process that
knows nothing of suanli, and compared with the model (`engines/export_check.py`). This never lowers the precision (see
optimize). OpenVINO by itself computes in bfloat16 where the processor can; INFERENCE_PRECISION_HINT says otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent

from suanli.core.console import size
from suanli.core.errors import MachineError, UsageError, pip_install, unknown
from suanli.core.run import is_run
from suanli.core.storage import raise_storage_errors
from suanli.core.types import AnyPath
from suanli.engines.export_check import check_export
from suanli.engines.export_formats import FORMATS, ExportFormat, build_metadata
from suanli.models.model_folder import SavedModel, find_model_folder, load_model


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A file that was written and checked."""

    path: Path
    to: str
    size_bytes: int
    difference: float | None  # largest one of an answer to the model's; None: weights, and they are equal
    use: str  # how to use it, in one line
    code: str | None  # Python that makes its inputs of a file `path`, without suanli; None: there is none

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"path": str(self.path)}


def export(
    subject: AnyPath, *, to: str, out: AnyPath | None = None, raw: bool = False, trust_code: bool = False
) -> ExportResult:
    """Write the model of a run or a model folder as a plain file, and compare it with the model in a new process.

    `to` is "onnx", "openvino", "pt2", "litert" or "safetensors"; `out` the file, for openvino the folder (default: the
    name of the run and the format's suffix, in the current directory). `raw`: the file gives what the network returns,
    such as the logits of a classifier, or all boxes of a detector and their logits. Raises UsageError for an unknown
    format and where `out` exists, MachineError where a package is missing, the network can't be exported or the file
    can't be read again, GateError where an answer differs by more than 0.001 (of a probability, or of what an output
    ranges over; lists by a drift of more than 0.02) or a weight at all, StorageError where nothing can be written.
    After an error nothing is left behind. For safetensors, tensors are compared instead of answers.
    """
    if to not in FORMATS:
        raise unknown("export format", to, FORMATS)
    export_format = FORMATS[to]
    folder = find_model_folder(subject)
    if raw and not export_format.has_graph:
        raise UsageError(f"A {to} file has the weights alone, with or without --raw.", fix="Leave --raw out.")
    name = f"{_name(folder)}{'-raw' if raw else ''}{export_format.suffix}"
    target = Path(name) if out is None else Path(out).expanduser()
    _refuse_occupied(target, export_format)
    _refuse_missing_packages(to, export_format)
    saved = load_model(folder, trust_code=trust_code)
    if raw:
        from suanli.engines.inference_module import without_predictions  # needs torch

        saved = without_predictions(saved)
    metadata = build_metadata(saved, export_format)
    with _work_folder(target) as work:
        draft = work / f"model{export_format.suffix}"
        export_format.write(saved, draft, metadata)
        difference = check_export(saved, draft, export_format, metadata, work)
        size_bytes = _flush(draft)
        _refuse_occupied(target, export_format)  # again: another process may have written meanwhile
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft, target)
    use = export_format.usage.format(path=str(target), model=saved.recipe.model, **_describe_call(saved))
    return ExportResult(
        path=target,
        to=to,
        size_bytes=size_bytes,
        difference=difference,
        use=use,
        code=saved.preprocess.encoding_code if export_format.has_graph else None,
    )


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and is_run(folder.parent) else folder.name


def _refuse_occupied(target: Path, export_format: ExportFormat) -> None:
    with raise_storage_errors(target):
        empty_folder = target.is_dir() and not any(target.iterdir())
        if os.path.lexists(target) and not (export_format.is_folder and empty_folder):
            what = " and is not an empty directory" if export_format.is_folder else ""
            raise UsageError(f"{target} exists{what}.", fix="Choose a new --out, or remove it.")


def _refuse_missing_packages(to: str, export_format: ExportFormat) -> None:
    if missing := [package for package in export_format.packages if importlib.util.find_spec(package) is None]:
        raise MachineError(
            f"Export to {to} needs {', '.join(missing)}.",
            fix=f"Install it: {pip_install(f'suanli[{export_format.extra}]')}",
        )


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system. The target's own folder may not exist yet; it is created last."""
    with raise_storage_errors(target):
        place = next(parent for parent in target.absolute().parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=place, prefix=".suanli-export-", suffix=".tmp") as work:
            yield Path(work)


def _flush(path: Path) -> int:
    """Makes sure that a file, or the files of a folder, are on the disk. Returns their size in bytes."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return sum(file.stat().st_size for file in files)


def _describe_call(saved: SavedModel) -> dict[str, str]:
    """The inputs as arguments, and what each of them is."""
    schema = saved.preprocess.inputs
    shapes = {name: ", ".join(map(str, ("B", *column.shape))) for name, column in schema.items()}
    return {
        "feed": f"{{{', '.join(f'{name!r}: {name}' for name in schema)}}}",
        "first": "[0]" if len(saved.task.outputs) == 1 else "",
        "arguments": ", ".join(f"args_{place}={name}" for place, name in enumerate(schema)),
        "tensors": ", ".join(f"torch.from_numpy({name})" for name in schema),
        "inputs": ", ".join(f"{name}: {column.dtype} ({shapes[name]})" for name, column in schema.items()),
    }


# --- for people ---


def summarize(result: ExportResult) -> str:
    """Where the file is, its size, how it was checked, and how to use it."""
    if result.difference is None:
        check = "every tensor equals the model's"
    else:
        check = f"read without suanli, its answers are within {result.difference:.2g} of the model's"
    text = f"{result.path} ({size(result.size_bytes)}): {check}.\nUse it: {result.use}"
    return f"{text}\nTo prepare its input from the file `path`:\n{indent(result.code, '    ')}" if result.code else text
