"""From the files of a run to one HTML page for people.

The page is a single file that opens offline, today and in ten years: it has no script, and no style, font or picture
from elsewhere; its own security policy forbids the browser to fetch any. Everything that comes from the data (names of
classes and files, texts, pictures) is escaped. An interrupted run has fewer files: the page shows what is there and
names what is missing.
"""

from __future__ import annotations

import base64
import struct
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from suanli.reporting import bars, charts, engine_views, findings, prose, scaling_views, speed_views, views, words
from suanli.reporting.bench_views import bench_view
from suanli.reporting.files import RunFiles
from suanli.reporting.records import Preview

PICTURES = {"image/png", "image/jpeg", "image/webp", "image/gif"}  # what browsers show without running it
TINY = 64  # pixels along the longer side
TEXT_LENGTH = 600  # characters of a text that are shown


def render(run: RunFiles) -> str:
    return (
        _templates()
        .get_template("report.html")
        .render(
            **_overview(run),
            **_data(run),
            **_scores(run),
            **_speed(run),
            frame=charts,
            bar_frame=bars,
            score=words.score,
            interval=words.interval,
            unit=words.unit,
            picture=_picture,
            tiny=_is_tiny,
            text=_text,
        )
    )


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("suanli.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= words.FILTERS
    return templates


def _overview(run: RunFiles) -> dict[str, Any]:
    primary = views.primary_score(run.evaluations)
    return {
        "run": run,
        "title": prose.title(run),
        "name": run.path.resolve().name,
        "primary": primary,
        "missing": prose.list_missing(run, primary),
        "abstract": prose.abstract(run, primary),
        "curves": views.curves(run.metrics, primary.name if primary else None),
    }


def _data(run: RunFiles) -> dict[str, Any]:
    return {
        "split_names": views.SPLIT_NAMES,
        "split_sizes": views.split_sizes(run.data),
        "class_counts": views.count_rows(run.data) if run.data else ([], []),
        "findings": findings.list_findings(run.check) if run.check else None,
        "listed": findings.LISTED,
    }


def _scores(run: RunFiles) -> dict[str, Any]:
    split = next((split for split in ("test", "val", "train") if split in run.evaluations), None)
    evaluation = run.evaluations[split] if split else None
    columns, rows = views.score_rows(run.evaluations)
    phases = views.phases(run.summary, evaluation) if run.summary else []
    return {
        "evaluation": evaluation,
        "evaluation_split": views.SPLIT_NAMES[split].lower() if split else None,
        "score_columns": columns,
        "score_rows": rows,
        "class_scores": views.class_scores(evaluation) if evaluation else [],
        "class_rows": views.ROWS,
        "heat_map": views.heat_map(evaluation) if evaluation else None,
        "reliability": views.reliability(evaluation) if evaluation else None,
        "phases": phases,
        "total_seconds": sum(phase.seconds for phase in phases) if phases else None,
        "forecasts": views.forecasts(run.summary) if run.summary else [],
    }


def _speed(run: RunFiles) -> dict[str, Any]:
    plan = (run.summary and run.summary.plan) or (run.ablation and run.ablation.plan) or None
    diagnosis = run.summary.diagnosis if run.summary else None
    return {
        "bench": bench_view(run.ablation) if run.ablation else None,
        "scaling": scaling_views.tables(run.scaling) if run.scaling else None,
        "diagnosis": diagnosis,
        "shares": speed_views.shares(diagnosis) if diagnosis else ([], []),
        "plan": plan,
        "plan_rows": speed_views.plan_rows(plan) if plan else [],
        "untried": speed_views.list_untried(plan) if plan else {},
        "plan_sentence": speed_views.plan_sentence(plan) if plan else "",
        "roof": speed_views.roof(run.roofline) if run.roofline else None,
        "layer_rows": speed_views.LAYERS,
        "search": engine_views.search_view(run.engines) if run.engines else None,
    }


def _picture(preview: Preview | None) -> str | None:
    """The preview as an address that holds the whole picture; None: it is no picture."""
    if preview is None or preview.media_type not in PICTURES:
        return None
    return f"data:{preview.media_type};base64,{base64.b64encode(preview.content).decode()}"


def _is_tiny(preview: Preview) -> bool:
    """A picture of so few pixels that each should be visible as one, not blurred into the next."""
    size = preview.content[16:24]  # width and height in a PNG's first chunk
    return preview.media_type == "image/png" and len(size) == 8 and max(struct.unpack(">2I", size)) <= TINY


def _text(preview: Preview | None) -> str | None:
    """The preview as text; None: it is none."""
    if preview is None or preview.media_type.partition(";")[0] != "text/plain":
        return None
    text = preview.content.decode("utf-8", "replace")
    return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + "…"
