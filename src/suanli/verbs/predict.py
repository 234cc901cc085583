"""predict: names and probabilities for inputs without labels. Reads nothing but the model folder."""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from suanli import hardware
from suanli.console import warn
from suanli.errors import BadInput, DataError
from suanli.inference import infer
from suanli.saved import load_model, model_folder
from suanli.types import AnyPath, Json, Preprocess, Raw, Step

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one input; `error` says why there is none."""

    name: str
    label: str | None
    probability: float | None
    probabilities: dict[str, float]  # the likeliest classes, best first
    error: str | None = None

    def to_json(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
            "error": self.error,
        }


def predict(
    model: AnyPath,
    inputs: AnyPath | Sequence[AnyPath],
    *,
    top: int = 5,
    device: str = "auto",
    trust_code: bool = False,
) -> list[Prediction]:
    """Predict files, folders, globs ("pictures/*.png") or standard input ("-").

    `model` is a run directory or its model/ folder. An input that can't be read gives a Prediction
    with `error`; an argument that names nothing at all raises DataError. `trust_code` runs the code
    that builds a network which is not suanli's own.
    """
    saved = load_model(model_folder(model), trust_code=trust_code)
    target = hardware.detect(device)
    step = Step(model=saved.module.to(target.torch_name))
    where = torch.device(target.torch_name)
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found: list[Prediction] = []
    with ThreadPoolExecutor(hardware.cores()) as pool:
        for chunk in _chunks(_named(saved.preprocess, given), BATCH):
            rows = list(pool.map(lambda item: _encode(saved.preprocess, item[1]), chunk))
            good = [r for r in rows if isinstance(r, np.ndarray)]
            answers = iter(())  # type: Iterator[np.ndarray]
            if good:
                batch = torch.from_numpy(np.stack(good)).to(where)
                answers = iter(infer(step, saved.preprocess, saved.task, [batch]))
            for (name, _), row in zip(chunk, rows, strict=True):
                if isinstance(row, np.ndarray):
                    found.append(_answer(name, next(answers), saved.classes, top))
                else:
                    warn(f"{name}: {row}")
                    found.append(Prediction(name=name, label=None, probability=None, probabilities={}, error=row))
    return found


Named = tuple[str, Callable[[], Raw]]


def _named(preprocess: Preprocess, given: Sequence[AnyPath]) -> Iterator[Named]:
    for item in given:
        for path in _paths(str(item)):
            yield from preprocess.inputs(path)


def _paths(item: str) -> list[Path]:
    if item == "-" and (sys.stdin is None or sys.stdin.closed):  # by `<&-`, or a service manager
        raise DataError("Standard input is closed.", fix="Pipe the inputs in, or name files.")
    if item == "-" or Path(item).expanduser().exists():
        return [Path(item).expanduser()]
    matches = sorted(glob.glob(str(Path(item).expanduser()), recursive=True))
    if not matches:
        raise DataError(
            f"There is nothing at {item}.",
            fix="Give files, folders, a quoted pattern, or - for standard input.",
        )
    return [Path(m) for m in matches]


def _chunks(items: Iterable[Named], count: int) -> Iterator[list[Named]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, count)):
        yield chunk


def _encode(preprocess: Preprocess, read: Callable[[], Raw]) -> np.ndarray | str:
    """The row of an input, or why there is none."""
    try:
        return preprocess.encode(read()).row
    except BadInput as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)


def _answer(name: str, probabilities: np.ndarray, classes: Sequence[str], top: int) -> Prediction:
    best = np.argsort(-probabilities, kind="stable")[: max(top, 1)]
    shown = {classes[i]: float(probabilities[i]) for i in best}
    return Prediction(name=name, label=classes[best[0]], probability=float(probabilities[best[0]]), probabilities=shown)


def table(predictions: Sequence[Prediction]) -> Table:
    """For people: a line for each input, the runners-up behind."""
    shown = Table("input", "label", "probability", "next", box=None, pad_edge=False)
    for p in predictions:
        others = "  ".join(f"{name} {value:.1%}" for name, value in list(p.probabilities.items())[1:3])
        shown.add_row(Text(p.name), Text(p.label or "-"), "" if p.error else f"{p.probability:.1%}", p.error or others)
    return shown


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Columns name, label, probability, error; quoted where needed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["name", "label", "probability", "error"])
    for p in predictions:
        writer.writerow([p.name, p.label or "", "" if p.probability is None else f"{p.probability:.6f}", p.error or ""])
    return stream.getvalue().rstrip("\n")
