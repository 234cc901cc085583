"""What the report says about engines: which was chosen, what it costs in score, and all that were tried.

Like `views.py`: each function takes records and gives plain values, and works with any part absent. Costs are compared
as the search does it (`autotune.py`), which isn't imported: it needs numpy and the engines' room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.reporting import words
from suanli.reporting.charts import Chart, Point, Series, chart, decades
from suanli.reporting.engine_records import Candidate, Engines, Found, Pace
from suanli.reporting.speed_records import Difference

CLEARLY = 1.1  # times as fast has one thread to be
STATES = {"lost": "failed"}  # its process was


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    number: int
    name: str
    chosen: bool
    unbeaten: bool
    remark: str
    refused: str  # its state, if it wasn't accepted
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Search:
    sentences: list[str]
    chart: Chart | None
    score: str | None  # the name of the plot's y axis; None: it is inputs per second
    columns: list[Cell]
    rows: list[Row]
    untried: list[tuple[str, str]]  # names, and why not
    notes: list[str]


def search(engines: Engines) -> Search | None:
    """None where no candidate is known."""
    found = engines.found
    if not found.candidates:
        return None
    goal = found.goal or ""
    order = sorted(found.candidates, key=lambda one: (one.state != "accepted", _cost(one, goal)))
    tried = [one for one in order if one.speeds or words.known(one.build_s) or words.known(one.score)]
    headline = engines.headline or "score"
    columns, cells = _table(tried, found, headline)
    scored = any(words.known(one.score) for one in tried)
    return Search(
        sentences=_sentences(engines, headline),
        chart=_plot(tried, found, headline if scored else None),
        score=words.spaced(headline) if scored else None,
        columns=columns,
        rows=[_row(number, one, found, cells[number - 1]) for number, one in enumerate(tried, 1)],
        untried=[(name(one), f"{_state(one)}: {one.reason}") for one in order if one not in tried],
        notes=_notes(found, headline),
    )


def name(one: Candidate) -> str:
    return f"{one.engine} {one.precision}" + (f" (rescued, {len(one.kept)} kept)" if one.kept else "")


# --- how good ---


def _latency(one: Candidate) -> Pace | None:
    """With one input, with the number of threads that `Candidate.latency` in `candidates.py` takes."""
    alone = [pace for pace in one.speeds if pace.batch == 1 and _positive(pace.p50_s)]
    most = max((pace.threads or 1 for pace in alone), default=1)

    def cost(pace: Pace) -> float:
        return (pace.p50_s or 0.0) * (CLEARLY if (pace.threads or 1) < most else 1)

    return min(alone, key=cost, default=None)


def _throughput(one: Candidate) -> Pace | None:
    return max((pace for pace in one.speeds if _per_s(pace)), key=lambda pace: _per_s(pace) or 0.0, default=None)


def _per_s(pace: Pace | None) -> float | None:
    if pace is None or not _positive(pace.p50_s) or not pace.batch or not 0 < pace.batch < 1e15:
        return None
    return pace.batch / (pace.p50_s or math.nan)


def _joules(one: Candidate) -> float | None:
    return min((pace.joules for pace in one.speeds if words.known(pace.joules)), default=None)


def _positive(value: float | None) -> bool:
    """That can be divided by."""
    return words.known(value) and value > 1e-30


def _cost(one: Candidate, goal: str) -> float:
    """What `goal` wants least of; infinite where it isn't known."""
    latency = _latency(one)
    costs = {
        "size": one.size_bytes,
        "energy": _joules(one),
        "throughput": 1 / (_per_s(_throughput(one)) or math.nan),
    }
    cost = costs.get(goal, latency.p50_s if latency else None)
    return cost if words.known(cost) else math.inf


# --- sentences ---

GAINS: dict[str, Callable[[float], str]] = {
    "latency": lambda times: f"{words.ratio(times)} times as fast with one input as",
    "throughput": lambda times: f"{words.ratio(times)} times as many inputs per second as",
    "size": lambda times: f"{words.percent(1 / times)} of the size of",
    "energy": lambda times: f"{words.percent(1 / times)} of the energy of",
}


def _sentences(engines: Engines, headline: str) -> list[str]:
    found, machine = engines.found, engines.machine
    said = []
    if found.chosen is not None:
        said += [_choice(found, found.chosen), _exam(found, found.chosen, headline)]
    if machine.device:
        cores = f" with {words.count(machine.cores, 'core')}" if machine.cores else ""
        said.append(f"Measured on {machine.device}{cores}.")
    return [one for one in said if one]


def _choice(found: Found, chosen: Candidate) -> str:
    reference, goal = found.candidates[0], found.goal or ""
    said = f"Chosen for {goal or 'an unknown goal'}: {name(chosen)}"
    if _same(chosen, reference):
        return f"{said}, the reference itself; no other engine is clearly better."
    ours, theirs = _cost(chosen, goal), _cost(reference, goal)
    if goal in GAINS and _positive(ours) and _positive(theirs):
        return f"{said}, {GAINS[goal](theirs / ours)} the reference, {name(reference)}."
    return f"{said}; the reference is {name(reference)}."


def _exam(found: Found, chosen: Candidate, headline: str) -> str:
    if found.labelled is False:
        made_up = words.count(found.examples, "made-up input")
        return f"Without labelled data only float32 was tried, and answers were compared on {made_up}."
    if not words.known(chosen.score):
        return ""
    said = f"its {words.spaced(headline)} is {words.score(headline, chosen.score, 2)}"
    if not _same(chosen, found.candidates[0]):
        form = f", {{}} points against the reference (95{words.SPACE}% interval {{}} to {{}})"
        said += _difference(chosen, form)
    if found.examples is None:
        return words.sentence(said)
    part = "all" if found.of_examples in (None, found.examples) else f"{words.number(found.examples)} of"
    return f"On {part} {words.count(found.of_examples or found.examples, 'validation example')} {said}."


def _same(one: Candidate, other: Candidate) -> bool:
    return (one.engine, one.precision, one.kept) == (other.engine, other.precision, other.kept)


def _notes(found: Found, headline: str) -> list[str]:
    said = [
        "p50, p95, p99: one input, with all threads unless one is clearly faster; inputs/s: with the batch size and "
        "the threads that are best. All were timed by turns, each in a process of its own, whose memory is told."
    ]
    if words.known(found.tolerance) and found.labelled:
        allowed = words.points(found.tolerance).lstrip("+−")
        said.append(
            "Differences are to the reference on the same examples, with the 95 % interval; a loss of up to "
            f"{allowed} points of {words.spaced(headline)} is tolerated."
        )
        difference = found.chosen.difference if found.chosen else None
        if difference and words.known(difference.low) and words.known(difference.high):
            half = (difference.high - difference.low) / 2
            if half > found.tolerance:
                wide = words.points(half).lstrip("+−")
                said.append(f"So few examples can't show a loss as small as that: the interval is ±{wide} points wide.")
    if any(one.kept for one in found.candidates):
        said.append("Rescued: so many of the most sensitive layers were kept in higher precision.")
    if found.graph:
        said.append(f"There is no ONNX graph: {words.sentence(found.graph)}")
    if words.known(found.seconds):
        budget = f" of the {words.seconds(found.budget_s)} that were allowed" if words.known(found.budget_s) else ""
        said.append(f"The search took {words.seconds(found.seconds)}{budget}.")
    return said


# --- the table ---


def _table(tried: Sequence[Candidate], found: Found, headline: str) -> tuple[list[Cell], list[list[Cell]]]:
    """Columns in which anything is known, and their cells."""

    def latency(one: Candidate) -> Pace:
        return _latency(one) or Pace()

    def score(one: Candidate) -> Cell:
        difference = "" if one is found.candidates[0] else _difference(one, "{} ({} to {})")
        return Cell(text=words.score(headline, one.score, 2), detail=difference)

    columns: dict[Cell, Callable[[Candidate], Cell]] = {
        Cell(text="p50 ms"): lambda one: Cell(text=_ms(latency(one).p50_s)),
        Cell(text="p95"): lambda one: Cell(text=_ms(latency(one).p95_s)),
        Cell(text="p99"): lambda one: Cell(text=_ms(latency(one).p99_s)),
        Cell(text="inputs/s", detail="batch, threads"): _most,
        Cell(text="energy", detail="an input"): lambda one: Cell(text=words.si(_joules(one), "J")),
        Cell(text="size", detail="memory"): lambda one: _both(words.memory, one.size_bytes, one.memory_bytes),
        Cell(text="load", detail="build"): lambda one: _both(words.span, one.load_s, one.build_s),
        Cell(text=words.spaced(headline), detail="difference, points"): score,
    }
    told = {title: [show(one) for one in tried] for title, show in columns.items()}
    known = {title: cells for title, cells in told.items() if any(cell.text != words.UNKNOWN for cell in cells)}
    return list(known), [[cells[i] for cells in known.values()] for i in range(len(tried))]


def _both(show: Callable[[float | None], str], first: float | None, second: float | None) -> Cell:
    return Cell(text=show(first), detail=show(second))


def _row(number: int, one: Candidate, found: Found, cells: list[Cell]) -> Row:
    reference, accepted = one is found.candidates[0], one.state == "accepted"
    return Row(
        number=number,
        name=name(one),
        chosen=found.chosen is not None and _same(one, found.chosen),
        unbeaten=one.best,
        remark="reference" if reference else "" if accepted else one.reason,
        refused="" if accepted else _state(one),
        cells=cells,
    )


def _state(one: Candidate) -> str:
    return STATES.get(one.state, one.state)


def _most(one: Candidate) -> Cell:
    pace = _throughput(one)
    if pace is None:
        return Cell(text=words.UNKNOWN)
    return Cell(text=words.number(_per_s(pace)), detail=f"{words.number(pace.batch)}, {words.number(pace.threads)}")


def _difference(one: Candidate, form: str) -> str:
    """Of the score to the reference's, with its interval; empty where it isn't known."""
    found = one.difference or Difference()
    values = (found.median, found.low, found.high)
    return form.format(*(words.points(v, 2) for v in values)) if all(map(words.known, values)) else ""


def _ms(value: float | None) -> str:
    return words.number(float(f"{1000 * value:.3g}")) if words.known(value) else words.UNKNOWN


# --- the plot ---

Placed = tuple[int, Candidate, Point]


def _plot(tried: Sequence[Candidate], found: Found, headline: str | None) -> Chart | None:
    """Latency against the score, or, without one, against inputs per second. Only accepted engines have a place."""
    percent = headline is not None and words.score(headline, found.candidates[0].score).endswith("%")

    def up(one: Candidate) -> float:
        value = _per_s(_throughput(one)) if headline is None else one.score
        return (100 if percent else 1) * value if words.known(value) else math.nan

    timed = [(number, one, _latency(one)) for number, one in enumerate(tried, 1) if one.state == "accepted"]
    placed = [(number, one, (1000 * (pace.p50_s or 0.0), up(one))) for number, one, pace in timed if pace]
    placed = [(number, one, (x, y)) for number, one, (x, y) in placed if x < 1e30 and abs(y) < 1e30]
    if not placed:
        return None
    low, high = min(x for *_, (x, _) in placed) / 1.05, max(x for *_, (x, _) in placed) * 1.05
    x_range = decades(low / 10, low)[-1], decades(high, 10 * high)[0]  # round values, so that few have ticks, too
    lowest = up(found.candidates[0]) - (100 if percent else 1) * (found.tolerance or 0.0)
    tolerated = Series(label="lowest tolerated", points=[(x, lowest) for x in x_range], colour="rule-line")
    what = words.spaced(headline or "inputs per second")
    return chart(
        f"Engines: latency and {what}",
        [
            *([tolerated] if headline is not None and words.known(found.tolerance) else []),
            _dots("other engines", "rule-line", [p for p in placed if not p[1].best], found),
            _dots("unbeaten", "first", [p for p in placed if p[1].best], found),
        ],
        x_label="ms for one input (p50)",
        x_range=x_range,
        y_label=f"{what}, %" if percent else what,
        show=words.si if headline is None else None,
        log="x",
    )


def _dots(label: str, colour: str, placed: Sequence[Placed], found: Found) -> Series:
    return Series(
        label=label,
        points=[point for *_, point in placed],
        colour=colour,
        line=False,
        radii=[6.0 if found.chosen and _same(one, found.chosen) else 4.0 for _, one, _ in placed],
        texts=[f"{number}: {name(one)}, {x:.3g} ms, {y:.4g}" for number, one, (x, y) in placed],
        marks=[str(number) for number, *_ in placed],
    )
