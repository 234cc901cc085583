"""The embeddings of a run's examples, which an evaluation keeps (`evaluation/embeddings.npz`): those of the split that
is evaluated cost nothing; of the others, those that a training has kept, or as many as a share of that time allows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from suanli.compute.infer import infer
from suanli.core.console import say
from suanli.core.errors import UsageError
from suanli.core.schema import Arrays, Tensors, example_of
from suanli.core.storage import atomic_file
from suanli.core.types import SPLITS, Device, Split, Step
from suanli.data.loader import Feed
from suanli.engines.embedding import head_of
from suanli.models.backbone import HeadInputs
from suanli.models.model_folder import SavedModel

FILE = "embeddings.npz"
MOST = {"test": 4000, "train": 2000, "val": 500}  # examples of a split
MOST_BYTES = 64 << 20  # of the embeddings of a split
KEPT_BYTES = 4 << 20  # of the file, which has float16, for each split
BATCH = 64  # after each, the clock is looked at
SHARE, LEAST_S, MOST_S = 0.25, 0.7, 30.0  # of the time that the evaluation took, for the other splits together


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Some examples of a split."""

    name: str  # of the split
    split: Split
    rows: np.ndarray  # (N,) int64, their positions in the split, ascending
    vectors: np.ndarray  # (N, F) float32

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: Sequence[int]) -> list[str]:
        """The names of the examples at these places of `rows`."""
        return [self.split.names[int(self.rows[place])] for place in places]


def sample(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Some of so many positions, or all, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def find_embedder(saved: SavedModel, device: Device) -> Embedder | None:
    """None, with the reason in a message, for a network without a head."""
    try:
        return Embedder(saved, device)
    except UsageError as error:
        say(f"no embeddings: {error.message}")
        return None


class Embedder:
    """The network of an evaluation, for examples of any split."""

    def __init__(self, saved: SavedModel, device: Device) -> None:
        """Raises UsageError for a network without a head."""
        self.saved, self.device, self.head = saved, device, head_of(saved)
        self._step = Step(model=saved.module.to(device.torch_name))

    def embed(self, name: str, split: Split, rows: np.ndarray, limit_s: float = np.inf) -> Embedded | None:
        """The examples at these positions of a split, or as many of them as there is time for, at random; None: there
        was none. Raises MachineError for a network without embeddings."""
        order = np.random.default_rng(1).permutation(rows)
        feed, ends, done = Feed(split, self.device), time.perf_counter() + limit_s, 0

        def batches() -> Iterator[Tensors]:
            nonlocal done
            while done < len(order) and time.perf_counter() < ends:
                part = order[done : done + BATCH]
                done += len(part)
                yield feed.inputs(torch.from_numpy(part))

        vectors = self._run(batches())
        if vectors is None:
            return None
        places = np.argsort(order[:done], kind="stable")
        return Embedded(name=name, split=split, rows=order[:done][places], vectors=vectors[places])

    def embed_arrays(self, examples: Sequence[Arrays]) -> np.ndarray:
        """(N, F) of N cached inputs."""
        tensors = {name: torch.from_numpy(np.stack([one[name] for one in examples])) for name in examples[0]}
        on_device = {name: tensor.to(self.device.torch_name) for name, tensor in tensors.items()}
        parts = len(examples) // BATCH + 1
        split = {name: tensor.chunk(parts) for name, tensor in on_device.items()}
        vectors = self._run(dict(zip(split, batch, strict=True)) for batch in zip(*split.values(), strict=True))
        assert vectors is not None
        return vectors

    def _run(self, batches: Iterator[Tensors]) -> np.ndarray | None:
        with HeadInputs(self._step.model, self.head) as seen:
            answers = infer(self._step, self.saved.preprocess, self.saved.task, batches)
        count = len(next(iter(answers.values()))) if answers else 0
        return seen.vectors(count) if count else None


def most_of(vectors: np.ndarray) -> int:
    """How many examples of a split are embedded at most, by the width of their vectors (N, F)."""
    return max(1, MOST_BYTES // (4 * int(vectors.shape[1])))


def embed_others(
    embedder: Embedder, splits: Mapping[str, Split], own: Embedded, seconds: float, known: np.ndarray | None = None
) -> list[Embedded]:
    """Examples of the splits that weren't evaluated: those that are `known`, a row for each cached input (NaN: it
    isn't), and else as many as there is time for, by the `seconds` that the evaluation took: training first."""
    ends = time.perf_counter() + min(max(SHARE * seconds, LEAST_S), MOST_S)
    width = own.vectors.shape[1]
    found = []
    for name in SPLITS:
        if name == own.name or not len(splits[name]):
            continue
        left_s = (ends - time.perf_counter()) * (0.8 if name == "train" else 1)
        one, most = None, most_of(own.vectors)
        if known is not None and known.shape[1] == width:
            one = _look_up(name, splits[name], sample(len(splits[name]), most), known)
        if one is None and left_s > 0:
            rows = sample(len(splits[name]), min(MOST[name], most))
            one = embedder.embed(name, splits[name], rows, left_s)
        if one is not None:
            found.append(one)
    return found


def _look_up(name: str, split: Split, rows: np.ndarray, known: np.ndarray) -> Embedded | None:
    vectors = np.asarray(known[split.index[rows]], np.float32)
    there = np.isfinite(vectors).all(1)
    if not there.any():
        return None
    return Embedded(name=name, split=split, rows=rows[there], vectors=vectors[there])


def cached_input(split: Split, row: int) -> dict[str, np.ndarray]:
    """The cached arrays of the example at this position of a split."""
    return example_of(split.inputs, int(split.index[row]))


def write_embeddings(path: Path, embedded: Sequence[Embedded]) -> None:
    """As float16: `vectors` (N, F), `names` (N,), `splits` (N,) uint8, each a position in SPLITS, and `rows` (N,), the
    position of each in its split. Of many examples of a split only the first of a sample are kept."""
    arrays: dict[str, list[Any]] = {"vectors": [], "names": [], "splits": [], "rows": []}
    for one in embedded:
        count = max(1, KEPT_BYTES // (2 * one.vectors.shape[1]))
        kept = sample(len(one), count)
        arrays["vectors"].append(one.vectors[kept].astype(np.float16))
        arrays["names"].append(np.array(_printable(one.at(kept.tolist()))))
        arrays["splits"].append(np.full(len(kept), SPLITS.index(one.name), np.uint8))
        arrays["rows"].append(one.rows[kept])
    joined: dict[str, Any] = {name: np.concatenate(parts) for name, parts in arrays.items()}
    with atomic_file(path) as stream:
        np.savez_compressed(stream, **joined)


def _printable(names: Sequence[str]) -> list[str]:
    return [name.encode(errors="backslashreplace").decode() for name in names]
