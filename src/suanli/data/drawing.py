"""Draws answers on images: boxes with their names, or the text of any other answer.

Lines and letters grow with the image. Each line has a dark rim and each name a filled ground, so that both can be seen
on any image. The colours are those of Okabe and Ito ("Color Universal Design", 2008), which people with any of the
usual kinds of colour blindness can tell apart; from the eighth class on they return lighter, then darker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from suanli.core.answers import LISTS, Answer

Color: TypeAlias = tuple[int, int, int]
COLORS: tuple[Color, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
RIM: Color = (20, 20, 20)
LINE_SHARE, LETTER_SHARE = 1 / 300, 1 / 44  # of the mean of the image's sides
SMALLEST_LETTERS, LARGEST_LETTERS = 9, 160  # px
LONGEST_NAME = 40  # characters
FONTS = (
    "",  # Pillow's own
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc"),
    *("wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf"),
    *("Arial Unicode.ttf", "DejaVuSans.ttf"),
)

Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"


def draw_answer(pixels: np.ndarray, answer: Answer, classes: Sequence[str]) -> Image.Image:
    """An RGB image of the same size from pixels (H, W, 1 | 3) uint8. The colour of a box is that of its class's place
    in `classes`."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    canvas = _Canvas(image)
    if answer.kind not in LISTS:
        canvas.write(0, 0, answer.text, COLORS[0])
        return image
    places = {name: i for i, name in enumerate(classes)}
    entries = [
        (entry, places.get(entry["label"], len(classes))) for entry in reversed(answer.values[LISTS[answer.kind]])
    ]
    for entry, place in entries:  # the best is on top
        canvas.frame(entry["box"], color_of(place))
    for entry, place in entries:
        left, top = entry["box"][:2]
        canvas.write(left, top, _describe(entry, place), color_of(place), above=True)
    return image


def color_of(place: int) -> Color:
    """Of the class at this place."""
    base, cycle = COLORS[place % len(COLORS)], place // len(COLORS) % 3
    if cycle == 0:
        return base
    other, share = (255, 0.5) if cycle == 1 else (0, 0.4)
    red, green, blue = (round(part + (other - part) * share) for part in base)
    return red, green, blue


def _describe(entry: Mapping[str, Any], place: int) -> str:
    """Its class, by number where no letters for the name are on this machine."""
    name = " ".join(str(entry["label"]).split())
    name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
    name = name if _font(SMALLEST_LETTERS, name) else f"class {place}"
    return name if entry.get("probability") is None else f"{name} {entry['probability']:.2f}"


class _Canvas:
    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)
        self._width, self._height = image.size
        mean = (self._width + self._height) / 2
        self.line = max(1, round(mean * LINE_SHARE))
        self._letters = round(min(max(mean * LETTER_SHARE, SMALLEST_LETTERS), LARGEST_LETTERS))

    def frame(self, box: Sequence[float], color: Color) -> None:
        """Around the pixels of the box; one of less than a pixel still has one."""
        left, top = (min(max(int(side), 0), end - 1) for side, end in zip(box[:2], self._size, strict=True))
        right = min(max(round(box[2]) - 1, left), self._width - 1)
        bottom = min(max(round(box[3]) - 1, top), self._height - 1)
        rim = max(1, self.line // 3)
        outer = (left - rim, top - rim, right + rim, bottom + rim)
        self._draw.rectangle(outer, outline=RIM, width=self.line + 2 * rim)
        self._draw.rectangle((left, top, right, bottom), outline=color, width=self.line)

    @property
    def _size(self) -> tuple[int, int]:
        return self._width, self._height

    def write(self, left: float, top: float, text: str, color: Color, *, above: bool = False) -> None:
        """Dark or light letters on a ground of this colour, with the corner at this place, or above it where there is
        room; moved into the image."""
        font = _font(self._letters, text) or ImageFont.load_default(self._letters)
        x0, y0, x1, y1 = self._draw.textbbox((0, 0), text, font=font)
        space = max(1, self._letters // 5)
        width, height = x1 - x0 + 2 * space, y1 - y0 + 2 * space
        if above and top - height >= 0:
            top -= height
        left, top = round(max(min(left, self._width - width), 0)), round(max(min(top, self._height - height), 0))
        self._draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
        dark = np.dot(color, (0.299, 0.587, 0.114)) > 130
        self._draw.text((left + space - x0, top + space - y0), text, font=font, fill=RIM if dark else (255, 255, 255))


def _font(size: int, text: str) -> Font | None:
    """The first that has all letters of the text: Pillow's own, or one of this machine."""
    letters = {letter for letter in text if not letter.isspace()}
    name = next((name for name in FONTS if all(_has_letter(name, letter) for letter in letters)), None)
    return None if name is None else _load_font(name, size)


@cache
def _load_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@lru_cache(maxsize=10_000)
def _has_letter(name: str, letter: str) -> bool:
    """A letter that a font lacks looks like the one that none has."""
    font = _load_font(name, SMALLEST_LETTERS)
    return font is not None and bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))
