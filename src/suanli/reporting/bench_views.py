"""The report on a bench: the variants from plain PyTorch to all speedups, with their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from suanli.core.task import Metric
from suanli.reporting import words
from suanli.reporting.bars import Step, Waterfall, waterfall
from suanli.training.ablation_records import Ablation, Estimate, EvaluationFigures, TrainingFigures, Variant

PARTS = {"train": "Training", "evaluate": "Evaluation"}
Figures = TrainingFigures | EvaluationFigures


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    verdict: str  # "refused", "failed", or nothing
    reason: str
    cells: list[str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The variants in training or in evaluation."""

    title: str
    columns: list[str]
    rows: list[Row]
    chart: Waterfall | None


@dataclass(frozen=True, kw_only=True)
class BenchView:
    """`best` is how many times as fast as plain PyTorch training is with all that was accepted.

    `loses` and `refuses`: whether there is a bar of a variant that is slower than the one before, or refused.
    """

    best: Estimate | None
    loses: bool
    refuses: bool
    parts: list[Part]
    notes: list[str]


def bench_view(ablation: Ablation, metric: Metric) -> BenchView:
    parts = [
        _part(ablation, metric, key) for key in PARTS if any(getattr(variant, key) for variant in ablation.variants)
    ]
    kinds = {bar.kind for part in parts if part.chart for bar in part.chart.bars if bar.strong}
    best = _last_accepted(ablation, "train")
    return BenchView(
        best=best.ratio if best else None,
        loses="second" in kinds,
        refuses="refused" in kinds,
        parts=parts,
        notes=_notes(ablation, metric),
    )


def _part(ablation: Ablation, metric: Metric, key: str) -> Part:
    variants, columns = ablation.variants, _columns(key)
    figures: list[Figures | None] = [getattr(variant, key) for variant in variants]
    rows = [[words.UNKNOWN if one is None else show(one) for show in columns.values()] for one in figures]
    names = list(columns)
    if key == "train":
        unit = words.unit_of_change(metric.unit)
        names += [words.with_spaces(metric.name), "difference to plain" + (f", {unit}" if unit else "")]
        rows = [[*cells, *_scores(metric, variant)] for cells, variant in zip(rows, variants, strict=True)]
    known = [i for i in range(len(names)) if any(cells[i] != words.UNKNOWN for cells in rows)]
    return Part(
        title=PARTS[key],
        columns=[names[i] for i in known],
        rows=[
            Row(
                name=variant.name,
                verdict=variant.verdict,
                reason=variant.refused or "",
                cells=[cells[i] for i in known],
            )
            for variant, cells in zip(variants, rows, strict=True)
        ],
        chart=waterfall(
            f"{PARTS[key]}, examples per second",
            [_step(variant, one) for variant, one in zip(variants, figures, strict=True)],
            x_label="examples per second",
        ),
    )


def _columns(key: str) -> dict[str, Callable[[Figures], str]]:
    return {
        "examples per second": lambda f: _rate(f.examples_per_s),
        "times plain": lambda f: words.spread(f.ratio.median, f.ratio.half_iqr or None, words.ratio),
        f"{'step' if key == 'train' else 'batch'} in ms, p50{words.SPACE}/{words.SPACE}p95": lambda f: " / ".join(
            map(_ms, f.percentiles_ms)
        ),
        "memory": lambda f: words.memory(f.peak_memory_bytes),
        "of ceiling": lambda f: words.percent(f.share_of_ceiling, 0),
        "energy an example": lambda f: words.si(f.joules_per_example, "J"),
        "examples per price unit": lambda f: words.si(f.examples_per_price),
    }


def _scores(metric: Metric, variant: Variant) -> list[str]:
    return [words.score(variant.scores.get(metric.name), metric.unit), words.difference(variant.difference, metric)]


def _step(variant: Variant, figures: Figures | None) -> Step:
    if figures is None:
        return Step(
            name=variant.name, value=None, label=variant.verdict or "not measured", refused=bool(variant.verdict)
        )
    speed = figures.examples_per_s
    label = f"{words.number(speed.median)}  {words.ratio(figures.ratio.median)} ×"
    if variant.verdict:
        label = f"{variant.verdict}, {label}"
    return Step(
        name=variant.name, value=speed.median, half_iqr=speed.half_iqr, label=label, refused=bool(variant.verdict)
    )


def _rate(speed: Estimate) -> str:
    large = words.is_known(speed.median) and abs(speed.median) >= 100
    return words.spread(speed.median, speed.half_iqr, _format_rounded if large else words.number)


def _format_rounded(value: float | None) -> str:
    return words.number(float(round(value))) if words.is_known(value) else words.UNKNOWN


def _whole(value: float | None) -> str:
    """Rates over 100 have no need of decimals."""
    return _format_rounded(value) if words.is_known(value) and abs(value) >= 100 else words.number(value)


def _ms(value: float) -> str:
    return f"{value:.3g}" if words.is_known(value) and abs(value) < 100 else _whole(value)


def _last_accepted(ablation: Ablation, key: str) -> Figures | None:
    """Of the last variant that was accepted and measured."""
    figures: list[Figures | None] = [getattr(variant, key) for variant in ablation.variants if not variant.verdict]
    return next((one for one in reversed(figures) if one is not None), None)


def _notes(ablation: Ablation, metric: Metric) -> list[str]:
    notes = []
    if ablation.rounds > 1:
        notes.append(
            f"The variants took turns in {words.count(ablation.rounds, 'round')}; ± is half the interquartile range, "
            "and ratios are of figures of the same round."
        )
    figures = [one for variant in ablation.variants for one in (variant.train, variant.evaluate) if one is not None]
    if any(words.is_known(one.share_of_ceiling) for one in figures):
        notes.append(
            "Of ceiling: the share of the FLOP/s that this device was measured to reach in the variant's precision."
        )
    note = f"Scores are on validation after {words.count(ablation.steps, 'step')} from the same start"
    if words.is_known(ablation.tolerance):
        note += f"; the task tolerates a loss of {words.amount(ablation.tolerance, metric.unit)}"
    return [*notes, f"{note}.", *_caveats(ablation, metric)]


def _caveats(ablation: Ablation, metric: Metric) -> list[str]:
    """What makes the scores less sure."""
    caveats = [
        f"{variant.name} lost some of its score with this seed but not with another one: chance, so it isn't rejected."
        for variant in ablation.variants
        if variant.again is not None and variant.refused is None
    ]
    if ablation.widest_interval > ablation.tolerance:
        caveats.append(
            f"{words.count(ablation.validation_examples, 'validation example')} can't show a loss as small as that: "
            f"intervals are up to ±{words.amount(ablation.widest_interval, metric.unit)} wide."
        )
    if ablation.steps < ablation.planned_steps:
        caveats.append(
            f"Time allowed {words.number(ablation.steps)} of {words.number(ablation.planned_steps)} steps: the "
            "learning rate had not come down, so scores vary more."
        )
    return caveats


def sentences(ablation: Ablation, model: str, data: str) -> list[str]:
    """The bench in brief, for a directory that holds nothing else."""
    added = max(0, len(ablation.variants) - 1)
    subject = "Plain PyTorch"
    if added:
        subject += f" and {words.count(added, 'change')}, added one after the other"
    subject += (
        f": {model} on {data}, measured on {ablation.device} with batches of {words.number(ablation.batch_size)}."
    )
    brief = [subject]
    for key, title in PARTS.items():
        figures = _last_accepted(ablation, key)
        if figures is not None and words.is_known(figures.examples_per_s.median):
            speed = f"{title} reaches {_whole(figures.examples_per_s.median)} examples per second"
            times = figures.ratio.median
            brief.append(speed + (f", {words.ratio(times)} times plain PyTorch." if words.is_known(times) else "."))
    for verdict, title in (("refused", "Rejected for its score"), ("failed", "Doesn't run here")):
        names = [variant.name.removeprefix("+ ") for variant in ablation.variants if variant.verdict == verdict]
        if names:
            brief.append(f"{title}: {', '.join(names)}.")
    return brief
