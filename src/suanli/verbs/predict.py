"""predict: names and probabilities for inputs without labels. Reads nothing but the model folder."""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from suanli import hardware
from suanli.console import warn
from suanli.errors import BadInput, DataError
from suanli.predictor import BATCH, Prediction, Predictor, load
from suanli.types import AnyPath, Preprocess, Raw


def predict(
    model: AnyPath,
    inputs: AnyPath | Sequence[AnyPath],
    *,
    top: int = 5,
    engine: str = "auto",
    device: str = "auto",
    trust_code: bool = False,
) -> list[Prediction]:
    """Predict files, folders, globs ("pictures/*.png") or standard input ("-").

    `model` is a run directory or its model/ folder. An input that can't be read gives a Prediction
    with `error`; an argument that names nothing at all raises DataError. `engine` is that of `suanli.load`.
    `trust_code` runs the code that builds a network which is not suanli's own.
    """
    answering = load(model, engine=engine, device=device, trust_code=trust_code)
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found: list[Prediction] = []
    with ThreadPoolExecutor(hardware.cores()) as pool:
        for chunk in _chunks(_named(answering.preprocess, given), BATCH):
            rows = list(pool.map(lambda item: _encode(answering, item[1]), chunk))
            found += answering.named([name for name, _ in chunk], rows, top=top)
    for prediction in found:
        if prediction.error is not None:
            warn(f"{prediction.name}: {prediction.error}")
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


def _encode(answering: Predictor, read: Callable[[], Raw]) -> np.ndarray | str:
    """The row of an input, or why there is none."""
    try:
        return answering.encode(read())
    except OSError as error:
        return error.strerror or str(error)
    except BadInput as error:
        return error.message


def table(predictions: Sequence[Prediction]) -> Table:
    """For people: a line for each input, the runners-up behind."""
    shown = Table("input", "label", "probability", "next", box=None, pad_edge=False)
    for p in predictions:
        others = "  ".join(f"{name} {value:.1%}" for name, value in list(p.probabilities.items())[1:3])
        share = "" if p.error else f"{p.probability:.1%}"
        shown.add_row(Text(p.name), Text(p.label or "-"), share, Text(p.error or others))
    return shown


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Columns name, label, probability, error; quoted where needed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["name", "label", "probability", "error"])
    for p in predictions:
        writer.writerow([p.name, p.label or "", "" if p.probability is None else f"{p.probability:.6f}", p.error or ""])
    return stream.getvalue().rstrip("\n")
