"""predict: answers for inputs without targets. It reads only the model folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rich.table import Table
from rich.text import Text

from suanli.core.answers import Answer
from suanli.core.console import plural, warn
from suanli.core.errors import BadInput, MachineError, SuanliError, UsageError
from suanli.core.paths import safe_name
from suanli.core.registry import load as load_plugin
from suanli.core.storage import atomic_file
from suanli.core.types import AnyPath, EncodedInput, Json, Preprocess, Raw
from suanli.engines import saliency
from suanli.engines.answer_format import Answered, AnswerFormat, check_file, check_folder, write_files, write_lines
from suanli.engines.inputs import NamedInput, list_inputs, read
from suanli.engines.predictor import Prediction, Predictor, decide_by, encode_all, load
from suanli.machine.device import cores, detect
from suanli.verbs._remote import Sendable, Server

if TYPE_CHECKING:
    from suanli.models.model_folder import SavedModel

MOST_REMOTE = 10_000  # entries of an answer that a server gives
DRAWN = "images"  # the format of --draw


def predict(
    model: AnyPath | None,
    inputs: Any,
    *,
    top: int | None = None,
    threshold: float | None = None,
    engine: str = "auto",
    device: str = "auto",
    trust_code: bool = False,
    url: str | None = None,
    explain: AnyPath | bool = False,
    draw: AnyPath | None = None,
) -> list[Prediction]:
    """The model's answer for each input.

    `model` is a run directory or its model/ folder. `inputs` is a path (a file, a folder, a pattern such as
    "images/*.png", or "-", standard input), the bytes of a file, an open file, an array, a Pillow image, a text, a
    column or frame of pandas or polars, or a list or generator of these. An array (H, W) or (H, W, C) of uint8 is an
    image, one with an axis more in front several. For a model of texts, a string is a path if there is such a file,
    else a text.

    An input that can't be read gives a Prediction with `error`; a path where nothing is raises DataError, and what
    can't be an input UsageError. Of an answer that ranks, at most the `top` best entries are given: by default 5
    classes, and all boxes. `threshold` (0 to 1) replaces the one that the model decides by, such as the score from
    which a box is given. `engine` is that of `suanli.load`. `trust_code` runs the code of a network that isn't suanli's
    own. With `url`, a server answers (see `suanli serve`) and `model` is None.

    `explain` adds to each Prediction its `saliency`: where in an image, or on which words, the answer rests (see
    `engines/saliency.py`); a path is a folder into which it writes them, images as .png and texts as .html. Raises
    MachineError where the model can't be explained. `draw` is a new or empty folder for the images with the answers
    drawn on them.
    """
    options: dict[str, Any] = {"engine": engine, "device": device, "trust_code": trust_code, "url": url}
    answerer = open_answerer(model, top=top, threshold=threshold, explain=bool(explain), **options)
    folders = {} if draw is None else {DRAWN: Path(draw)}
    saliencies = None if isinstance(explain, bool) else Path(explain)
    return list(iterate(answerer, inputs, folders=folders, saliencies=saliencies))


class Answerer(Protocol):
    """Answers chunks of inputs, here or on a server."""

    @property
    def classes(self) -> Sequence[str]:
        """All that an answer may have."""

    @property
    def preprocess(self) -> Preprocess | type[Preprocess]: ...

    @property
    def empty(self) -> Answer:
        """An answer without values."""

    def answer(self, chunk: Sequence[NamedInput], *, keep: bool) -> Iterator[Answered]:
        """The predictions, and what was read for them where it is to be kept."""

    def close(self) -> None: ...


def open_answerer(
    model: AnyPath | None,
    *,
    top: int | None,
    threshold: float | None,
    engine: str,
    device: str,
    trust_code: bool,
    url: str | None,
    explain: bool,
) -> Answerer:
    """Raises UsageError for options that don't go together."""
    if url is not None:
        if explain:
            raise UsageError(
                "A server gives no explanations.", fix="Name the run or its model/ folder in place of --url."
            )
        return _RemoteAnswerer(url, top, threshold)
    if model is None:
        raise UsageError("There is no model to predict with.", fix="Name a run or a model folder, or give url.")
    predictor = load(model, engine=engine, device=device, trust_code=trust_code)
    decide_by(predictor.task, threshold)  # before anything is computed
    saved = load_network(model, device, trust_code, need="explanations") if explain else None
    return _LocalAnswerer(predictor, saved, top, threshold)


def iterate(
    answerer: Answerer,
    inputs: Any,
    *,
    folders: Mapping[str, Path] | None = None,
    saliencies: Path | None = None,
) -> Iterator[Prediction]:
    """As `predict`, one after another, so that not all of them are in memory. `folders` are those of formats that have
    a file for each answer, by the format's name."""
    with closing(answerer):
        stages = []
        for name, folder in (folders or {}).items():
            form: AnswerFormat = load_plugin("answer_formats", name)
            form.check(answerer.empty.kind)
            stages.append((form, check_folder(folder, inputs)))
        kind = answerer.preprocess if isinstance(answerer.preprocess, type) else type(answerer.preprocess)
        chunks_of_inputs = chunks(list_inputs(inputs, answerer.preprocess), kind.inputs_at_once)
        answers: Iterator[Answered] = chain.from_iterable(
            answerer.answer(chunk, keep=bool(stages)) for chunk in chunks_of_inputs
        )
        for form, folder in stages:
            answers = write_files(answers, form, folder, kind, answerer.classes)
        predictions: Iterator[Prediction] = (prediction for prediction, _ in answers)
        if saliencies is not None:
            predictions = _write_saliencies(predictions, saliencies.expanduser())
        for prediction in predictions:
            if prediction.error is not None:
                warn(f"{prediction.name}: {prediction.error}")
            yield prediction


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


class _LocalAnswerer:
    def __init__(
        self, predictor: Predictor, saved: SavedModel | None, top: int | None, threshold: float | None
    ) -> None:
        """`saved`: the network, to explain the answers."""
        self.classes, self.preprocess, self.empty = predictor.classes, predictor.preprocess, predictor.empty
        self._predict = partial(predictor.predict_encoded, top=top, threshold=threshold)
        self._encode, self._saved = predictor.encode, saved
        self._pool = ThreadPoolExecutor(cores())

    def answer(self, chunk: Sequence[NamedInput], *, keep: bool) -> Iterator[Answered]:
        if self.preprocess.encodes_blocks and self._saved is None:
            return self._answer_block(chunk)
        raws, encoded = zip(*self._pool.map(partial(self._read, keep=keep), chunk), strict=True)
        predictions = self._predict([name for name, _ in chunk], encoded)
        if self._saved is not None:
            good = [one.arrays for one in encoded if isinstance(one, EncodedInput)]
            found = iter(saliency.explain(self._saved, good))
            pairs = zip(predictions, encoded, strict=True)
            predictions = [p if isinstance(one, str) else replace(p, saliency=next(found)) for p, one in pairs]
        return zip(predictions, raws, strict=True)

    def _answer_block(self, chunk: Sequence[NamedInput]) -> Iterator[Answered]:
        raws = [read(named) for named in chunk]
        predictions = self._predict([name for name, _ in chunk], encode_all(self.preprocess, raws))
        for one, raw, cells in zip(predictions, raws, self.preprocess.cells_of(raws), strict=True):
            yield replace(one, cells=cells), raw

    def _read(self, named: NamedInput, *, keep: bool) -> tuple[Raw | BadInput | None, EncodedInput | str]:
        raw = read(named)
        return raw if keep else None, self._encode(raw)

    def close(self) -> None:
        self._pool.shutdown()


class _RemoteAnswerer:
    def __init__(self, url: str, top: int | None, threshold: float | None) -> None:
        self._server = Server(url)
        self._top, self._threshold = None if top is None else min(top, MOST_REMOTE), threshold

    @cached_property
    def classes(self) -> Sequence[str]:
        return self._server.classes

    @cached_property
    def preprocess(self) -> type[Preprocess]:
        kind: type[Preprocess] = load_plugin("preprocess", self._server.kind)
        return kind

    @property
    def empty(self) -> Answer:
        return self._server.empty

    def answer(self, chunk: Sequence[NamedInput], *, keep: bool) -> Iterator[Answered]:  # noqa: ARG002
        pairs = [(named[0], _sendable(read(named))) for named in chunk]
        readable = [(name, raw) for name, raw in pairs if not isinstance(raw, BadInput)]
        names, raws = [name for name, _ in readable], [raw for _, raw in readable]
        answers = iter(self._server.predict(names, raws, top=self._top, threshold=self._threshold))
        for name, raw in pairs:
            if isinstance(raw, BadInput):
                yield Prediction(name=name, answer=None, error=raw.message, empty=self.empty), raw
            else:
                yield replace(next(answers), cells=self.preprocess.cells_of([raw])[0]), raw

    def close(self) -> None:
        self._server.close()


def _sendable(raw: Raw | BadInput) -> Sendable | BadInput:
    if isinstance(raw, bytes | str | BadInput):
        return raw
    if isinstance(raw, Mapping) and not any(isinstance(cell, np.ndarray) for cell in raw.values()):
        return raw
    return BadInput("Arrays can't be sent to a server: give files or their bytes, or predict on this machine.")


def chunks(items: Iterable[NamedInput], count: int) -> Iterator[list[NamedInput]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, count)):
        yield chunk


def _write_saliencies(predictions: Iterable[Prediction], folder: Path) -> Iterator[Prediction]:
    """Writes a file for each answer: <number>-<name>.png or .html."""
    for number, prediction in enumerate(predictions):
        if prediction.saliency is not None:
            name = safe_name(Path(prediction.name).stem, "input", longest=80)
            suffix, content = prediction.saliency.marked.to_file()
            with atomic_file(folder / f"{number:04d}-{name}{suffix}") as stream:
                stream.write(content)
        yield prediction


def table(predictions: Sequence[Prediction]) -> Table:
    """For people: a line for each input."""
    rows = Table("input", "answer", box=None, pad_edge=False)
    for p in predictions:
        flags = f"  ({'; '.join(p.flags)})" if p.flags else ""
        rows.add_row(Text(p.name), Text(f"{p.answer.text}{flags}" if p.answer else f"- {p.error}"))
    return rows


# --- formats --------------------------------------------------------------------------------


class Output:
    """The answers in a format, printed or written."""

    def __init__(self, form: AnswerFormat, answerer: Answerer, out: Path | None, annotations: Path | None) -> None:
        """Raises UsageError for options that don't go together, before anything is computed."""
        if annotations is not None and not form.takes_annotations:
            raise UsageError(f"--annotations can't be used with --format {form.name}.", fix="Leave it out.")
        if out is None and form.file is not None:
            raise UsageError(f"{form.name} is a file for each input.", fix="Name a folder for them: --out FOLDER.")
        self._form, self._answerer, self._annotations = form, answerer, annotations
        self._out = check_file(out) if out is not None and form.lines is not None else out
        self.folders = {form.name: out} if out is not None and form.file is not None else {}
        try:
            form.check(answerer.empty.kind)
        except SuanliError:
            answerer.close()
            raise

    def lines(self, predictions: Iterable[Prediction]) -> Iterator[str]:
        assert self._form.lines is not None
        return self._form.lines(predictions, self._answerer.classes, self._annotations)

    def write(self, predictions: Iterable[Prediction]) -> dict[str, Json]:
        """What was written: `format`, `out`, `count` (inputs with an answer) and `errors`."""
        assert self._out is not None
        count, errors = 0, []

        def counted() -> Iterator[Prediction]:
            nonlocal count
            for one in predictions:
                count += one.error is None
                if one.error is not None:
                    errors.append({"name": one.name, "error": one.error})
                yield one

        if self._form.lines is None:
            for _ in counted():  # the files are written on the way
                pass
        else:
            write_lines(self.lines(counted()), self._out)
        return {"format": self._form.name, "out": str(self._out), "count": count, "errors": errors}


def summarize(written: Mapping[str, Any]) -> str:
    """What `Output.write` returns, for people."""
    failed = f"; {plural(len(written['errors']), 'input')} can't be read" if written["errors"] else ""
    return f"{written['out']}: {plural(written['count'], 'answer')} as {written['format']}{failed}"
