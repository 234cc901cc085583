"""What the embeddings of a run's examples show: a map, the neighbours of mistakes, targets that are likely wrong, and
examples of the test split that are likely in training too. `evaluation/embeddings.json` has it for the report."""

from __future__ import annotations

import base64
import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

import numpy as np

from suanli.core.schema import Arrays, Geometry, Ragged, Stored, example_of, select
from suanli.core.similarity import directions, find_nearest, principal_components
from suanli.core.storage import atomic_file
from suanli.core.task import SuspectTarget
from suanli.core.tsne import t_sne
from suanli.core.types import Json
from suanli.data.leaks import NEXT, SEEN, SIMILAR, Copy, LeakEntry, closeness, closeness_limit
from suanli.models.model_folder import SavedModel
from suanli.verbs._embeddings import Embedded, Embedder, cached_input, sample

SUSPECTS = "label_errors.csv"
MAPPED = 500  # examples on the map: a fraction of a second
LEAST_MAPPED = 5
MAP_COMPONENTS = 32
EXPLAINED, NEIGHBOURS = 12, 3  # mistakes that have neighbours, and how many
COPIED = 24  # examples of which copies are made, to know how near a copy is
LISTED = 24  # suspects and pairs in the report, with their pictures


Similar = list[tuple[LeakEntry, Embedded, int, Embedded, int]]  # an example and its nearest copy: part and position


class Shown(TypedDict):
    """One example for people."""

    name: str
    split: str
    text: str  # its target
    preview: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SuspectRow:
    """A target that is likely wrong, as label_errors.csv has it."""

    name: str
    given: str
    suggested: str
    confidence: float
    split: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    values: dict[str, Json]  # embeddings.json
    suspects: Sequence[SuspectRow] | None  # None: not looked for
    similar: Sequence[LeakEntry]
    embedded: Sequence[Embedded]


class Study:
    """Some examples of the split that was evaluated, and of others, with their embeddings."""

    def __init__(self, saved: SavedModel, embedder: Embedder, own: Embedded, others: Sequence[Embedded]) -> None:
        self.saved, self.embedder = saved, embedder
        self.own, self.parts = own, [own, *others]
        self.train = next((one for one in others if one.name == "train"), None)
        base = own if self.train is None else self.train
        self._mean = base.vectors.mean(0, dtype=np.float64)
        self._directions = {one.name: directions(one.vectors, self._mean) for one in self.parts}

    def find(self, worst: Sequence[int], wrong: np.ndarray) -> Findings:
        """`worst` are the positions of the worst mistakes in the split; `wrong` (N,) bool says which answers are."""
        started = time.perf_counter()
        suspects = self._find_suspects()
        rows = None if suspects is None else [self._row(*self._locate(one.position), one) for one in suspects]
        similar, searched = self._find_similar()
        values: dict[str, Json] = {
            "split": self.own.name,
            "width": self.own.vectors.shape[1],
            "counts": {one.name: len(one) for one in self.parts},
            "sizes": {one.name: len(one.split) for one in self.parts},
            "map": self._draw_map(wrong),
            "neighbours": self._find_neighbours(worst[:EXPLAINED]),
            "suspects": None if suspects is None or rows is None else self._list_suspects(suspects, rows),
            "similar": searched | {"count": len(similar), "pairs": [self._pair(*one) for one in similar[:LISTED]]},
            "seconds": time.perf_counter() - started,
        }
        return Findings(values=values, suspects=rows, similar=[entry for entry, *_ in similar], embedded=self.parts)

    # --- examples for people ---

    def _show(self, part: Embedded, place: int) -> Shown:
        row = int(part.rows[place])
        preview = self.saved.preprocess.thumbnail(cached_input(part.split, row))
        content = base64.b64encode(preview.content).decode()
        return {
            "name": part.split.names[row],
            "split": part.name,
            "text": self._text(part, place, example_of(part.split.targets, row)),
            "preview": {"media_type": preview.media_type, "base64": content},
        }

    def _text(self, part: Embedded, place: int, target: Arrays) -> str:
        geometry = Geometry.from_array(part.split.geometries[int(part.rows[place])])
        return self.saved.task.describe_target(target, geometry).text

    # --- targets that are likely wrong ---

    def _find_suspects(self) -> list[SuspectTarget] | None:
        columns = [{n: select(c, one.rows) for n, c in one.split.targets.items()} for one in self.parts]
        targets = {name: concatenate([part[name] for part in columns]) for name in columns[0]}
        return self.saved.task.find_suspects(np.concatenate([one.vectors for one in self.parts]), targets)

    def _locate(self, position: int) -> tuple[Embedded, int]:
        for part in self.parts:
            if position < len(part):
                return part, position
            position -= len(part)
        raise IndexError(position)

    def _row(self, part: Embedded, place: int, suspect: SuspectTarget) -> SuspectRow:
        given = example_of(part.split.targets, int(part.rows[place]))
        return SuspectRow(
            name=part.at([place])[0],
            given=self._text(part, place, given),
            suggested=self._text(part, place, suspect.suggested),
            confidence=suspect.confidence,
            split=part.name,
        )

    def _list_suspects(self, suspects: Sequence[SuspectTarget], rows: Sequence[SuspectRow]) -> dict[str, Json]:
        listed = [
            self._show(*self._locate(one.position)) | {"suggested": row.suggested, "confidence": row.confidence}
            for one, row in zip(suspects[:LISTED], rows, strict=False)
        ]
        return {"count": len(rows), "judged": sum(map(len, self.parts)), "listed": listed}

    # --- copies across splits ---

    def _find_similar(self) -> tuple[Similar, dict[str, Json]]:
        """Examples of the split that was evaluated that are nearly ones of training or validation, the nearest first,
        and what is known of the search. Exact and near-duplicates are known already."""
        found: Similar = []
        seen = [one for one in self.parts if one.name in SEEN.get(self.own.name, ())]
        if sum(map(len, seen)) <= NEXT:
            return found, {"searched": False}
        others = np.concatenate([self._directions[one.name] for one in seen])
        copied = self._copy_closeness(others)
        if not copied.size:
            return found, {"searched": False}
        cosines, places = find_nearest(self._directions[self.own.name], others, NEXT + 1)
        near = closeness(1 - cosines.astype(np.float64))
        new = np.ones(len(near), bool) if self.own.split.leaks is None else self.own.split.leaks[self.own.rows] == 0
        limit = closeness_limit(near[new], copied)
        if limit is None:
            return found, {"searched": True, "limit": None}
        starts = np.cumsum([0, *map(len, seen)])
        for place in np.argsort(near, kind="stable").tolist():
            if new[place] and near[place] <= limit:
                which = int(np.searchsorted(starts, places[place, 0], side="right")) - 1
                part, at = seen[which], int(places[place, 0] - starts[which])
                copy = Copy(name=part.at([at])[0], split=part.name, distance=1 - float(cosines[place, 0]))
                name = self.own.at([place])[0]
                entry = LeakEntry(example=name, split=self.own.name, kind=SIMILAR, copies=[copy])
                found.append((entry, self.own, place, part, at))
        return found, {"searched": True, "limit": limit, "found_copies": (copied <= limit).mean(0).tolist()}

    def _copy_closeness(self, others: np.ndarray) -> np.ndarray:
        """(C, kinds): of copies that are made of some examples to their originals, among `others`; none for a kind of
        data without copies."""
        places = sample(len(self.own), COPIED)
        rows = self.own.rows[places].tolist()
        copies = [self.saved.preprocess.copies(cached_input(self.own.split, row)) for row in rows]
        kinds = len(copies[0])
        if not kinds:
            return np.zeros((0, 0))
        made = directions(self.embedder.embed_arrays([one for several in copies for one in several]), self._mean)
        originals = np.repeat(self._directions[self.own.name][places], kinds, axis=0)
        cosines = np.concatenate([(made * originals).sum(1)[:, None], find_nearest(made, others, NEXT)[0]], axis=1)
        return closeness(1 - cosines.astype(np.float64)).reshape(-1, kinds)

    def _pair(self, entry: LeakEntry, part: Embedded, place: int, other: Embedded, at: int) -> dict[str, Json]:
        distance = entry["copies"][0]["distance"]
        return {"example": self._show(part, place), "copy": self._show(other, at), "distance": distance}

    # --- neighbours of mistakes ---

    def _find_neighbours(self, rows: Sequence[int]) -> list[dict[str, Json]]:
        """The training examples that are most like each of these examples."""
        if self.train is None or not rows:
            return []
        known = {row: place for place, row in enumerate(self.own.rows.tolist())}
        own = self._directions[self.own.name]
        if not known.keys() >= set(rows):  # a large split, of which only some were kept
            again = self.embedder.embed(self.own.name, self.own.split, np.unique(rows))
            assert again is not None
            known = {row: place for place, row in enumerate(again.rows.tolist())}
            own = directions(again.vectors, self._mean)
        asked = own[[known[row] for row in rows]]
        cosines, places = find_nearest(asked, self._directions["train"], NEIGHBOURS)
        return [
            {
                "name": self.own.split.names[row],
                "neighbours": [
                    self._show(self.train, place) | {"similarity": cosine}
                    for cosine, place in zip(near.tolist(), at.tolist(), strict=True)
                ],
            }
            for row, near, at in zip(rows, cosines, places, strict=True)
        ]

    # --- the map ---

    def _draw_map(self, wrong: np.ndarray) -> dict[str, Json] | None:
        """A sample of the split that was evaluated in two dimensions."""
        if len(self.own) < LEAST_MAPPED:
            return None
        places = sample(len(self.own), MAPPED)
        rows = self.own.rows[places]
        method, points = project(self.own.vectors[places])
        targets = {name: select(column, rows) for name, column in self.own.split.targets.items()}
        colors = self.saved.task.map_colors(targets)
        return {
            "method": method,
            "points": np.round(points, 3).tolist(),
            "names": self.own.at(places.tolist()),
            "texts": [
                self._text(self.own, place, example_of(self.own.split.targets, int(row)))
                for place, row in zip(places.tolist(), rows, strict=True)
            ],
            "groups": None if colors.groups is None else colors.groups.tolist(),
            "group_names": list(colors.names),
            "values": None if colors.values is None else colors.values.tolist(),
            "wrong": None if colors.groups is None else wrong[rows].tolist(),
        }


def project(vectors: np.ndarray) -> tuple[str, np.ndarray]:
    """Vectors (N, F) in two dimensions, (N, 2) from -1 to 1, and by which method."""
    reduced = principal_components(vectors, MAP_COMPONENTS)
    points = np.zeros((len(reduced), 2), np.float32)
    points[:, : reduced.shape[1]] = reduced[:, :2]
    method = "PCA"
    if len(reduced) > 3 * LEAST_MAPPED and float(reduced.std()) > 0:
        method, points = "t-SNE", t_sne(reduced, points / (points[:, 0].std() or 1.0) * 1e-4)
    points = points - (points.max(0) + points.min(0)) / 2
    return method, points / (float(np.abs(points).max()) or 1.0)


def concatenate(columns: Sequence[Stored]) -> Stored:
    """The examples of several columns of one kind, one after another."""
    arrays = [column for column in columns if not isinstance(column, Ragged)]
    if len(arrays) == len(columns):
        return np.concatenate(arrays)
    ragged = [column for column in columns if isinstance(column, Ragged)]
    return Ragged.of([one[i] for one in ragged for i in range(len(one))], like=ragged[0].values)


def write_suspects(path: Path, rows: Sequence[SuspectRow]) -> None:
    """As CSV, the surest first."""
    with atomic_file(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="")
        table = csv.writer(text)
        table.writerow([field.name for field in fields(SuspectRow)])
        table.writerows([one.name, one.given, one.suggested, f"{one.confidence:.4f}", one.split] for one in rows)
        text.flush()
        text.detach()
