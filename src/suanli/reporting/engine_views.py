"""The report on engines: which was chosen, what it costs in score, and all that were tried.

Like `views.py`: each function takes records and gives plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.core.task import Metric
from suanli.engines.candidates import Candidate, SearchResult
from suanli.reporting import words
from suanli.reporting.charts import Chart, Point, Series, chart, decades
from suanli.reporting.records import Engines

STATES = {  # as people read them
    "impossible": "unsupported",
    "refused": "rejected",
    "lost": "crashed or timed out",
    "no time": "skipped (budget)",
    "waiting": "skipped (budget)",
}


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
class SearchView:
    sentences: list[str]
    chart: Chart | None
    score: str | None  # the name of the plot's y axis; None: it is examples per second
    columns: list[Cell]
    rows: list[Row]
    untried: list[tuple[str, str]]  # names, and why not
    notes: list[str]


def search_view(engines: Engines, metric: Metric) -> SearchView | None:
    """None where no candidate is known."""
    search = engines.search
    if search is None or not search.candidates:
        return None
    order = sorted(search.candidates, key=lambda one: (one.state != "accepted", one.cost(search.goal)))
    tried = [one for one in order if one.speeds or words.is_known(one.build_s) or words.is_known(one.score)]
    columns, cells = _table(tried, search, metric)
    scored = any(words.is_known(one.score) for one in tried)
    return SearchView(
        sentences=_sentences(engines, search, metric),
        chart=_plot(tried, search, metric if scored else None),
        score=words.with_spaces(metric.name) if scored else None,
        columns=columns,
        rows=[_row(number, one, search, cells[number - 1]) for number, one in enumerate(tried, 1)],
        untried=[(one.name, f"{_state(one)}: {one.reason}") for one in order if one not in tried],
        notes=_notes(search, metric),
    )


def _joules(one: Candidate) -> float | None:
    return min((speed.joules for speed in one.speeds if speed.joules is not None), default=None)


# --- sentences ---

GAINS: dict[str, Callable[[float], str]] = {
    "latency": lambda times: f"{words.ratio(times)}× faster with one example than",
    "throughput": lambda times: f"{words.ratio(times)}× the throughput of",
    "size": lambda times: f"{words.percent(1 / times)} of the size of",
    "energy": lambda times: f"{words.percent(1 / times)} of the energy of",
}


def _sentences(engines: Engines, search: SearchResult, metric: Metric) -> list[str]:
    machine = engines.machine
    sentences = [_choice(search), _score(search, metric)]
    if machine.device:
        cores = f" with {words.count(machine.cores, 'core')}" if machine.cores else ""
        sentences.append(f"Measured on {machine.device}{cores}.")
    return [one for one in sentences if one]


def _choice(search: SearchResult) -> str:
    reference, chosen, goal = search.candidates[0], search.chosen, search.goal
    choice = f"Chosen for {goal}: {chosen.name}"
    if _same(chosen, reference):
        return f"{choice}, the baseline itself; no other engine is clearly better."
    ours, theirs = chosen.cost(goal), reference.cost(goal)
    if goal in GAINS and ours and words.is_known(ours) and words.is_known(theirs):
        return f"{choice}, {GAINS[goal](theirs / ours)} the baseline, {reference.name}."
    return f"{choice}; the baseline is {reference.name}."


def _score(search: SearchResult, metric: Metric) -> str:
    chosen = search.chosen
    part = "all" if search.of_examples == search.examples else f"{words.number(search.examples)} of"
    if search.origin == "unlabelled":
        inputs = f"{part} {words.count(search.of_examples, 'example')} without labels"
        return f"On {inputs} {_agreement(chosen)}." if chosen.drifts else f"Answers were compared on {inputs}."
    if not search.labelled:
        made_up = words.count(search.examples, "random input")
        return f"Without labelled data only float32 was tried, and answers were compared on {made_up}."
    if not words.is_known(chosen.score):
        return ""
    score = f"its {words.with_spaces(metric.name)} is {words.score(chosen.score, metric.unit, 2)}"
    if not _same(chosen, search.candidates[0]) and chosen.difference:
        median, low, high = (words.change(value, metric.unit, 2) for value in metric.change(chosen.difference))
        score += f", {words.with_unit(median, words.unit_of_change(metric.unit))} against the reference"
        score += f" (95{words.SPACE}% interval {low} to {high})"
    return f"On {part} {words.count(search.of_examples, 'validation example')} {score}."


def _agreement(chosen: Candidate) -> str:
    """With the reference's answers."""
    differs = f"its answers differ from the reference's by {_drift(chosen)} on average"
    if (same := chosen.agreement) is None:
        return differs
    bounds = words.interval((same.low, same.high), words.FRACTION)
    return f"{differs}, and {words.percent(same.value, 2)} get the same decision (95{words.SPACE}% interval {bounds})"


def _drift(one: Candidate) -> str:
    """Where it was measured in place of a score."""
    return f"{one.drift:.2g}" if one.drifts and words.is_known(one.drift) else words.UNKNOWN


def _same(one: Candidate, other: Candidate) -> bool:
    return (one.engine, one.precision, one.kept) == (other.engine, other.precision, other.kept)


def _notes(search: SearchResult, metric: Metric) -> list[str]:
    notes = [
        "p50, p95, p99: latency of one example, with all threads unless one thread is clearly faster. Examples/s: with "
        "the best batch size and number of threads. Engines were timed in turn, each in its own process, whose memory "
        "is in the table."
    ]
    if words.is_known(search.tolerance) and search.labelled:
        notes.append(
            "Differences are from the reference on the same examples, with the 95 % interval; a loss of up to "
            f"{words.amount(search.tolerance, metric.unit)} of {words.with_spaces(metric.name)} is tolerated."
        )
        difference = search.chosen.difference
        if difference and (half := (difference.high - difference.low) / 2) > search.tolerance:
            wide = words.amount(half, metric.unit)
            notes.append(f"So few examples can't show a loss as small as that: the interval is ±{wide} wide.")
    if search.origin == "unlabelled" and search.chosen.agreement:
        most = words.percent(search.tolerance)
        notes.append(f"An engine may decide otherwise than the reference on up to {most} of examples.")
    if any(one.kept for one in search.candidates):
        notes.append("Layers in float32: the number of most sensitive layers that stayed in that precision.")
    if search.graph:
        notes.append(f"There is no ONNX graph: {words.sentence(search.graph)}")
    if words.is_known(search.seconds):
        budget = (
            f" of the {words.seconds(search.budget_s)} that were allowed" if words.is_known(search.budget_s) else ""
        )
        notes.append(f"The search took {words.seconds(search.seconds)}{budget}.")
    return notes


# --- the table ---


def _table(tried: Sequence[Candidate], search: SearchResult, metric: Metric) -> tuple[list[Cell], list[list[Cell]]]:
    """Columns in which anything is known, and their cells."""

    def ms(percentile: str) -> Callable[[Candidate], Cell]:
        return lambda one: Cell(text=_ms(getattr(one.latency(), percentile, None)))

    def score(one: Candidate) -> Cell:
        against = None if one is search.candidates[0] else one.difference
        difference = "" if against is None else words.difference(against, metric, 2)
        return Cell(text=words.score(one.score, metric.unit, 2), detail=difference)

    unit = words.unit_of_change(metric.unit)
    columns: dict[Cell, Callable[[Candidate], Cell]] = {
        Cell(text="p50 ms"): ms("p50_s"),
        Cell(text="p95"): ms("p95_s"),
        Cell(text="p99"): ms("p99_s"),
        Cell(text="examples/s", detail="batch, threads"): _throughput,
        Cell(text="energy", detail="an example"): lambda one: Cell(text=words.si(_joules(one), "J")),
        Cell(text="size", detail="memory"): lambda one: _both(words.memory, one.size_bytes, one.memory_bytes),
        Cell(text="load", detail="build"): lambda one: _both(words.span, one.load_s, one.build_s),
        Cell(text="differs by", detail="same answer"): lambda one: Cell(
            text=_drift(one), detail=words.percent(one.agreement.value, 2) if one.agreement else ""
        ),
        Cell(text=words.with_spaces(metric.name), detail=f"difference{f', {unit}' if unit else ''}"): score,
    }
    everything = {title: [show(one) for one in tried] for title, show in columns.items()}
    known = {title: cells for title, cells in everything.items() if any(cell.text != words.UNKNOWN for cell in cells)}
    return list(known), [[cells[i] for cells in known.values()] for i in range(len(tried))]


def _both(show: Callable[[float | None], str], first: float | None, second: float | None) -> Cell:
    return Cell(text=show(first), detail=show(second))


def _row(number: int, one: Candidate, search: SearchResult, cells: list[Cell]) -> Row:
    reference, accepted = one is search.candidates[0], one.state == "accepted"
    return Row(
        number=number,
        name=one.name,
        chosen=_same(one, search.chosen),
        unbeaten=one.best,
        remark="reference" if reference else "" if accepted else one.reason,
        refused="" if accepted else _state(one),
        cells=cells,
    )


def _state(one: Candidate) -> str:
    return STATES.get(one.state, one.state)


def _throughput(one: Candidate) -> Cell:
    speed = one.throughput()
    if speed is None:
        return Cell(text=words.UNKNOWN)
    return Cell(text=words.number(speed.per_s), detail=f"{words.number(speed.batch)}, {words.number(speed.threads)}")


def _ms(value: float | None) -> str:
    return words.number(float(f"{1000 * value:.3g}")) if words.is_known(value) else words.UNKNOWN


# --- the plot ---

Placed = tuple[int, Candidate, Point]


def _plot(tried: Sequence[Candidate], search: SearchResult, metric: Metric | None) -> Chart | None:
    """Latency against the score, or, without one, against inputs per second. Only accepted engines have a place."""
    percent = metric is not None and metric.unit == words.FRACTION
    scale = 100 if percent else 1

    def up(one: Candidate) -> float:
        speed = one.throughput()
        value = one.score if metric is not None else None if speed is None else speed.per_s
        return scale * value if words.is_known(value) else math.nan

    timed = [(number, one, one.latency()) for number, one in enumerate(tried, 1) if one.state == "accepted"]
    placed = [(number, one, (1000 * speed.p50_s, up(one))) for number, one, speed in timed if speed]
    placed = [(number, one, (x, y)) for number, one, (x, y) in placed if 1e-30 < x < 1e30 and abs(y) < 1e30]
    if not placed:
        return None
    low, high = min(x for *_, (x, _) in placed) / 1.05, max(x for *_, (x, _) in placed) * 1.05
    x_range = decades(low / 10, low)[-1], decades(high, 10 * high)[0]  # round values, so that few have ticks, too
    what, unit, tolerated = "examples per second", "", []
    if metric is not None:
        what, unit = words.with_spaces(metric.name), "%" if percent else metric.unit
        tolerated = [_tolerated(up(search.candidates[0]), scale * search.tolerance, metric, x_range)]
    return chart(
        f"Engines: latency and {what}",
        [
            *tolerated,
            _dots("other engines", "rule-line", [p for p in placed if not p[1].best], search),
            _dots("Pareto-optimal", "first", [p for p in placed if p[1].best], search),
        ],
        x_label="ms for one example (p50)",
        x_range=x_range,
        y_label=f"{what}, {unit}" if unit else what,
        show=words.si if metric is None else None,
        y_most=100 if percent else math.inf,
        log="x",
    )


def _tolerated(reference: float, tolerance: float, metric: Metric, x_range: Point) -> Series:
    """The worst score that the gate accepts; it has no place in the plot where the tolerance isn't known."""
    worst, which = (reference - tolerance, "lowest") if metric.higher_is_better else (reference + tolerance, "highest")
    return Series(label=f"{which} tolerated", points=[(x, worst) for x in x_range], colour="rule-line")


def _dots(label: str, colour: str, placed: Sequence[Placed], search: SearchResult) -> Series:
    return Series(
        label=label,
        points=[point for *_, point in placed],
        colour=colour,
        line=False,
        radii=[6.0 if _same(one, search.chosen) else 4.0 for _, one, _ in placed],
        texts=[f"{number}: {one.name}, {x:.3g} ms, {y:.4g}" for number, one, (x, y) in placed],
        marks=[str(number) for number, *_ in placed],
    )
