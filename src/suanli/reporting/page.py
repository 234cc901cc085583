"""From the files of a run to one HTML page for people.

The page is a single file that opens offline, today and in ten years: it has no script, and no style, font or picture
from elsewhere; its own security policy forbids the browser to fetch any. Everything that comes from the data (names of
classes and files, texts, pictures) is escaped. An interrupted run has fewer files: the page shows what is there and
names what is missing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from suanli.reporting import (
    bars,
    charts,
    embedding_views,
    engine_views,
    findings,
    prose,
    scaling_views,
    speed_views,
    views,
    words,
)
from suanli.reporting.bench_views import bench_view
from suanli.reporting.charts import Chart
from suanli.reporting.files import RunFiles
from suanli.reporting.gallery import cards, target_cards
from suanli.reporting.records import Evaluation
from suanli.reporting.section_views import section_views


def render(run: RunFiles) -> str:
    return (
        templates()
        .get_template("report.html")
        .render(
            **_overview(run),
            **_data(run),
            **_scores(run),
            **_speed(run),
            **_score_formats(run),
            embeddings=embedding_views.embedding_view(run.embeddings) if run.embeddings else None,
            likes=embedding_views.likes(run.embeddings, _shown_evaluation(run)[1]),
            map_frame=embedding_views,
            frame=charts,
            bar_frame=bars,
            bar_length=words.bar_length,
            rows_shown=views.ROWS,
        )
    )


@cache
def templates() -> Environment:
    """Of all pages, with the filters that write values."""
    environment = Environment(
        loader=PackageLoader("suanli.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= words.FILTERS
    return environment


def _overview(run: RunFiles) -> dict[str, Any]:
    primary = views.primary_score(run)
    return {
        "run": run,
        "title": prose.title(run),
        "name": run.path.resolve().name,
        "primary": primary,
        "missing": prose.list_missing(run, primary),
        "abstract": prose.abstract(run, primary),
        "stages": views.stages(run),
        "stage_metric": views.stage_metric(run),
        "frozen": run.summary.frozen if run.summary else None,
        "curves": _curves(run, primary),
    }


def _curves(run: RunFiles, primary: views.PrimaryScore | None) -> list[Chart]:
    """None of a head alone, whose one point the table of stages has."""
    if run.summary and run.summary.frozen and not run.summary.steps:
        return []
    return views.curves(run.metrics, primary.name if primary else None, run.unit_of)


def _data(run: RunFiles) -> dict[str, Any]:
    return {
        "split_names": views.SPLIT_NAMES,
        "split_sizes": views.split_sizes(run.data),
        "class_counts": views.count_rows(run.data) if run.data else ([], []),
        "findings": findings.list_findings(run.check) if run.check else None,
        "has_classes": bool(run.data and run.data.classes),
        "listed": findings.LISTED,
        "data_samples": target_cards(run.samples),
        "data_section_groups": section_views(run.data_sections),
        "weights": run.weights,
        "weights_facts": prose.weights_facts(run.weights) if run.weights else [],
    }


def _shown_evaluation(run: RunFiles) -> tuple[str | None, Evaluation | None]:
    """The split of which figures and examples are shown, and its evaluation."""
    split = next((split for split in ("test", "val", "train") if split in run.evaluations), None)
    return split, run.evaluations[split] if split else None


def _scores(run: RunFiles) -> dict[str, Any]:
    split, evaluation = _shown_evaluation(run)
    names, columns = views.score_columns(run.evaluations)
    phases = views.phases(run.summary, evaluation) if run.summary else []
    return {
        "evaluation": evaluation,
        "evaluation_split": views.SPLIT_NAMES[split].lower() if split else None,
        "score_columns": columns,
        "score_names": names,
        "section_groups": section_views(run.sections.get(split or "", [])),
        "samples": cards(evaluation.samples) if evaluation else [],
        "mistakes": cards(evaluation.mistakes) if evaluation else [],
        "phases": phases,
        "total_seconds": sum(phase.seconds for phase in phases) if phases else None,
        "forecasts": views.forecasts(run.summary) if run.summary else [],
    }


def _score_formats(run: RunFiles) -> dict[str, Any]:
    """Of scores by name, without their units, which a heading has."""

    def unit(name: str) -> str:
        return words.FRACTION if run.unit_of(name) == words.FRACTION else ""

    return {
        "heading_unit": lambda name: run.unit_of(name).removeprefix(unit(name)),
        "score": lambda name, value: words.score(value, unit(name)),
        "interval": lambda name, bounds: words.interval(bounds, unit(name)),
    }


def _speed(run: RunFiles) -> dict[str, Any]:
    plan = (run.summary and run.summary.plan) or (run.ablation and run.ablation.plan) or None
    diagnosis = run.summary.diagnosis if run.summary else None
    ablation = run.ablation
    return {
        "bench": bench_view(ablation, replace(run.metric(ablation.metric), unit=ablation.unit)) if ablation else None,
        "scaling": scaling_views.tables(run.scaling) if run.scaling else None,
        "diagnosis": diagnosis,
        "shares": speed_views.shares(diagnosis) if diagnosis else ([], []),
        "plan": plan,
        "plan_rows": speed_views.plan_rows(plan) if plan else [],
        "untried": speed_views.list_untried(plan) if plan else {},
        "plan_sentence": speed_views.plan_sentence(plan) if plan else "",
        "roof": speed_views.roof(run.roofline) if run.roofline else None,
        "layer_rows": speed_views.LAYERS,
        "search": engine_views.search_view(run.engines, run.metric(run.engines.metric)) if run.engines else None,
    }
