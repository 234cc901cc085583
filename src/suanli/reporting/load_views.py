"""What the page about a server under load says: sentences, two charts and a table, from the figures of each load.

Like `views.py`: each function takes records and gives plain values; `templates/load.html` decides how they look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from suanli.loads import HELD, Figures, held
from suanli.reporting import words
from suanli.reporting.charts import Chart, Point, Series, chart, decades
from suanli.reporting.engine_views import Cell
from suanli.types import Json

PERCENTILES: dict[str, tuple[str, Callable[[Figures], float | None]]] = {  # label: colour, and what is drawn
    "p50": ("first", lambda one: one.p50_ms),
    "p95": ("third", lambda one: one.p95_ms),
    "p99": ("second", lambda one: one.p99_ms),
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the template is given."""

    name: str
    held: str | None  # the load that it holds; None: not one of those that were offered
    sentences: list[str]
    facts: list[tuple[str, str, str]]  # what, how much, detail
    charts: list[Chart]
    columns: list[Cell]
    rows: list[list[Cell]]
    notes: list[str]
    warnings: list[str]


def page(about: Mapping[str, Json], capacity: Figures, loads: Sequence[Figures]) -> Page:
    """`about` is the record without figures, as `suanli bench --serve` keeps it; `loads` has at least one."""
    best = held(loads)
    return Page(
        name=str(about["model"]),
        held=_rate(best.offered_per_s) if best else None,
        sentences=sentences(capacity, loads),
        facts=_facts(about, capacity),
        charts=[one for one in (_latencies(capacity, loads), _answers(capacity, loads)) if one is not None],
        columns=list(_COLUMNS),
        rows=[[show(one, capacity) for show in _COLUMNS.values()] for one in loads],
        notes=_notes(about, loads),
        warnings=warnings([capacity, *loads]),
    )


# --- sentences ---


def sentences(capacity: Figures, loads: Sequence[Figures]) -> list[str]:
    """What it comes to."""
    said = [
        f"Clients that never pause get {_rate(capacity.answered_per_s)} answers per second: that is its capacity here."
    ]
    best, least, most = held(loads), loads[0], loads[-1]
    low = f"the least load, {_rate(least.offered_per_s)} per second"
    if best is None:
        said.append(f"Even at {low}, requests were refused or failed.")
    elif best is least:
        said.append(f"Only {low}, is held: 99 of 100 are answered within {_ms(least.p99_ms)}.")
    else:
        said.append(
            f"Up to {_rate(best.offered_per_s)} requests per second, 99 of 100 are answered within {_ms(best.p99_ms)}; "
            f"at {low}, within {_ms(least.p99_ms)}."
        )
    lost = most.refused_per_s / most.offered_per_s if most.offered_per_s else 0.0
    if most is not best and lost > 0:
        said.append(
            f"Offered {_rate(most.offered_per_s)} per second, it refuses {words.percent(lost)}, 99 of "
            f"100 of them within {_ms(most.refused_p99_ms)}, and answers the others within {_ms(most.p99_ms)}."
        )
    elif most is not best:
        said.append(
            f"Offered {_rate(most.offered_per_s)} per second, it refuses nothing, and 99 of 100 are "
            f"answered within {_ms(most.p99_ms)}."
        )
    return said


def warnings(all_figures: Sequence[Figures]) -> list[str]:
    """What the reader must know before believing a figure."""
    said = []
    if limited := [one for one in all_figures if one.limited]:
        lag = max(one.lag_ms_p99 for one in limited)
        said.append(
            f"The generator of load was a limit itself in {len(limited)} of {words.count(len(all_figures), 'load')}: "
            f"it was up to {_ms(lag)} late (p99). Latencies include that, so the server may be better than this."
        )
    errors: dict[str, int] = {}
    for one in all_figures:
        for why, count in one.errors.items():
            errors[why] = errors.get(why, 0) + count
    if errors:
        told = ", ".join(f"{words.number(count)} × {why}" for why, count in sorted(errors.items()))
        said.append(f"Some requests failed: {told}.")
    if missing := sum(one.without_retry_after for one in all_figures):
        said.append(f"{words.count(missing, 'refusal')} came without Retry-After.")
    return said


def _notes(about: Mapping[str, Json], loads: Sequence[Figures]) -> list[str]:
    arrivals = "at random moments (Poisson)" if about["arrivals"] == "poisson" else "evenly spaced"
    rounds = words.count(loads[0].rounds, "round")
    said = [
        f"Open loop: requests were due {arrivals} whatever the server did, over at most "
        f"{words.number(about['connections'])} connections, and each latency counts from the moment at which the "
        f"request was due. Loads took turns in {rounds}; ± is half the interquartile range of the rounds.",
        f"Held is the largest load up to which the 99th percentile stays within {HELD:g} times that of the least load "
        "and no more than 1 % of requests are refused or fail.",
    ]
    if about["local"]:
        said.append("The generator and the server shared this machine, so each took some of it from the other.")
    return said


def _facts(about: Mapping[str, Json], capacity: Figures) -> list[tuple[str, str, str]]:
    engine = " ".join(str(about[key]) for key in ("engine", "precision") if about.get(key))
    cores = words.count(about["cores"], "core")
    return [
        ("Capacity", f"{_rate(capacity.answered_per_s)} a second", f"{about['clients']} clients"),
        (
            "Engine",
            engine or str(about.get("platform") or "unknown"),
            f"version {about['version']}" if about["version"] else "",
        ),
        ("Request", str(about["request"]), words.memory(about["request_bytes"])),
        ("Machine", str(about["cpu"]), cores if about["local"] else f"{cores}; the server is elsewhere"),
    ]


# --- the table ---


def _rate(value: float) -> str:
    return words.number(_three(value))


def _half(value: float | None) -> str:
    """How far something varies, in two digits."""
    return f"± {words.number(float(f'{value:.2g}'))}" if words.known(value) else ""


def _three(value: float) -> float:
    """Three digits, below a thousand; all before the point above."""
    return float(f"{value:.3g}") if abs(value) < 1000 else round(value)


def _ms(value: float | None) -> str:
    return f"{words.number(_three(value))}{words.SPACE}ms" if words.known(value) else words.UNKNOWN


def _bare_ms(value: float | None) -> str:
    return words.number(_three(value)) if words.known(value) else words.UNKNOWN


_COLUMNS: dict[Cell, Callable[[Figures, Figures], Cell]] = {
    Cell(text="offered/s", detail="of capacity"): lambda one, capacity: Cell(
        text=_rate(one.offered_per_s),
        detail=words.percent(one.offered_per_s / capacity.answered_per_s if capacity.answered_per_s else None, 0),
    ),
    Cell(text="answered/s"): lambda one, _: Cell(
        text=_rate(one.answered_per_s), detail=_half(one.answered_half_iqr) if one.rounds > 1 else ""
    ),
    Cell(text="refused/s", detail="failed/s"): lambda one, _: Cell(
        text=_rate(one.refused_per_s), detail=_rate(one.errors_per_s) if one.errors_per_s else ""
    ),
    Cell(text="p50 ms"): lambda one, _: Cell(text=_bare_ms(one.p50_ms)),
    Cell(text="p95"): lambda one, _: Cell(text=_bare_ms(one.p95_ms)),
    Cell(text="p99"): lambda one, _: Cell(
        text=_bare_ms(one.p99_ms), detail=_half(one.p99_half_iqr_ms) if one.rounds > 1 else ""
    ),
    Cell(text="longest"): lambda one, _: Cell(text=_bare_ms(one.max_ms)),
    Cell(text="refusals", detail="p99 ms"): lambda one, _: Cell(text=_bare_ms(one.refused_p99_ms)),
    Cell(text="generator", detail="late, p99 ms"): lambda one, _: Cell(text=_bare_ms(one.lag_ms_p99)),
}


def plain_table(capacity: Figures, loads: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the same for a terminal, without columns in which nothing is told."""
    told = {title: [show(one, capacity) for one in loads] for title, show in _COLUMNS.items()}
    shown = {
        title: cells for title, cells in told.items() if any(cell.text not in ("0", words.UNKNOWN) for cell in cells)
    }
    columns = [f"{title.text}\n{title.detail}".rstrip() for title in shown]
    return columns, [[_told(cell) for cell in row] for row in zip(*shown.values(), strict=True)]


def _told(cell: Cell) -> str:
    return (
        f"{cell.text} {cell.detail}"
        if cell.detail.startswith("±")
        else cell.text + (cell.detail and f" ({cell.detail})")
    )


# --- the charts ---


def _latencies(capacity: Figures, loads: Sequence[Figures]) -> Chart | None:
    known = [ms for one in loads for _, show in PERCENTILES.values() if (ms := show(one)) is not None and ms > 0]
    if not known:
        return None
    y_range = _decade(min(known) / 1.05, max(known) * 1.05)
    drawn = [
        Series(
            label=label,
            colour=colour,
            dots=True,
            points=[(one.offered_per_s, _value(show(one))) for one in loads],
            texts=[f"{label} {_ms(show(one))} at {_rate(one.offered_per_s)} offered per second" for one in loads],
        )
        for label, (colour, show) in PERCENTILES.items()
    ]
    return chart(
        "Latency of answered requests",
        [_mark(capacity, y_range), *drawn],
        x_label="offered requests per second",
        x_range=_x_range(capacity, loads),
        y_range=y_range,
        y_label="ms",
        show=lambda value: words.number(_three(value)),
        log="y",
    )


def _answers(capacity: Figures, loads: Sequence[Figures]) -> Chart | None:
    def line(label: str, colour: str, show: Callable[[Figures], float]) -> Series:
        return Series(
            label=label,
            colour=colour,
            dots=True,
            points=[(one.offered_per_s, show(one)) for one in loads],
            texts=[f"{_rate(show(one))} {label} of {_rate(one.offered_per_s)} offered per second" for one in loads],
        )

    x_range = _x_range(capacity, loads)
    failed = [line("failed", "third", lambda one: one.errors_per_s)] if any(one.errors for one in loads) else []
    return chart(
        "Answered and refused",
        [
            Series(label="offered", colour="rule-line", points=[(0.0, 0.0), (x_range[1], x_range[1])]),
            line("answered", "first", lambda one: one.answered_per_s),
            line("refused", "second", lambda one: one.refused_per_s),
            *failed,
        ],
        x_label="offered requests per second",
        x_range=x_range,
        y_range=(0.0, None),
        y_label="requests per second",
        show=lambda value: words.number(_three(value)),
    )


def _mark(capacity: Figures, y_range: tuple[float, float]) -> Series:
    """A line upwards at the capacity."""
    points: list[Point] = [(capacity.answered_per_s, y) for y in y_range]
    return Series(label="capacity", colour="rule-line", points=points)


def _x_range(capacity: Figures, loads: Sequence[Figures]) -> tuple[float, float]:
    return 0.0, 1.02 * max(capacity.answered_per_s, *(one.offered_per_s for one in loads))


def _decade(low: float, high: float) -> tuple[float, float]:
    """Round values around, so that there are ticks."""
    return decades(low / 10, low)[-1], decades(high, 10 * high)[0]


def _value(value: float | None) -> float:
    return math.nan if value is None else value
