"""predict: names and probabilities for inputs without labels. Reads nothing but the model folder."""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from suanli.core.console import warn
from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.registry import load as load_plugin
from suanli.core.types import AnyPath, Preprocess, Raw
from suanli.engines.predictor import BATCH, Prediction, Predictor, load
from suanli.machine.device import cores


def predict(
    model: AnyPath | None,
    inputs: AnyPath | Sequence[AnyPath],
    *,
    top: int = 5,
    engine: str = "auto",
    device: str = "auto",
    trust_code: bool = False,
    url: str | None = None,
) -> list[Prediction]:
    """Predict files, folders, globs ("pictures/*.png") or standard input ("-").

    `model` is a run directory or its model/ folder. An input that can't be read gives a Prediction
    with `error`; an argument that names nothing at all raises DataError. `engine` is that of `suanli.load`.
    `trust_code` runs the code that builds a network which is not suanli's own. With `url`, a server answers (see
    `suanli serve`) and `model` is None.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if url is not None:
        return _warned(_from_server(url, given, top))
    if model is None:
        raise UsageError("There is no model to predict with.", fix="Name a run or a model folder, or give url.")
    answering = load(model, engine=engine, device=device, trust_code=trust_code)
    found: list[Prediction] = []
    with ThreadPoolExecutor(cores()) as pool:
        for chunk in _chunks(_named(answering.preprocess, given), BATCH):
            rows = list(pool.map(lambda item: _encode(answering, item[1]), chunk))
            found += answering.predict_rows([name for name, _ in chunk], rows, top=top)
    return _warned(found)


def _warned(found: list[Prediction]) -> list[Prediction]:
    for prediction in found:
        if prediction.error is not None:
            warn(f"{prediction.name}: {prediction.error}")
    return found


def _from_server(url: str, given: Sequence[AnyPath], top: int) -> list[Prediction]:
    from suanli.verbs._remote import Server

    found: list[Prediction] = []
    with closing(Server(url)) as server:
        for chunk in _chunks(_named(load_plugin("preprocess", server.kind()), given), BATCH):
            raws = [_read(read) for _, read in chunk]
            sent = [(name, raw) for (name, _), raw in zip(chunk, raws, strict=True) if not isinstance(raw, BadInput)]
            answers = iter(server.predict([name for name, _ in sent], [raw for _, raw in sent], top=top))
            for (name, _), raw in zip(chunk, raws, strict=True):
                found.append(_unread(name, raw) if isinstance(raw, BadInput) else next(answers))
    return found


def _read(read: Callable[[], Raw]) -> bytes | str | BadInput:
    """What is sent, or why it can't be read."""
    try:
        raw = read()
    except BadInput as error:
        return error
    except OSError as error:
        return BadInput(error.strerror or str(error))
    assert isinstance(raw, bytes | str), "what lies in files and streams"
    return raw


def _unread(name: str, error: BadInput) -> Prediction:
    return Prediction(name=name, label=None, probability=None, probabilities={}, error=error.message)


Named = tuple[str, Callable[[], Raw]]


def _named(preprocess: Preprocess | type[Preprocess], given: Sequence[AnyPath]) -> Iterator[Named]:
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
