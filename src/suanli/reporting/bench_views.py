"""What the report says about a bench: the ladder from plain PyTorch to all speedups, with its scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from suanli.reporting import words
from suanli.reporting.bars import Rung as Step
from suanli.reporting.bars import Waterfall, waterfall
from suanli.reporting.speed_records import Bench, Figures, Rung, Spread

PARTS = {"train": "Training", "evaluate": "Evaluation"}


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    verdict: str  # "refused", "failed", or nothing
    reason: str
    cells: list[str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The ladder of training or of evaluation."""

    title: str
    columns: list[str]
    rows: list[Row]
    chart: Waterfall | None


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """`best` is how many times as fast as plain PyTorch training is with all that was accepted.

    `loses` and `refuses`: whether a bar is drawn that does.
    """

    best: Spread
    loses: bool
    refuses: bool
    parts: list[Part]
    notes: list[str]


Cell = Callable[[Figures], str]


def ladder(bench: Bench) -> Ladder:
    parts = [_part(bench, key) for key in PARTS if any(getattr(rung, key) for rung in bench.rungs)]
    kinds = {bar.kind for part in parts if part.chart for bar in part.chart.bars if bar.strong}
    return Ladder(
        best=_last(bench, "train").ratio,
        loses="second" in kinds,
        refuses="refused" in kinds,
        parts=parts,
        notes=_notes(bench),
    )


def _part(bench: Bench, key: str) -> Part:
    columns = _columns(key)
    told = [[_cell(getattr(rung, key), show) for show in columns.values()] for rung in bench.rungs]
    names = list(columns)
    if key == "train":
        names += [words.spaced(bench.headline or "score"), "difference to plain, points"]
        told = [[*cells, *_scores(bench, rung)] for cells, rung in zip(told, bench.rungs, strict=True)]
    kept = [i for i in range(len(names)) if any(cells[i] != words.UNKNOWN for cells in told)]
    return Part(
        title=PARTS[key],
        columns=[names[i] for i in kept],
        rows=[
            Row(name=rung.name, verdict=_verdict(rung), reason=rung.refused or "", cells=[cells[i] for i in kept])
            for rung, cells in zip(bench.rungs, told, strict=True)
        ],
        chart=waterfall(
            f"{PARTS[key]}, examples per second",
            [_step(rung, getattr(rung, key)) for rung in bench.rungs],
            x_label="examples per second",
        ),
    )


def _columns(key: str) -> dict[str, Cell]:
    def wait(figures: Figures) -> str:
        middle, high = figures.step_ms_p50, figures.step_ms_p95
        if key == "evaluate":
            middle, high = figures.batch_ms_p50, figures.batch_ms_p95
        if not words.known(middle) and not words.known(high):
            return words.UNKNOWN
        return f"{_ms(middle)} / {_ms(high)}"

    return {
        "examples per second": lambda f: _rate(f.examples_per_s),
        "times plain": lambda f: words.spread(f.ratio.median, f.ratio.half_iqr or None, words.ratio),
        f"{'step' if key == 'train' else 'batch'} in ms, p50{words.SPACE}/{words.SPACE}p95": wait,
        "memory": lambda f: words.memory(f.peak_memory_bytes),
        "of ceiling": lambda f: words.percent(f.share_of_ceiling, 0),
        "energy an example": lambda f: words.si(f.joules_per_example, "J"),
        "examples per price unit": lambda f: words.si(f.examples_per_price),
    }


def _cell(figures: Figures | None, show: Cell) -> str:
    return words.UNKNOWN if figures is None else show(figures)


def _scores(bench: Bench, rung: Rung) -> list[str]:
    name = bench.headline or next(iter(rung.scores), "")
    score = words.score(name, rung.scores.get(name))
    difference = words.UNKNOWN
    if (found := rung.difference) is not None and words.known(found.median):
        difference = words.points(found.median)
        if words.known(found.low) and words.known(found.high):
            difference += f" ({words.points(found.low)} to {words.points(found.high)})"
    return [score, difference]


def _step(rung: Rung, figures: Figures | None) -> Step:
    speed = (figures or Figures()).examples_per_s
    said = words.number(speed.median) if words.known(speed.median) else "not measured"
    if figures and words.known(figures.ratio.median):
        said += f"  {words.ratio(figures.ratio.median)} ×"
    if verdict := _verdict(rung):
        said = f"{verdict}, {said}" if words.known(speed.median) else verdict
    return Step(name=rung.name, value=speed.median, half_iqr=speed.half_iqr, said=said, refused=bool(verdict))


def _verdict(rung: Rung) -> str:
    if rung.failed:
        return "failed"
    return "" if rung.refused is None else "refused"


def _rate(speed: Spread) -> str:
    whole = words.known(speed.median) and abs(speed.median) >= 100
    return words.spread(speed.median, speed.half_iqr, _rounded if whole else words.number)


def _rounded(value: float | None) -> str:
    return words.number(float(round(value))) if words.known(value) else words.UNKNOWN


def _whole(value: float | None) -> str:
    """Rates over 100 have no need of decimals."""
    return _rounded(value) if words.known(value) and abs(value) >= 100 else words.number(value)


def _ms(value: float | None) -> str:
    return f"{value:.3g}" if words.known(value) and abs(value) < 100 else _whole(value)


def _last(bench: Bench, key: str) -> Figures:
    """Of the last rung that was accepted and measured."""
    found: list[Figures | None] = [getattr(rung, key) for rung in bench.rungs if not _verdict(rung)]
    return next((one for one in reversed(found) if one is not None), Figures())


def _notes(bench: Bench) -> list[str]:
    said = []
    if bench.rounds and bench.rounds > 1:
        said.append(
            f"Every rung was measured by turns in {words.count(bench.rounds, 'round')}; ± is half the interquartile "
            "range, and ratios are of figures of the same round."
        )
    shares = [one.share_of_ceiling for rung in bench.rungs for one in (rung.train, rung.evaluate) if one]
    if any(map(words.known, shares)):
        said.append(
            "Of ceiling: the share of the FLOP/s that this device was measured to reach in the rung's precision."
        )
    if bench.steps:
        told = f"Scores are on validation after {words.count(bench.steps, 'step')} from the same start"
        if words.known(bench.tolerance):
            told += f"; the task tolerates a fall of {_points(bench.tolerance)} points"
        said.append(told + ".")
    return [*said, *_remarks(bench)]


def _remarks(bench: Bench) -> list[str]:
    """What makes the scores less sure."""
    said = [
        f"{rung.name} lost some of its score with this seed but not with another one: chance, so it isn't refused."
        for rung in bench.rungs
        if rung.again is not None and rung.refused is None
    ]
    halves = [
        (d.high - d.low) / 2
        for rung in bench.rungs
        if (d := rung.difference) and words.known(d.high) and words.known(d.low)
    ]
    widest = max(halves, default=0.0)
    if words.known(bench.tolerance) and widest > bench.tolerance:
        examples = words.count(bench.validation_examples, "validation example")
        if bench.validation_examples is None:
            examples = "The validation examples"
        said.append(
            f"{examples} can't show a loss as small as that: intervals are up to ±{_points(widest)} points wide."
        )
    if bench.steps and bench.planned_steps and bench.steps < bench.planned_steps:
        said.append(
            f"Time allowed {words.number(bench.steps)} of {words.number(bench.planned_steps)} steps: the learning "
            "rate had not come down, so scores vary more."
        )
    return said


def _points(value: float) -> str:
    return words.points(value).lstrip("+−")


def sentences(bench: Bench, model: str, data: str) -> list[str]:
    """The bench in brief, for a directory that holds nothing else."""
    added = max(0, len(bench.rungs) - 1)
    said = "Plain PyTorch"
    if added:
        said += f" and {words.count(added, 'change')}, added one after the other"
    said += f": {model} on {data}, measured on {bench.device or 'an unknown device'}"
    said += f" with batches of {words.number(bench.batch_size)}." if bench.batch_size else "."
    found = [said]
    for key, title in PARTS.items():
        figures = _last(bench, key)
        if words.known(figures.examples_per_s.median):
            told = f"{title} reaches {_whole(figures.examples_per_s.median)} examples per second"
            times = figures.ratio.median
            found.append(told + (f", {words.ratio(times)} times plain PyTorch." if words.known(times) else "."))
    for verdict, title in (("refused", "Refused for its score"), ("failed", "Doesn't run here")):
        names = [rung.name.removeprefix("+ ") for rung in bench.rungs if _verdict(rung) == verdict]
        if names:
            found.append(f"{title}: {', '.join(names)}.")
    return found
