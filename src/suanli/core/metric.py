"""The score by which models are compared, and how scores are written."""

from __future__ import annotations

from dataclasses import dataclass

from suanli.core.types import Difference


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The score by which models are compared, and how much of it a faster way of computing may cost."""

    name: str  # a key of `Task.scores`
    tolerance: float  # of the gate
    relative: bool = False  # the tolerance is a share of the reference's score; else it is in the score's unit
    higher_is_better: bool = True
    unit: str = "fraction"  # "fraction": shown in percent, and its differences in points

    def gain(self, before: float, after: float) -> float:
        """By how much `after` is better; negative where it is worse."""
        return after - before if self.higher_is_better else before - after

    def allowed_loss(self, reference: float, tolerance: float | None = None) -> float:
        """How much may be lost of a reference's score; `tolerance` replaces the metric's own."""
        share = self.tolerance if tolerance is None else tolerance
        return share * abs(reference) if self.relative else share

    def change(self, gain: Difference) -> tuple[float, float, float]:
        """Of the score itself, which falls where a lower one is better: as measured, and the ends of the interval."""
        sign = 1 if self.higher_is_better else -1
        low, high = sorted((sign * gain.low, sign * gain.high))
        return sign * gain.median, low, high

    def describe(self, gain: Difference) -> str:
        """The change of the score, with its 95 % interval: "accuracy -0.31 points (-0.52 to -0.10)"."""
        median, low, high = self.change(gain)
        if self.unit == "fraction":
            return f"{self.name} {100 * median:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
        unit = f" {self.unit}" if self.unit else ""
        median_text, low_text, high_text = (format_number(value, "+", 3) for value in (median, low, high))
        return f"{self.name} {median_text}{unit} ({low_text} to {high_text})"

    def format(self, score: float | None) -> str:
        """A score, or an amount of it, for people: "98.31%", "3.42 years", "n/a"."""
        return format_score(score, self.unit)


def format_score(score: float | None, unit: str, sign: str = "") -> str:
    """ "98.31%", "3.42 years"; "n/a" where it isn't defined; with `sign` "+", of a difference."""
    if score is None:
        return "n/a"
    return f"{score:{sign}.2%}" if unit == "fraction" else f"{format_number(score, sign)} {unit}".rstrip()


def format_number(value: float, sign: str = "", digits: int = 4) -> str:
    """ "3.142", and all digits before the point of a large one: "27,043"."""
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < 1e15 else f"{value:{sign}.{digits}g}"
