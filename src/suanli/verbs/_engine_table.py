"""What `optimize` tells people: a table of all engines that were tried, and which was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.console import duration
from suanli.core.task import Metric
from suanli.engines.acceptance import describe_agreement
from suanli.engines.candidates import Candidate, SearchResult
from suanli.reporting.engine_views import STATES

if TYPE_CHECKING:
    from rich.console import Group


GAINS = {  # in the terms of each goal
    "latency": "{times:.2f}× faster than",
    "throughput": "{times:.2f}× the throughput of",
    "size": "{times:.2f}× smaller than",
    "energy": "{times:.2f}× more examples per joule than",
}


def engine_table(search: SearchResult, metric: Metric, path: Path) -> Group:
    """What was tried, the fastest first, and what was chosen; `path` is where the engines are."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    reference = search.candidates[0]
    rows = Table(box=None, pad_edge=False, padding=(0, 1))
    rows.add_column("engine", no_wrap=True)
    compared = {"labelled": metric.name, "unlabelled": "differs by"}.get(search.origin or "", "")
    for title in ("p50 ms", "p95", "p99", "examples/s", "×", "MB", compared):
        rows.add_column(title, justify="right", no_wrap=True)
    for c in sorted((c for c in search.candidates if c.speeds), key=lambda c: c.cost(search.goal)):
        speed, most = c.latency(), c.throughput()
        assert speed is not None
        assert most is not None
        rows.add_row(
            Text(f"{'>' if c == search.chosen else '*' if c.best else ' '} {c.name}"),
            *(f"{value * 1000:.3g}" for value in (speed.p50_s, speed.p95_s, speed.p99_s)),
            f"{most.per_s:,.0f}",
            f"{reference.cost(search.goal) / c.cost(search.goal):.2f}",
            "" if c.size_bytes is None else f"{c.size_bytes / 1e6:.1f}",
            _describe_answers(c, metric),
        )
    others: dict[tuple[str, str], list[str]] = {}
    for c in search.candidates:
        if not c.speeds:
            others.setdefault((STATES.get(c.state, c.state), c.reason), []).append(c.name)
    lines = [Text(f"  {state}: {', '.join(names)}: {reason}", style="dim") for (state, reason), names in others.items()]
    return Group(rows, *lines, Text(_summarize(search, metric, path)))


def _describe_answers(candidate: Candidate, metric: Metric) -> str:
    if candidate.score is not None:
        return metric.format(candidate.score)
    return f"{candidate.drift:.2g}" if candidate.drifts else ""


def _summarize(search: SearchResult, metric: Metric, path: Path) -> str:
    chosen, reference = search.chosen, search.candidates[0]
    times = reference.cost(search.goal) / chosen.cost(search.goal)
    gain = GAINS[search.goal].format(times=times)
    lines = [f"> chosen for {search.goal}: {chosen.name}, {gain} the baseline ({reference.name}); * Pareto-optimal"]
    part = (
        f"{search.examples:,}"
        if search.examples == search.of_examples
        else f"{search.examples:,} of {search.of_examples:,}"
    )
    if chosen.difference is not None:
        lines.append(f"{metric.describe(chosen.difference)} on {part} validation examples, with the 95 % interval.")
        if not chosen.difference.resolves(search.tolerance):
            lines.append(
                f"So few can't show a loss of {_describe_loss(metric, search.tolerance)}; "
                f"its answers differ by {chosen.drift:.2g} on average."
            )
    elif search.origin == "unlabelled":
        lines += [f"Compared with the reference on {part} examples without labels (95 % intervals):"]
        lines += [f"  {line}." for line in _describe_distance(chosen)]
    else:
        lines.append("Without data only float32 was tried, and answers were compared on random inputs.")
    lines.append(f"Took {duration(search.seconds)} of {duration(search.budget_s)}.")
    return "\n".join([*lines, f"Engines: {path}"])


def _describe_loss(metric: Metric, loss: float) -> str:
    return f"{100 * loss:.2g} points" if metric.unit == "fraction" else f"{loss:.2g} {metric.unit}".rstrip()


def _describe_distance(candidate: Candidate) -> list[str]:
    lines = [] if candidate.agreement is None else [describe_agreement(candidate.agreement)]
    return lines + [
        f"{one.name}: differs by {one.value:.2g} on average ({one.low:.2g} to {one.high:.2g})"
        for one in candidate.drifts
    ]
