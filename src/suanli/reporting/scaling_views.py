"""What the report says about scaling: what was measured of a few processes, and what is expected of many.

Like `views.py`: functions take records and give plain values; `templates/scaling.html` decides how they look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from suanli.measure import STEADY
from suanli.reporting import words
from suanli.reporting.charts import Chart
from suanli.reporting.scaling_charts import drawn
from suanli.reporting.scaling_records import Checked, Expectations, Expected, Scaling, Size
from suanli.types import Json


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str
    sentences: list[str]
    charts: list[Chart]
    tables: list[Table]
    notes: list[str]


def read(value: Mapping[str, Json]) -> Scaling:
    """Raises pydantic's ValidationError for fields of a wrong type."""
    return Scaling.model_validate(value)


def section(scaling: Scaling) -> Section:
    expected = scaling.expected
    tables = [_measured(scaling), _steps(scaling.sizes)]
    if expected is not None:
        tables.append(_expected(expected))
    return Section(
        title=_title(scaling),
        sentences=sentences(scaling),
        charts=drawn(scaling),
        tables=[one for one in tables if one.rows],
        notes=_notes(scaling),
    )


def _title(scaling: Scaling) -> str:
    said = f"{scaling.model or 'A network'} on {scaling.data or 'unknown data'}, {scaling.device or 'unknown device'}"
    return said + (f", batches of {words.number(scaling.batch_size)}" if scaling.batch_size else "")


# --- sentences ---


def sentences(scaling: Scaling) -> list[str]:
    """What it comes to: measured first, then what is expected."""
    said = [scaling.verdict.said] if scaling.verdict.said else []
    said += _unsteady(scaling.sizes)
    if scaling.expected is None:
        return said
    strong, weak = _last(scaling.expected.strong), _last(scaling.expected.weak)
    if strong and words.known(strong.efficiency):
        told = f"Expected, not measured: {_many(strong.processes)} with a fixed batch of"
        told += f" {words.number(scaling.batch_size)} reach {_percent(strong.efficiency)} of what they could"
        said.append(f"{told} without loss.")
    if weak and words.known(weak.efficiency):
        told = f"{_many(weak.processes)} with {words.count(scaling.expected.share, 'example')} each"
        said.append(f"Expected, not measured: {told} reach {_percent(weak.efficiency)}.")
    return said


def abstract(scaling: Scaling) -> list[str]:
    """The bench in brief, for a directory that holds nothing else."""
    counts = [words.number(size.processes) for size in scaling.sizes]
    return [f"Processes that share each batch ({', '.join(counts) or 'none'}): {_title(scaling)}.", *sentences(scaling)]


def _unsteady(found: Sequence[Size]) -> list[str]:
    """What the reader must know before believing a figure."""
    wild = [
        f"{_many(one.processes)} by {words.percent(rate.half_iqr / rate.median, 0)}"
        for one in found
        if words.known((rate := one.images_per_s).median)
        and words.known(rate.half_iqr)
        and rate.half_iqr > STEADY * abs(rate.median)
        and rate.median
    ]
    if not wild:
        return []
    return [f"Something else used the machine: rates varied between rounds ({', '.join(wild)}). Measure again."]


def _percent(value: float | None) -> str:
    return words.percent(value, 0 if words.known(value) and value >= 0.1 else 1)


def _many(processes: int | None) -> str:
    return words.count(processes, "process", "processes")


def _last(curve: Sequence[Expected]) -> Expected | None:
    return curve[-1] if curve else None


STEP = (
    "Of a step, computing is the mean process without communication, waiting is for the slowest one, and exposed is "
    "the communication that the backward pass doesn't hide. Hidden is the time of the gradients' all-reduce by itself "
    "less what is exposed."
)
TRAINED = (
    "One process was measured before the training: the first, with the share of a batch and the threads that it has in "
    "the group, while the others did nothing. The row of all is the training itself, in the mean of its steps; its "
    "computing and waiting were measured with all at once, each by itself. Efficiency is the speed-up over the number "
    "of processes. suanli bench DATA --scaling measures by turns and with a spread, and says what more would reach."
)


def _notes(scaling: Scaling) -> list[str]:
    said = [_how(scaling), STEP]
    if scaling.shared:
        said.append(
            "All processes share the cores of one CPU, so an efficiency of 100 % is the rate of one process with all "
            "threads. More means that the threads of one process wait for each other, as they do on a busy machine."
        )
    if any(size.norms for size in scaling.sizes):
        norms = max(size.norms or 0 for size in scaling.sizes)
        said.append(
            f"{words.count(norms, 'batch norm')} take their statistics over the whole batch and ask the others in "
            "each step; that is part of what is exposed, and not of the gradients' all-reduce."
        )
    return said + (_assumed(scaling, scaling.expected) if scaling.expected else [])


def _how(scaling: Scaling) -> str:
    if scaling.as_trained:
        return TRAINED
    return (
        "Groups of processes took turns"
        + (f" in {words.count(scaling.rounds, 'round')}" if scaling.rounds else "")
        + ", and the baseline of each figure is one process with all threads in the same round; ± is half the "
        "interquartile range."
    )


def _assumed(scaling: Scaling, expected: Expectations) -> list[str]:
    own = "a device of its own, like those here"
    if scaling.shared:
        own = f"{words.count(expected.threads, 'core')} of its own, as in the largest group here"
    said = [
        f"Expected figures are worked out, not measured: each process has {own}; gradients are summed in a ring, "
        "2 (n − 1) messages one after the other, bucket by bucket while the backward pass goes on; steps vary as they "
        "did here, and all wait for the slowest of n (normal distribution). Formulas and sources: docs/scaling.md."
    ]
    if expected.within:
        said.append(f"The link between processes was measured: {_link(expected.within.latency_s, expected.within)}.")
    if expected.between:
        said.append(
            f"Between hosts of {_many(expected.per_host)} it was given: "
            f"{_link(expected.between.latency_s, expected.between)}."
        )
    else:
        said.append("No other link was given, so all processes are taken to be linked like that.")
    most = scaling.batch_size
    last = _last(expected.strong)
    if most and last and last.processes and most < 2 * last.processes and most < 1024:
        said.append(f"A batch of {words.number(most)} has no example for more processes: the curve ends there.")
    return said


def _link(latency_s: float | None, link: object) -> str:
    rate = getattr(link, "bytes_per_s", None)
    return f"latency {words.span(latency_s)}, {words.si(rate, 'B/s')}"


# --- tables ---


def _measured(scaling: Scaling) -> Table:
    columns: dict[str, Callable[[Size], str]] = {
        "processes": lambda one: words.number(one.processes),
        "threads": lambda one: words.number(one.threads),
        "images/s": lambda one: words.spread(
            # A training has one value, and a single value no spread.
            _three(one.images_per_s.median),
            None if scaling.as_trained else _two(one.images_per_s.half_iqr),
        ),
        "speed-up": lambda one: words.ratio(one.speedup.median),
        "efficiency": lambda one: words.percent(one.efficiency),
    }
    title = "Measured: one process alone, and this training" if scaling.as_trained else "Measured"
    if scaling.expected is not None:
        title += ", and what the model expects there"
        checked = {one.processes: one for one in scaling.expected.checked}
        columns |= {
            "expected": lambda one: words.number(_three(checked.get(one.processes, Checked()).images_per_s)),
            "difference": lambda one: _signed(checked.get(one.processes, Checked()).difference),
        }
    return _table(title, columns, scaling.sizes)


def _table(title: str, columns: Mapping[str, Callable[[Size], str]], found: Sequence[Size]) -> Table:
    return Table(title=title, columns=list(columns), rows=[[show(one) for show in columns.values()] for one in found])


def _steps(found: Sequence[Size]) -> Table:
    columns: dict[str, Callable[[Size], str]] = {
        "processes": lambda one: words.number(one.processes),
        "step": lambda one: _ms(one.step_s),
        "computing": lambda one: _ms(one.compute_s),
        "waiting": lambda one: _ms(one.wait_s),
        "exposed": lambda one: _ms(one.exposed_s),
        "hidden": lambda one: _ms(one.hidden_s),
        "all-reduce": lambda one: _ms(one.communication_s),
    }
    return _table("Measured: a step in ms, and how much of its communication is exposed and hidden", columns, found)


def _expected(expected: Expectations) -> Table:
    weak = {one.processes: one for one in expected.weak}
    strong = {one.processes: one for one in expected.strong}
    rows = []
    for count in sorted(n for n in {*weak, *strong} if n is not None):
        one, other = strong.get(count), weak.get(count)
        rows.append([words.number(count), *_curve(one, each=True), *_curve(other, each=False)])
    columns = [
        "processes",
        "examples each",
        *(f"{kind}: {what}" for kind in ("batch", "share") for what in ("images/s", "efficiency")),
    ]
    share = f" of {words.count(expected.share, 'example')}" if expected.share else ""
    title = f"Expected, not measured: for a fixed batch and the examples of each process, and for a fixed share{share}"
    return Table(title=title, columns=columns, rows=rows)


def _curve(one: Expected | None, *, each: bool) -> list[str]:
    if one is None:
        return [words.UNKNOWN] * (3 if each else 2)
    told = [words.number(_three(one.images_per_s)), words.percent(one.efficiency)]
    return [words.number(one.local_batch), *told] if each else told


def _three(value: float | None) -> float | None:
    """Three digits, below a thousand; all before the point above."""
    if not words.known(value):
        return value
    return float(f"{value:.3g}") if abs(value) < 1000 else float(round(value))


def _two(value: float | None) -> float | None:
    return float(f"{value:.2g}") if words.known(value) else value


def _ms(value: float | None) -> str:
    return words.number(_three(1e3 * value)) if words.known(value) else words.UNKNOWN


def _signed(value: float | None) -> str:
    if not words.known(value):
        return words.UNKNOWN
    return f"{round(100 * value, 1) + 0.0:+.1f}{words.SPACE}%".replace("-", "−")
