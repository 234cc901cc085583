"""Values as people read them. What isn't known (None, NaN, infinite) is a dash, never a zero."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeGuard

from suanli.core.console import duration, size
from suanli.core.task import Metric
from suanli.core.types import Difference

UNKNOWN = "–"
FRACTION = "fraction"
SPACE = "\N{NO-BREAK SPACE}"  # a line never ends between a number and its sign


def is_known(value: float | None) -> TypeGuard[float]:
    """A number that can be shown; nothing that is measured is as large as 1e100."""
    return value is not None and abs(value) < 1e100  # False for NaN


def percent(value: float | None, decimals: int = 1) -> str:
    """A fraction: 0.9834 is '98.3 %'."""
    if not is_known(value):
        return UNKNOWN
    text = f"{100 * value:.{decimals}f}".replace("-", "−") if abs(value) < 100 else number(100 * value)
    return f"{text}{SPACE}%"


def number(value: float | None) -> str:
    """'1,437'; '0.0312'; '−12.5'."""
    if not is_known(value):
        return UNKNOWN
    if value < 0:
        return f"−{number(-value)}"
    if value == int(value) and value < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= value < 1e15 else f"{value:.4g}"


def times(value: float | None) -> str:
    """A ratio: '1.1', '12'."""
    return number(round(value, 1)) if is_known(value) else UNKNOWN


def score(value: float | None, unit: str, decimals: int = 1) -> str:
    """'98.3 %' of a fraction, '3.42 years', '0.274 nats'."""
    if unit == FRACTION:
        return percent(value, decimals)
    return with_unit(number(value), unit) if is_known(value) else UNKNOWN


def interval(bounds: tuple[float | None, float | None] | None, unit: str) -> str:
    """Of a score: '97.1 % to 98.9 %', '3.2 to 3.5 years'; empty where it isn't known."""
    if bounds is None or not all(map(is_known, bounds)):
        return ""
    if unit == FRACTION:
        return " to ".join(map(percent, bounds))
    return with_unit(" to ".join(map(number, bounds)), unit)


def change(value: float | None, unit: str, decimals: int = 1) -> str:
    """Of a score, without its unit (`unit_of_change`): '−0.1', '+1.0' points; '+0.031'."""
    if not is_known(value):
        return UNKNOWN
    text = f"{100 * value:+.{decimals}f}" if unit == FRACTION else f"{value:+.3g}"
    return text.replace("-", "−")


def unit_of_change(unit: str) -> str:
    return "points" if unit == FRACTION else unit


def difference(gain: Difference | None, metric: Metric, decimals: int = 1) -> str:
    """The change of a score, with its interval: '−0.19 (−0.45 to +0.07)'."""
    if gain is None or not all(map(is_known, (gain.median, gain.low, gain.high))):
        return UNKNOWN
    median, low, high = (change(value, metric.unit, decimals) for value in metric.change(gain))
    return f"{median} ({low} to {high})"


def amount(value: float, unit: str) -> str:
    """Of a difference, whichever its direction: '0.5 points', '0.031 years'."""
    return with_unit(change(abs(value), unit).lstrip("+"), unit_of_change(unit))


def with_unit(text: str, unit: str) -> str:
    return f"{text}{SPACE}{unit}" if unit else text


def seconds(value: float | None) -> str:
    return duration(value) if is_known(value) else UNKNOWN


def span(value: float | None) -> str:
    """A short time: '85 µs', '12.3 ms', '1.2 s'."""
    if not is_known(value) or abs(value) >= 1:
        return seconds(value)
    return si(value, "s")


PREFIXES = {15: "P", 12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "µ", -9: "n"}


def si(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix of a thousand: '410 GFLOP/s'."""
    if not is_known(value):
        return UNKNOWN
    digits = f"{abs(value):.3g}"  # rounded first: 999.9 is 1 k
    power = math.floor(math.log10(float(digits))) if float(digits) else 0
    prefix = min(max(power // 3 * 3, min(PREFIXES)), max(PREFIXES))
    scaled = float(digits) / 10.0**prefix
    text = f"{scaled:.3g}" if 1e-3 <= scaled < 1e3 else f"{scaled:.2e}"
    if scaled == 0:
        text = "0"
    sign = "−" if value < 0 else ""
    return f"{sign}{text}{SPACE}{PREFIXES[prefix]}{unit}".rstrip(SPACE)


def ratio(value: float | None) -> str:
    """How many times as fast: '1.42', '12.3'."""
    if not is_known(value):
        return UNKNOWN
    return f"{value:.2f}" if abs(value) < 10 else number(float(f"{value:.3g}"))


def spread(value: float | None, half: float | None, show: Callable[[float | None], str] = number) -> str:
    """A value and how far it varies: '1,240 ± 12'."""
    return f"{show(value)} ± {show(half)}" if is_known(value) and is_known(half) else show(value)


def memory(value: float | None) -> str:
    return size(value) if is_known(value) else UNKNOWN


def count(how_many: int | None, noun: str, plural: str | None = None) -> str:
    """'1 class', '1,437 inputs'."""
    return f"{number(how_many)} {noun if how_many == 1 else plural or noun + 's'}"


def with_spaces(name: str) -> str:
    """A field's name as words: 'balanced_accuracy' is 'balanced accuracy'."""
    return name.replace("_", " ")


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "。")) else ".")


def shape(values: Sequence[float]) -> str:
    return " × ".join(number(value) for value in values) or UNKNOWN


def plain(value: Any) -> str:
    """A value of a recipe."""
    if isinstance(value, str):
        return value or '""'
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)


def moment(time: str) -> str:
    """'2026-03-01T08:05:00+00:00' is '1 March 2026, 08:05 UTC'; what is no such time stays as it is."""
    try:
        at = datetime.fromisoformat(time)
    except ValueError:
        return time
    zone = f" {at.tzname()}" if at.tzinfo else ""
    return f"{at.day} {at:%B %Y, %H:%M}{zone}"


def bar_length(value: float | None) -> float:
    """As the length of a bar: 0 to 1, nothing for what isn't known."""
    return round(min(max(value, 0.0), 1.0), 4) if is_known(value) else 0.0


def present(values: Mapping[str, str | None]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in values.items() if value is not None]


def command(words: Sequence[str]) -> str:
    """What to paste into a shell."""
    return shlex.join(words)


FILTERS = {
    "percent": percent,
    "number": number,
    "seconds": seconds,
    "memory": memory,
    "span": span,
    "si": si,
    "ratio": ratio,
    "count": count,
    "with_spaces": with_spaces,
    "times": times,
    "sentence": sentence,
    "shape": shape,
    "plain": plain,
    "command": command,
    "moment": moment,
    "present": present,
}
