"""embed: what a trained model sees in an input, as numbers: inputs that are alike have similar ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from suanli.core.console import plural, warn
from suanli.core.types import AnyPath, EncodedInput, Json
from suanli.engines.answer_formats.csv import csv_line
from suanli.engines.inputs import list_inputs, read
from suanli.engines.predictor import BATCH, encode
from suanli.machine.device import cores, detect
from suanli.verbs.predict import chunks, load_network

SHOWN = 6  # numbers of an embedding that people see


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Of one input; `error` says why there is none."""

    name: str
    vector: np.ndarray | None  # (F,) float32
    error: str | None = None

    def to_json(self) -> dict[str, Json]:
        values = None if self.vector is None else self.vector.tolist()
        return {"name": self.name, "embedding": values, "error": self.error}


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Of the N inputs that could be read; `numpy.asarray` gives the vectors."""

    names: Sequence[str]  # (N,)
    vectors: np.ndarray  # (N, F) float32
    errors: Sequence[tuple[str, str]]  # the other inputs: the name of each, and why it can't be read

    def __len__(self) -> int:
        return len(self.names)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        vectors = self.vectors if dtype is None else self.vectors.astype(dtype, copy=False)
        return vectors.copy() if copy else vectors

    def __repr__(self) -> str:
        failed = f", {plural(len(self.errors), 'error')}" if self.errors else ""
        return f"Embeddings({plural(len(self), 'input')}, {self.vectors.shape[1]} numbers each{failed})"


def embed(model: AnyPath, inputs: Any, *, device: str = "auto", trust_code: bool = False) -> Embeddings:
    """The embedding of each input: the numbers that the last layer of the network is given, (N, F) float32.

    `model` is a run directory or its model/ folder, `inputs` what `predict` takes. An input that can't be read has no
    row; `errors` says why. `trust_code` runs the code of a network that isn't suanli's own. For more inputs than memory
    has room for, `suanli predict RUN INPUT… --features --out FILE` writes them one after another. Raises what `predict`
    raises, and MachineError for engines without their model, or a network that has no embeddings.
    """
    every = list(iterate(model, inputs, device=device, trust_code=trust_code))
    good = [(one.name, one.vector) for one in every if one.vector is not None]
    return Embeddings(
        names=[name for name, _ in good],
        vectors=np.stack([vector for _, vector in good]) if good else np.zeros((0, 0), np.float32),
        errors=[(one.name, one.error) for one in every if one.error is not None],
    )


def iterate(model: AnyPath | None, inputs: Any, *, device: str, trust_code: bool) -> Iterator[Embedding]:
    """As `embed`, one after another, so that not all of them are in memory."""
    from suanli.engines.embedding import Embedder

    saved = load_network(model, device, trust_code, need="embeddings")
    embedder = Embedder(saved, detect(device))
    with ThreadPoolExecutor(cores()) as pool:
        for chunk in chunks(list_inputs(inputs, saved.preprocess), BATCH):
            encoded = list(pool.map(lambda named: encode(saved.preprocess, read(named)), chunk))
            good = [one for one in encoded if isinstance(one, EncodedInput)]
            vectors = iter(embedder.embed(good) if good else ())
            for (name, _), one in zip(chunk, encoded, strict=True):
                if isinstance(one, EncodedInput):
                    yield Embedding(name=name, vector=next(vectors))
                else:
                    warn(f"{name}: {one}")
                    yield Embedding(name=name, vector=None, error=one)


def lines(embeddings: Iterator[Embedding]) -> Iterator[str]:
    """For people: a line for each input, with its first few numbers."""
    for one in embeddings:
        if one.vector is None:
            yield f"{one.name}  - {one.error}"
        else:
            first = "  ".join(f"{value:.4g}" for value in one.vector[:SHOWN].tolist())
            yield f"{one.name}  {first}{f'  … ({len(one.vector)} numbers)' if len(one.vector) > SHOWN else ''}"


def csv_lines(embeddings: Iterator[Embedding]) -> Iterator[str]:
    """Columns name, error, and one for each number, from 0."""
    failed: list[Embedding] = []  # before the first vector, which says how many columns there are
    width: int | None = None
    for one in embeddings:
        if width is None and one.vector is None:
            failed.append(one)
            continue
        if width is None and one.vector is not None:
            width = len(one.vector)
            yield csv_line(["name", "error", *range(width)])
            yield from (_row(other, width) for other in failed)
        yield _row(one, width or 0)
    if width is None:
        yield csv_line(["name", "error"])
        yield from (_row(other, 0) for other in failed)


def _row(one: Embedding, width: int) -> str:
    numbers = [""] * width if one.vector is None else [f"{value:.9g}" for value in one.vector.tolist()]
    return csv_line([one.name, one.error or "", *numbers])
