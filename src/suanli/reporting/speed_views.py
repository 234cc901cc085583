"""The report on speed: what limits the run, the plan and its trials, the roofline.

Like `views.py`: each function takes records and gives plain values, and works with any part absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from suanli.compute.roofline_records import Layer, Roofline
from suanli.core.types import Plan, Trial
from suanli.reporting import words
from suanli.reporting.charts import Chart, Point, Series, chart
from suanli.reporting.views import Phase
from suanli.training.diagnose import Diagnosis

# --- what limits ----------------------------------------------------------------------------

SHARES = {
    "input": "waiting for input",
    "copy": "copying to the device",
    "forward": "forward pass",
    "backward": "backward pass",
    "graph": "forward and backward pass, captured as one graph",
    "host": "host: Python and launches",
    "idle": "idle: nothing is computed",
}


def shares(diagnosis: Diagnosis) -> tuple[list[Phase], list[str]]:
    """Parts of a training step with their seconds (NaN: not known), and the parts that can't be distinguished."""
    known = {name: share for name, share in diagnosis.shares.items() if words.is_known(share) and share >= 0}
    parts = [
        Phase(name=SHARES.get(name, words.with_spaces(name)), seconds=share * diagnosis.step_s, share=share)
        for name, share in known.items()
    ]
    unknown = [SHARES.get(n, words.with_spaces(n)) for n in diagnosis.shares if n not in known]
    return parts, unknown


# --- the plan -------------------------------------------------------------------------------

ORIGINS = {
    "plain": "No speedups were asked for.",
    "named": "These were named by the user.",
    "measured": "Chosen by trials on this machine",
    "cached": "Chosen by trials on this machine, for an earlier run of the same kind",
    "sharded": "The network is sharded over the processes and can't be copied for trials: these usually help.",
    "raced": "The run was too short for trials in advance, so combinations of speedups raced in its first steps.",
    "short list": "The run is too short for trials, so these are the ones that usually help.",
}


# How a trial's reason begins: what the table has in columns of its own.
MEASURED = re.compile(r"^[\d.]+ times as fast( \(spread [^)]*\))?(, but )?")


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    change: str
    used: bool
    times: str  # as fast as the best plan before it
    rounds: int | None
    error: str
    reason: str  # beyond what the figures say


def plan_rows(plan: Plan) -> list[PlanRow]:
    """The trials in their order."""
    return [_trial(trial, plan) for trial in plan.trials]


def list_untried(plan: Plan) -> dict[str, str]:
    """Speedups that were dropped without a trial, most because they don't exist on this device, and why."""
    tried = {name for trial in plan.trials for name in map(_name, trial.change.split())}
    return {name: why for name, why in plan.dropped.items() if name not in tried}


def _trial(trial: Trial, plan: Plan) -> PlanRow:
    undone = [name for name in trial.change.split() if not _in_use(name, plan)]
    reason = MEASURED.sub("", trial.reason) if words.is_known(trial.ratio) else trial.reason
    if trial.kept and undone:  # later changes and failures in training have the last word
        dropped = next((plan.dropped[name] for name in map(_name, undone) if name in plan.dropped), "")
        reason = dropped or "kept then, and changed again later"
    elif not trial.kept and not reason and (trial.ratio or 0.0) > 1.0:
        reason = "not clearly faster"
    return PlanRow(
        change=" and ".join(map(_describe_change, trial.change.split())) or words.UNKNOWN,
        used=trial.kept and not undone,
        times=words.spread(trial.ratio, trial.spread, words.ratio),
        rounds=trial.rounds or None,
        error=f"{trial.error:.2g}" if words.is_known(trial.error) else words.UNKNOWN,
        reason=reason,
    )


def _in_use(change: str, plan: Plan) -> bool:
    """Whether the plan has this change now."""
    if change.startswith("-"):
        return change[1:] not in plan.speedups
    if match := re.fullmatch(r"\+?threads=(\d{1,8})", change):
        return plan.threads == int(match[1])
    return _name(change) in plan.speedups


def _describe_change(change: str) -> str:
    if match := re.fullmatch(r"\+?threads=(\d{1,8})", change):
        return words.count(int(match[1]), "thread")
    if change[:1] == "-":
        return f"without {change[1:]}"
    return change.removeprefix("+")


def _name(change: str) -> str:
    return change.removeprefix("+")


def plan_sentence(plan: Plan) -> str:
    used = [*plan.speedups]
    if plan.threads is not None:
        used.append(words.count(plan.threads, "CPU thread"))
    sentence = f"In use: {', '.join(used)}. " if used else "No speedup is in use. "
    origin = ORIGINS.get(plan.origin, "")
    if origin and not origin.endswith("."):
        planned = words.is_known(plan.seconds) and plan.origin == "measured"
        took = f", which took {words.seconds(plan.seconds)}" if planned else ""
        origin += f"{took}."
    return (sentence + origin).strip()


# --- the roofline ---------------------------------------------------------------------------

LAYERS = 10  # shown at once; the others fold away


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    number: int
    name: str
    kind: str
    seconds: float
    share: float  # of the forward pass
    flops_per_s: float | None  # None: it has no matrix products
    bytes_per_s: float | None
    of_roof: float | None  # the least time it could take here, as a share of what it takes
    bound: str  # what sets that least time


@dataclass(frozen=True, kw_only=True)
class Roof:
    chart: Chart | None
    rows: list[LayerRow]
    sentence: str
    measured: bool  # whether there are ceilings


def roof(roofline: Roofline) -> Roof | None:
    """None where no layer has a time."""
    timed = [one for one in roofline.layers if words.is_known(one.seconds) and one.seconds > 0]
    total = sum(one.seconds for one in timed)
    if not timed or not words.is_known(total):
        return None
    peaks = _peaks(roofline)
    bandwidth = None if roofline.ceilings is None else roofline.ceilings.memory_bytes_per_s
    best = peaks.get(roofline.dtype) or max(peaks.values(), default=None)
    rows = [_layer_row(number, one, total, best, bandwidth) for number, one in enumerate(timed, 1)]
    return Roof(
        chart=_roof_chart(rows, peaks, bandwidth),
        rows=rows,
        sentence=_roof_sentence(roofline, rows, total),
        measured=bool(peaks) and bandwidth is not None,
    )


def _peaks(roofline: Roofline) -> dict[str, float]:
    """FLOP/s that this device reaches in the precision of the run and in float32: the better of matrix
    product and convolution."""
    if roofline.ceilings is None:
        return {}
    rates = roofline.ceilings.matmul_flops, roofline.ceilings.conv_flops
    best = {dtype: max(rate.get(dtype, 0.0) for rate in rates) for dtype in (roofline.dtype, "float32")}
    return {dtype: rate for dtype, rate in best.items() if rate}


def _layer_row(number: int, one: Layer, total: float, peak: float | None, bandwidth: float | None) -> LayerRow:
    work, moved = one.flops or None, one.bytes or None
    computing = work / peak if work and peak else 0.0
    moving = moved / bandwidth if moved and bandwidth else 0.0
    complete = bandwidth is not None and moved is not None and (work is None or peak is not None)
    return LayerRow(
        number=number,
        name=one.name,
        kind=one.kind,
        seconds=one.seconds,
        share=one.seconds / total,
        flops_per_s=work / one.seconds if work else None,
        bytes_per_s=moved / one.seconds if moved else None,
        of_roof=max(computing, moving) / one.seconds if complete else None,
        bound=("computing" if computing > moving else "memory") if complete else words.UNKNOWN,
    )


def _roof_sentence(roofline: Roofline, rows: list[LayerRow], total: float) -> str:
    sentences = f"One forward pass of {words.count(roofline.batch, 'example')} takes {words.span(total)}"
    sentences += f", at {words.si(roofline.flops_per_example, 'FLOP')} an example."
    placed = [row for row in rows if row.of_roof is not None]
    if placed:
        took = sum(row.seconds for row in placed)
        least = sum(row.seconds * min(row.of_roof or 0.0, 1.0) for row in placed)
        sentences += f" With every layer at the roof it would take {words.percent(least / took, 0)} of that."
    flat = sum(row.share for row in rows if row.flops_per_s is None)
    if flat > 0.005:
        sentences += f" {words.percent(flat, 0)} of the time goes to what has no matrix products or convolutions"
        sentences += " (norms, activations, pooling): it has no place in the plot."
    return sentences


def _roof_chart(rows: list[LayerRow], peaks: dict[str, float], bandwidth: float | None) -> Chart | None:
    placed = [
        (row, (row.flops_per_s / row.bytes_per_s, row.flops_per_s))
        for row in rows
        if row.flops_per_s and row.bytes_per_s
    ]
    placed = [(row, place) for row, place in placed if all(1e-30 < v < 1e30 for v in place)]
    if not placed:
        return None
    ridges = [peak / bandwidth for peak in peaks.values()] if bandwidth else []
    x_low, x_high = _around([x for _, (x, _) in placed] + ridges, 2.0)
    y_low, y_high = _around([y for _, (_, y) in placed] + list(peaks.values()), 1.7)
    dots = Series(
        label="layers",
        points=[place for _, place in placed],
        colour="second",
        line=False,
        radii=[max(2.0, 13 * math.sqrt(row.share)) for row, _ in placed],
        texts=[_describe_layer(row, place[0]) for row, place in placed],
        marks=[str(row.number) if row.number <= LAYERS else "" for row, _ in placed],
    )
    return chart(
        "Roofline",
        [*_roof_lines(peaks, bandwidth, (x_low, x_high), y_low), dots],
        x_label="FLOP per byte",
        y_label="FLOP/s",
        x_range=(x_low, x_high),
        y_range=(y_low, y_high),
        show=lambda value: words.si(value),
        log="xy",
    )


def _roof_lines(peaks: dict[str, float], bandwidth: float | None, across: Point, y_low: float) -> Iterable[Series]:
    x_low, x_high = across
    for number, (dtype, peak) in enumerate(peaks.items()):
        points = [(x_low, peak), (x_high, peak)]
        if bandwidth is not None:
            start = max(x_low, y_low / bandwidth)
            points = [(start, start * bandwidth), (peak / bandwidth, peak), (x_high, peak)]
        label = f"{dtype}, at most {words.si(peak, 'FLOP/s')}"
        yield Series(label=label, points=points, colour="first" if number == 0 else "rule-line")


def _around(values: list[float], factor: float) -> Point:
    return min(values) / factor, max(values) * factor


def _describe_layer(row: LayerRow, intensity: float) -> str:
    text = f"{row.number}: {row.name} ({row.kind}), {words.percent(row.share)} of the forward pass, "
    text += f"{words.si(row.flops_per_s, 'FLOP/s')} at {intensity:.3g} FLOP per byte"
    return text + (f", {words.percent(row.of_roof, 0)} of the roof" if row.of_roof is not None else "")
