"""predict: answers for inputs without targets. It reads only the model folder."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

from rich.table import Table
from rich.text import Text

from suanli.core.console import warn
from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.registry import load as load_plugin
from suanli.core.types import AnyPath, EncodedInput, Json, Preprocess, Raw
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

    `model` is a run directory or its model/ folder. An input that can't be read gives a Prediction with `error`; an
    argument that names nothing at all raises DataError. `engine` is that of `suanli.load`. `trust_code` runs the code
    of a network that isn't suanli's own. With `url`, a server answers (see `suanli serve`) and `model` is None.
    """
    items = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if url is not None:
        predictions = _predict_remotely(url, items, top)
    else:
        predictions = _predict_here(model, items, top, engine=engine, device=device, trust_code=trust_code)
    for prediction in predictions:
        if prediction.error is not None:
            warn(f"{prediction.name}: {prediction.error}")
    return predictions


def _predict_here(
    model: AnyPath | None, items: Sequence[AnyPath], top: int, *, engine: str, device: str, trust_code: bool
) -> list[Prediction]:
    if model is None:
        raise UsageError("There is no model to predict with.", fix="Name a run or a model folder, or give url.")
    predictor = load(model, engine=engine, device=device, trust_code=trust_code)
    predictions: list[Prediction] = []
    with ThreadPoolExecutor(cores()) as pool:
        for chunk in _chunks(_list_inputs(predictor.preprocess, items), BATCH):
            encoded = list(pool.map(lambda named: _encode(predictor, named[1]), chunk))
            predictions += predictor.predict_encoded([name for name, _ in chunk], encoded, top=top)
    return predictions


def _predict_remotely(url: str, items: Sequence[AnyPath], top: int) -> list[Prediction]:
    from suanli.verbs._remote import Server

    predictions: list[Prediction] = []
    with closing(Server(url)) as server:
        for chunk in _chunks(_list_inputs(load_plugin("preprocess", server.kind), items), BATCH):
            pairs = [(name, _read(read)) for name, read in chunk]
            readable = [(name, raw) for name, raw in pairs if not isinstance(raw, BadInput)]
            names, raws = [name for name, _ in readable], [raw for _, raw in readable]
            answers = iter(server.predict(names, raws, top=top))
            for name, raw in pairs:
                if isinstance(raw, BadInput):
                    predictions.append(Prediction(name=name, answer=None, error=raw.message, empty=server.empty))
                else:
                    predictions.append(next(answers))
    return predictions


def _read(read: Callable[[], Raw]) -> bytes | str | BadInput:
    """The content of an input, or why it can't be read."""
    try:
        raw = read()
    except BadInput as error:
        return error
    except OSError as error:
        return BadInput(error.strerror or str(error))
    return raw if isinstance(raw, bytes | str) else BadInput("Arrays can't be sent: predict on this machine.")


NamedInput = tuple[str, Callable[[], Raw]]  # and what reads it


def _list_inputs(preprocess: Preprocess | type[Preprocess], items: Sequence[AnyPath]) -> Iterator[NamedInput]:
    for item in items:
        for path in _find_paths(str(item)):
            for name, read in preprocess.find_inputs(path):
                yield from [(name, read)] if isinstance(preprocess, type) else preprocess.split_file(name, read)


def _find_paths(item: str) -> list[Path]:
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


def _chunks(items: Iterable[NamedInput], count: int) -> Iterator[list[NamedInput]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, count)):
        yield chunk


def _encode(predictor: Predictor, read: Callable[[], Raw]) -> EncodedInput | str:
    """What the engine reads of an input, or why there is nothing."""
    try:
        return predictor.encode(read())
    except OSError as error:
        return error.strerror or str(error)
    except BadInput as error:
        return error.message


def table(predictions: Sequence[Prediction]) -> Table:
    """For people: a line for each input."""
    rows = Table("input", "answer", box=None, pad_edge=False)
    for p in predictions:
        rows.add_row(Text(p.name), Text(p.answer.text if p.answer else f"- {p.error}"))
    return rows


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Columns name, those of the task's answers, and error; quoted where needed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = predictions[0].empty.columns if predictions else ()
    writer.writerow(["name", *columns, "error"])
    for p in predictions:
        writer.writerow([p.name, *(_cell(p.values[column]) for column in columns), p.error or ""])
    return stream.getvalue().rstrip("\n")


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if 1e-6 <= value <= 1 else f"{value:.9g}"
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
