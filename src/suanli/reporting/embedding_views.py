"""What embeddings show, as the report draws it: a map of examples, mistakes beside what is most like them, targets that
are likely wrong, and examples that are likely in two splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from suanli.reporting import words
from suanli.reporting.embedding_records import Embeddings, ExampleMap
from suanli.reporting.gallery import Card, Thumbnail, cards, thumbnail
from suanli.reporting.records import Evaluation

WIDTH, HEIGHT, MARGIN = 720, 440, 14  # of the drawing
RANGES = 7  # of values, each with a colour
LEGEND = 12  # groups that are listed


@dataclass(frozen=True, kw_only=True)
class Dot:
    x: float
    y: float
    text: str
    wrong: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    """Dots of one colour, an angle of the colour wheel; None: grey."""

    name: str
    hue: float | None
    dots: tuple[Dot, ...]


@dataclass(frozen=True, kw_only=True)
class MapView:
    groups: tuple[Group, ...]
    legend: tuple[Group, ...]
    text: str
    has_wrong: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class MistakeView:
    mistake: Card
    neighbours: tuple[tuple[Thumbnail, str], ...]  # and how similar


@dataclass(frozen=True, kw_only=True)
class SuspectView:
    shown: Thumbnail
    suggested: str
    confidence: str


@dataclass(frozen=True, kw_only=True)
class PairView:
    example: Thumbnail
    copy: Thumbnail


@dataclass(frozen=True, kw_only=True)
class EmbeddingView:
    map: MapView | None
    suspects: tuple[SuspectView, ...]
    suspects_note: str
    pairs: tuple[PairView, ...]
    pairs_note: str


def embedding_view(one: Embeddings) -> EmbeddingView:
    suspects, similar = one.suspects, one.similar
    return EmbeddingView(
        map=_map(one.map, one) if one.map and one.map.points else None,
        suspects=tuple(
            SuspectView(shown=thumbnail(s), suggested=s.suggested, confidence=words.percent(s.confidence, decimals=0))
            for s in (suspects.listed if suspects else ())
        ),
        suspects_note=_describe_suspects(one),
        pairs=tuple(PairView(example=thumbnail(p.example), copy=thumbnail(p.copy)) for p in similar.pairs),
        pairs_note=_describe_pairs(one),
    )


def likes(one: Embeddings | None, evaluation: Evaluation | None) -> list[MistakeView]:
    """The worst mistakes beside the training examples that are most like them."""
    if one is None or evaluation is None:
        return []
    near = {found.name: found.neighbours for found in one.neighbours}
    mistakes = [m for m in evaluation.mistakes if near.get(m.name)]
    return [
        MistakeView(
            mistake=card,
            neighbours=tuple((thumbnail(n), words.percent(n.similarity, decimals=0)) for n in near[mistake.name]),
        )
        for mistake, card in zip(mistakes, cards(mistakes), strict=True)
    ]


def _describe_suspects(one: Embeddings) -> str:
    found = one.suspects
    if found is None:
        return ""
    judged = f"{_counts(one)} were judged by a linear model on their embeddings that hadn't learned from them"
    if not found.count:
        return f"None was found. {judged}."
    which = "all" if found.count <= len(found.listed) else f"the {len(found.listed)} surest"
    return (
        f"{words.count(found.count, 'target')} of {words.count(found.judged, 'example')} contradict what similar"
        f" examples suggest; {which} are shown. {judged}. Look at each before you change it: some are only hard."
    )


def _describe_pairs(one: Embeddings) -> str:
    similar = one.similar
    if not similar.searched:
        return ""
    if similar.limit is None:
        return "These embeddings can't tell a copy, such as a mirrored image, from an example that is only alike."
    if not similar.count:
        return ""
    which = "" if similar.count <= len(similar.pairs) else f"; the {len(similar.pairs)} most similar are shown"
    return (
        f"{words.count(similar.count, 'test example')} may be a training or validation example in another form, such as"
        f" mirrored or cut to its middle{which}. No score leaves them out: look at them first."
    )


def _counts(one: Embeddings) -> str:
    """ "180 test, 1,437 training and 180 validation examples"."""
    names = {"train": "training", "val": "validation"}
    parts = [f"{words.number(count)} {names.get(split, split)}" for split, count in one.counts.items()]
    joined = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
    return f"{joined} examples"


# --- the map ---


def _map(one: ExampleMap, all_of: Embeddings) -> MapView:
    groups = _groups(one)
    shown, total = len(one.points), all_of.sizes.get(all_of.split, len(one.points))
    some = "all" if shown >= total else words.number(shown)
    wrong = sum(dot.wrong for group in groups for dot in group.dots)
    return MapView(
        groups=groups,
        legend=tuple(sorted(groups, key=lambda g: -len(g.dots))[:LEGEND]) if len(groups) > LEGEND else groups,
        text=f"Map of {shown} {all_of.split} examples",
        has_wrong=bool(wrong),
        note=f"{some} of {words.count(total, 'example')} of the {all_of.split} split, by their embeddings"
        f" ({one.method}): examples that the network takes for similar are close to each other; distances between far"
        " groups mean little.",
    )


def _groups(one: ExampleMap) -> tuple[Group, ...]:
    if one.groups is not None and len(one.groups) == len(one.points):
        names, places = one.group_names, list(one.groups)
        hues: list[float | None] = [360 * i / max(len(names), 1) + 20 for i in range(len(names))]
    elif one.values is not None and len(one.values) == len(one.points):
        names, places = _ranges([np.nan if v is None else v for v in one.values])
        hues = [250 - 210 * i / max(len(names) - 1, 1) for i in range(len(names))]  # from blue to orange
    else:
        names, places, hues = ("examples",), [0] * len(one.points), [None]
    dots: dict[int, list[Dot]] = {}
    for i, (point, place) in enumerate(zip(one.points, places, strict=True)):
        if words.is_known(point[0]) and words.is_known(point[1]) and 0 <= place < len(names):
            dots.setdefault(place, []).append(_dot(one, i, point[0], point[1]))
    return tuple(Group(name=names[i], hue=hues[i], dots=tuple(dots[i])) for i in sorted(dots))


def _ranges(values: Sequence[float]) -> tuple[tuple[str, ...], list[int]]:
    """Names of ranges with about as many values each, and the range of each value; -1: it isn't known."""
    known = np.array(values, np.float64)
    finite = known[np.isfinite(known)]
    if not len(finite):
        return ("examples",), [0] * len(values)
    edges = np.unique(np.quantile(finite, np.linspace(0, 1, RANGES + 1)))
    if len(edges) == 1:
        return (words.number(float(edges[0])),), [0] * len(values)
    names = [" to ".join(words.number(float(f"{edge:.3g}")) for edge in pair) for pair in pairwise(edges.tolist())]
    places = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, len(names) - 1)
    return tuple(names), np.where(np.isfinite(known), places, -1).tolist()


def _dot(one: ExampleMap, i: int, x: float, y: float) -> Dot:
    name = one.names[i] if i < len(one.names) else "?"
    text = f"{name}: {one.texts[i]}" if i < len(one.texts) else name
    wrong = one.wrong is not None and i < len(one.wrong) and one.wrong[i]
    return Dot(
        x=round(MARGIN + (x + 1) / 2 * (WIDTH - 2 * MARGIN), 1),
        y=round(MARGIN + (y + 1) / 2 * (HEIGHT - 2 * MARGIN), 1),
        text=f"{text} (wrong answer)" if wrong else text,
        wrong=wrong,
    )
