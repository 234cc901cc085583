"""evaluation/embeddings.json as the report reads it: what the embeddings of a run's examples show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from suanli.reporting.records import Number, Preview


@dataclass(frozen=True, kw_only=True)
class Shown:
    name: str = "?"
    split: str = ""
    text: str = ""  # its target
    preview: Preview | None = None


@dataclass(frozen=True, kw_only=True)
class Suspect(Shown):
    """An example whose target is likely wrong."""

    suggested: str = ""
    confidence: Number = None


@dataclass(frozen=True, kw_only=True)
class Suspects:
    count: int = 0
    judged: int = 0
    listed: tuple[Suspect, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Neighbour(Shown):
    similarity: Number = None


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Of one mistake, by its name."""

    name: str = "?"
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SimilarPair:
    example: Shown = Shown()
    copy: Shown = Shown()
    distance: Number = None


@dataclass(frozen=True, kw_only=True)
class Similar:
    count: int = 0
    limit: Number = None  # None: these embeddings can't tell copies from examples that are only alike
    searched: bool = False
    pairs: tuple[SimilarPair, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExampleMap:
    """N examples in two dimensions."""

    method: str = ""
    points: tuple[tuple[Number, Number], ...] = ()
    names: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # targets
    groups: tuple[int, ...] | None = None  # positions in `group_names`
    group_names: tuple[str, ...] = ()
    values: tuple[Number, ...] | None = None
    wrong: tuple[bool, ...] | None = None  # None: answers are only more or less right


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    split: str = ""
    width: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)  # examples with an embedding, by split
    sizes: Mapping[str, int] = field(default_factory=dict)  # all examples of these splits
    map: ExampleMap | None = None
    neighbours: tuple[Neighbours, ...] = ()
    suspects: Suspects | None = None  # None: the task has no idea of a wrong target
    similar: Similar = Similar()
