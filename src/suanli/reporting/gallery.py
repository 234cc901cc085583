"""Inputs with their answers, as cards: how an answer is drawn depends on its kind; an unknown one is its text."""

from __future__ import annotations

import base64
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from suanli.reporting import words
from suanli.reporting.embedding_records import Shown
from suanli.reporting.parse_record import parse_record
from suanli.reporting.records import Answer, BoxesAnswer, ClassesAnswer, Example, Number, Preview, View

PICTURES = {"image/png", "image/jpeg", "image/webp", "image/gif"}  # what browsers show without running it
TINY = 64  # pixels along the longer side
TEXT_LENGTH = 600  # characters of a text that are shown
FARTHEST = 1e6  # pixels
RIGHT = "right"  # the verdict of a box that is
LETTERS = 1 / 24  # of the picture's width
MANY = 8  # boxes: up to so many are named, those that are right left out
TURN = 0.6  # of the picture's width: names of boxes further right end where their boxes do

Values = TypeVar("Values")


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """In the input's pixels; `text` describes it. `right` says whether it is one; None: not known."""

    x: float
    y: float
    width: float
    height: float
    text: str
    right: bool | None
    name: str = ""  # that is drawn, too: of few boxes, and of those that aren't right


@dataclass(frozen=True, kw_only=True)
class Side:
    """An answer, or what was expected, with the probability that the model gives it."""

    text: str
    share: str = ""
    boxes: tuple[Rectangle, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The size of a picture, and the way there from the input's pixels."""

    width: float
    height: float
    transform: str
    letters: float  # their height, and
    turn: float  # where names end and don't begin with their boxes, in the input's pixels


@dataclass(frozen=True, kw_only=True)
class Word:
    text: str
    speaks_for: bool  # the answer
    strength: float  # 0 to 1


@dataclass(frozen=True, kw_only=True)
class Card:
    name: str
    picture: str | None  # the address of a picture, which holds all of it
    tiny: bool  # it has so few pixels that each should be visible as one, not blurred into the next
    text: str | None  # of an input that is one
    answer: Side
    expected: Side | None  # None: not known
    right: bool | None  # None: not known, or answers of this kind are only more or less right
    frame: Frame | None  # None: nothing is drawn over the picture
    counts: str  # how many of its boxes are right, wrong and missed; empty: not known
    method: str | None  # that found what the answer rests on; None: it wasn't looked for
    marked: str | None  # the address of a picture that shows it
    words: tuple[Word, ...]  # or the words


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """An example beside others, with its target."""

    name: str
    split: str
    text: str
    picture: str | None
    tiny: bool
    words: str | None  # of an input that is a text


def thumbnail(one: Shown) -> Thumbnail:
    return Thumbnail(
        name=one.name,
        split=one.split,
        text=one.text,
        picture=_picture(one.preview),
        tiny=one.preview is not None and _is_tiny(one.preview),
        words=_text(one.preview),
    )


def cards(examples: Iterable[Example]) -> list[Card]:
    return [_card(one if one.answer else _with_answers(one)) for one in examples]


def target_cards(examples: Iterable[Example]) -> list[Card]:
    """Of examples that nothing was predicted for: their targets."""
    return [_card(replace(one, answer=one.expected, expected=None)) for one in examples]


def _with_answers(one: Example) -> Example:
    """An entry of an older version, which knew classes only."""
    probabilities = {} if one.true is None else {one.true: one.true_probability}
    values = {"label": one.predicted, "probability": one.probability, "probabilities": probabilities}
    return replace(
        one,
        answer=Answer(kind="classes", text=one.predicted or "unknown", values=values),
        expected=None if one.true is None else Answer(kind="classes", text=one.true, values={"label": one.true}),
        error=None if None in (one.true, one.predicted) else float(one.true != one.predicted),
    )


def _card(one: Example) -> Card:
    answer, preview, shares = one.answer or Answer(), one.preview, {}
    if answer.kind == "classes":
        values = _parse(ClassesAnswer, answer)
        shares = {**values.probabilities, values.label or answer.text: values.probability}
    side, expected = _side(answer, shares), None if one.expected is None else _side(one.expected, shares)
    drawn = one.view if side.boxes or (expected and expected.boxes) else None
    right = None if one.error is None else one.error == 0
    return Card(
        name=one.name,
        picture=_picture(preview),
        tiny=preview is not None and _is_tiny(preview),
        text=_text(preview),
        answer=side,
        expected=expected,
        right=right or (right if answer.kind in ("classes", "labels") else None),
        frame=None if drawn is None else _frame(drawn),
        counts=_count_verdicts(answer, one.expected),
        method=one.saliency.method if one.saliency else None,
        marked=_picture(one.saliency.picture) if one.saliency else None,
        words=tuple(_words(one.saliency.words)) if one.saliency else (),
    )


def _words(pairs: Sequence[tuple[str, float]]) -> Iterator[Word]:
    left = TEXT_LENGTH
    for text, weight in pairs:
        left -= len(text)
        if left < 0:
            return
        yield Word(text=text, speaks_for=weight > 0, strength=words.bar_length(abs(weight)))


def _side(one: Answer, shares: Mapping[str, Number]) -> Side:
    if one.kind == "classes":
        label = _parse(ClassesAnswer, one).label or one.text
        share = shares.get(label)
        return Side(text=label, share=words.percent(share) if words.is_known(share) else "")
    return Side(text=one.text, boxes=_name_few([*_boxes(one)]) if one.kind == "boxes" else ())


def _name_few(boxes: Sequence[Rectangle]) -> tuple[Rectangle, ...]:
    return tuple(boxes if sum(not box.right for box in boxes) <= MANY else [replace(box, name="") for box in boxes])


def _boxes(answer: Answer) -> Iterator[Rectangle]:
    for one in _parse(BoxesAnswer, answer).boxes:
        if edges := _places(one.box or ()):
            left, top, right, bottom = edges
            share = f" {words.percent(one.probability)}" if words.is_known(one.probability) else ""
            wrong = f": {one.verdict}" if one.verdict not in (None, RIGHT) else ""
            yield Rectangle(
                x=left,
                y=top,
                width=max(0.0, right - left),
                height=max(0.0, bottom - top),
                text=f"{one.label or ''}{share}{wrong}",
                right=None if one.verdict is None else one.verdict == RIGHT,
                name="" if one.verdict == RIGHT else f"{one.label or ''}{wrong if share else ''}",
            )


def _count_verdicts(answer: Answer, expected: Answer | None) -> str:
    """ "3 right, 1 duplicate, 2 missed"."""
    if answer.kind != "boxes" or expected is None:
        return ""
    own, true = (_parse(BoxesAnswer, one).boxes for one in (answer, expected))
    verdicts = [one.verdict for one in own] + [one.verdict for one in true if one.verdict != RIGHT]
    counts = Counter(verdict for verdict in verdicts if verdict is not None)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts, key=lambda one: one != RIGHT))


def _parse(kind: type[Values], answer: Answer) -> Values:
    """The values of an answer of that kind. Raises DamagedFile."""
    return parse_record(kind, dict(answer.values), f"An answer ({answer.text})") or kind()


def _frame(view: View) -> Frame | None:
    size, scale, shift = map(_places, (view.size, view.scale, view.shift))
    if not len(size) == len(scale) == len(shift) == 2 or min(size) <= 0:
        return None
    across = scale[1] or 1.0
    return Frame(
        width=size[1],
        height=size[0],
        transform=f"matrix({scale[1]} 0 0 {scale[0]} {shift[1]} {shift[0]})",
        letters=LETTERS * size[1] / across,
        turn=(TURN * size[1] - shift[1]) / across,
    )


def _places(values: Sequence[Number]) -> list[float]:
    """All of them, or none if a browser can't draw one."""
    known = [value for value in values if words.is_known(value) and abs(value) < FARTHEST]
    return known if len(known) == len(values) else []


def _picture(preview: Preview | None) -> str | None:
    """None: it is no picture."""
    if preview is None or preview.media_type not in PICTURES:
        return None
    return f"data:{preview.media_type};base64,{base64.b64encode(preview.content).decode()}"


def _is_tiny(preview: Preview) -> bool:
    size = preview.content[16:24]  # width and height in a PNG's first chunk
    return preview.media_type == "image/png" and len(size) == 8 and max(struct.unpack(">2I", size)) <= TINY


def _text(preview: Preview | None) -> str | None:
    """None: it is no text."""
    if preview is None or preview.media_type.partition(";")[0] != "text/plain":
        return None
    text = preview.content.decode("utf-8", "replace")
    return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + "…"
