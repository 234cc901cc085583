"""predict: answers for inputs without targets. It reads only the model folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from suanli.core.console import warn
from suanli.core.errors import BadInput, MachineError, UsageError
from suanli.core.paths import safe_name
from suanli.core.registry import load as load_plugin
from suanli.core.storage import atomic_file
from suanli.core.types import AnyPath, EncodedInput, Json, Raw
from suanli.engines import saliency
from suanli.engines.inputs import NamedInput, list_inputs, read
from suanli.engines.predictor import BATCH, Prediction, Predictor, load
from suanli.machine.device import cores, detect

if TYPE_CHECKING:
    from suanli.models.model_folder import SavedModel

MOST_REMOTE = 10_000  # entries of an answer that a server gives


def predict(
    model: AnyPath | None,
    inputs: Any,
    *,
    top: int = 5,
    engine: str = "auto",
    device: str = "auto",
    trust_code: bool = False,
    url: str | None = None,
    explain: AnyPath | bool = False,
) -> list[Prediction]:
    """The model's answer for each input.

    `model` is a run directory or its model/ folder. `inputs` is a path (a file, a folder, a pattern such as
    "images/*.png", or "-", standard input), the bytes of a file, an open file, an array, a Pillow image, a text, a
    column or frame of pandas or polars, or a list or generator of these. An array (H, W) or (H, W, C) of uint8 is an
    image, one with an axis more in front several. For a model of texts, a string is a path if there is such a file,
    else a text.

    An input that can't be read gives a Prediction with `error`; a path where nothing is raises DataError, and what
    can't be an input UsageError. Of an answer that ranks, such as classes, at most the `top` best entries are given.
    `engine` is that of `suanli.load`. `trust_code` runs the code of a network that isn't suanli's own. With `url`, a
    server answers (see `suanli serve`) and `model` is None.

    `explain` adds to each Prediction its `saliency`: where in an image, or on which words, the answer rests (see
    `engines/saliency.py`); a path is a folder into which it writes them, images as .png and texts as .html. Raises
    MachineError where the model can't be explained.
    """
    options: dict[str, Any] = {"engine": engine, "device": device, "trust_code": trust_code, "url": url}
    return list(iterate(model, inputs, top=top, explain=explain, **options))


def iterate(
    model: AnyPath | None,
    inputs: Any,
    *,
    top: int,
    engine: str,
    device: str,
    trust_code: bool,
    url: str | None,
    explain: AnyPath | bool,
) -> Iterator[Prediction]:
    """As `predict`, one after another, so that not all of them are in memory."""
    if url is not None and explain:
        raise UsageError("A server gives no explanations.", fix="Name the run or its model/ folder in place of --url.")
    if url is not None:
        predictions = _predict_remotely(url, inputs, top)
    else:
        predictor = _load(model, engine, device, trust_code)
        saved = load_network(model, device, trust_code, need="explanations") if explain else None
        predictions = _predict_here(predictor, saved, inputs, top)
    if explain and not isinstance(explain, bool):
        predictions = _write_saliencies(predictions, Path(explain).expanduser())
    for prediction in predictions:
        if prediction.error is not None:
            warn(f"{prediction.name}: {prediction.error}")
        yield prediction


def _load(model: AnyPath | None, engine: str, device: str, trust_code: bool) -> Predictor:
    if model is None:
        raise UsageError("There is no model to predict with.", fix="Name a run or a model folder, or give url.")
    return load(model, engine=engine, device=device, trust_code=trust_code)


def load_network(model: AnyPath | None, device: str, trust_code: bool, *, need: str) -> SavedModel:
    """The network itself, on the device, whichever engine answers. Raises MachineError where there are engines alone:
    what `need` names can't be had from them."""
    from suanli.models.model_folder import find_model_folder, load_model

    folder = find_model_folder(model or "")
    if not (folder / "model.json").is_file():
        raise MachineError(
            f"{folder} has engines only, and {need} need the network.", fix="Name the run, or its model/ folder."
        )
    saved = load_model(folder, trust_code=trust_code)
    saved.module.to(detect(device).torch_name)
    return saved


def _predict_here(predictor: Predictor, saved: SavedModel | None, inputs: Any, top: int) -> Iterator[Prediction]:
    with ThreadPoolExecutor(cores()) as pool:
        for chunk in chunks(list_inputs(inputs, predictor.preprocess), BATCH):
            encoded = list(pool.map(lambda named: predictor.encode(read(named)), chunk))
            predictions = predictor.predict_encoded([name for name, _ in chunk], encoded, top=top)
            if saved is not None:
                good = [one.arrays for one in encoded if isinstance(one, EncodedInput)]
                found = iter(saliency.explain(saved, good))
                pairs = zip(predictions, encoded, strict=True)
                predictions = [p if isinstance(one, str) else replace(p, saliency=next(found)) for p, one in pairs]
            yield from predictions


def _write_saliencies(predictions: Iterable[Prediction], folder: Path) -> Iterator[Prediction]:
    """Writes a file for each answer: <number>-<name>.png or .html."""
    for number, prediction in enumerate(predictions):
        if prediction.saliency is not None:
            name = safe_name(Path(prediction.name).stem, "input", longest=80)
            suffix, content = prediction.saliency.marked.to_file()
            with atomic_file(folder / f"{number:04d}-{name}{suffix}") as stream:
                stream.write(content)
        yield prediction


def _predict_remotely(url: str, inputs: Any, top: int) -> Iterator[Prediction]:
    from suanli.verbs._remote import Server

    with closing(Server(url)) as server:
        for chunk in chunks(list_inputs(inputs, load_plugin("preprocess", server.kind)), BATCH):
            pairs = [(named[0], _sendable(read(named))) for named in chunk]
            readable = [(name, raw) for name, raw in pairs if not isinstance(raw, BadInput)]
            names, raws = [name for name, _ in readable], [raw for _, raw in readable]
            answers = iter(server.predict(names, raws, top=min(top, MOST_REMOTE)))
            for name, raw in pairs:
                if isinstance(raw, BadInput):
                    yield Prediction(name=name, answer=None, error=raw.message, empty=server.empty)
                else:
                    yield next(answers)


def _sendable(raw: Raw | BadInput) -> bytes | str | BadInput:
    if isinstance(raw, bytes | str | BadInput):
        return raw
    return BadInput("Arrays can't be sent to a server: give files or their bytes, or predict on this machine.")


def chunks(items: Iterable[NamedInput], count: int) -> Iterator[list[NamedInput]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, count)):
        yield chunk


def table(predictions: Sequence[Prediction]) -> Table:
    """For people: a line for each input."""
    rows = Table("input", "answer", box=None, pad_edge=False)
    for p in predictions:
        rows.add_row(Text(p.name), Text(p.answer.text if p.answer else f"- {p.error}"))
    return rows


def as_csv(predictions: Iterable[Prediction]) -> str:
    return "\n".join(csv_lines(predictions))


def csv_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """Columns name, those of the task's answers, and error; quoted where needed. A value with several named entries,
    such as the probabilities of all classes, gets a column for each: "probabilities.cat".

    The entries are those of the first answer, so answers must have all of them (`top`).
    """
    failed: list[Prediction] = []  # before the first answer
    columns: list[tuple[str, ...]] | None = None
    for p in predictions:
        if columns is None and p.answer is None:
            failed.append(p)
            continue
        if columns is None:
            columns = _columns(p)
            yield csv_line(["name", *map(".".join, columns), "error"])
            yield from (_row(one, columns) for one in failed)
        yield _row(p, columns)
    if columns is None:
        columns = _columns(failed[0]) if failed else []
        yield csv_line(["name", *map(".".join, columns), "error"])
        yield from (_row(one, columns) for one in failed)


def _columns(p: Prediction) -> list[tuple[str, ...]]:
    """The keys that lead to each value."""
    found: list[tuple[str, ...]] = []
    for name in p.empty.columns:
        value = p.values[name]
        found += [(name, key) for key in sorted(value, key=_natural)] if isinstance(value, Mapping) else [(name,)]
    return found


def _natural(key: str) -> tuple[int, float, str]:
    """Numbers by their value, then the other names."""
    try:
        return 0, float(key), key
    except ValueError:
        return 1, 0.0, key


def _row(p: Prediction, columns: Sequence[tuple[str, ...]]) -> str:
    cells = []
    for name, *key in columns:
        value = p.values[name]
        cells.append(_cell(value.get(key[0]) if key else value))
    return csv_line([p.name, *cells, p.error or ""])


def csv_line(cells: Sequence[object]) -> str:
    """Quoted where needed."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(cells)
    return stream.getvalue()


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if 1e-6 <= value <= 1 else f"{value:.9g}"
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
