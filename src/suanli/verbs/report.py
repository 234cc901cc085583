"""From a run directory to one HTML page for people.

The page is a single file that opens offline, today and in ten years: no script, and no style, font or
picture from elsewhere; its own security policy forbids the browser to fetch any. Everything that comes
from the data (names of classes and files, texts, pictures) is escaped.

A run that was interrupted has fewer files; the page shows what is there and says what is missing. The
report measures nothing and needs neither the data nor torch.
"""

from __future__ import annotations

import base64
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.core.storage import atomic_file
from suanli.core.types import AnyPath

if TYPE_CHECKING:
    from jinja2 import Environment

    from suanli.reporting.files import RunFiles
    from suanli.reporting.records import Shown

FILE_NAME = "report.html"
PICTURES = {"image/png", "image/jpeg", "image/webp", "image/gif"}  # what browsers show without running it
TINY = 64  # pixels along the longer side
TEXT_LENGTH = 600  # characters of a text that are shown


def report(run: AnyPath, *, out: AnyPath | None = None) -> Path:
    """Write the report of the run directory `run` and return its path; beside it, in the run, the
    model card (README.md).

    `out` is the file to write, `<run>/report.html` if not given; into a folder, `report.html` is written.
    Raises DataError where no run is, DamagedFile for a file of the run that can't be used, StorageError
    where the report can't be written.
    """
    from suanli.reporting.card import card
    from suanli.reporting.files import read_run

    files = read_run(run)
    target = files.path if out is None else Path(out)
    if target.is_dir():
        target = target / FILE_NAME
    page = pages().get_template("report.html").render(_content(files))
    with atomic_file(target) as stream:
        stream.write(page.encode())
    if out is None:
        with atomic_file(files.path / "README.md") as stream:
            stream.write(card(files).encode(errors="backslashreplace"))
    return target


@cache
def pages() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from suanli.reporting import words

    pages = Environment(
        loader=PackageLoader("suanli.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= words.FILTERS
    return pages


def _content(run: RunFiles) -> dict[str, Any]:
    """What the template is given."""
    from suanli.reporting import (
        bars,
        bench_views,
        charts,
        engine_views,
        findings,
        prose,
        scaling_views,
        speed_views,
        views,
        words,
    )

    head = views.headline(run.evaluations)
    exam_split = next((split for split in ("test", "val", "train") if split in run.evaluations), None)
    exam = run.evaluations[exam_split] if exam_split else None
    columns, rows = views.score_rows(run.evaluations)
    phases = views.phases(run.summary, exam) if run.summary else []
    plan = (run.summary and run.summary.plan) or (run.bench and run.bench.plan) or None
    diagnosis = run.summary.diagnosis if run.summary else None
    return {
        "run": run,
        "title": prose.title(run),
        "name": run.path.resolve().name,
        "head": head,
        "exam": exam,
        "exam_split": views.SPLIT_NAMES[exam_split].lower() if exam_split else None,
        "missing": prose.missing(run, head),
        "abstract": prose.abstract(run, head),
        "split_names": views.SPLIT_NAMES,
        "split_sizes": views.split_sizes(run.data),
        "class_counts": views.count_rows(run.data) if run.data else ([], []),
        "findings": findings.findings(run.check) if run.check else None,
        "listed": findings.LISTED,
        "curves": views.curves(run.metrics, head.name if head else None),
        "score_columns": columns,
        "score_rows": rows,
        "class_scores": views.class_scores(exam) if exam else [],
        "class_rows": views.ROWS,
        "heat_map": views.heat_map(exam) if exam else None,
        "reliability": views.reliability(exam) if exam else None,
        "phases": phases,
        "total_seconds": sum(phase.seconds for phase in phases) if phases else None,
        "forecasts": views.forecasts(run.summary) if run.summary else [],
        "ladder": bench_views.ladder(run.bench) if run.bench else None,
        "scaling": scaling_views.tables(run.scaling) if run.scaling else None,
        "diagnosis": diagnosis,
        "shares": speed_views.shares(diagnosis) if diagnosis else ([], []),
        "plan": plan,
        "plan_rows": speed_views.plan_rows(plan) if plan else [],
        "untried": speed_views.untried(plan) if plan else {},
        "plan_sentence": speed_views.plan_sentence(plan) if plan else "",
        "roof": speed_views.roof(run.roofline) if run.roofline else None,
        "layer_rows": speed_views.LAYERS,
        "search": engine_views.search(run.engines) if run.engines else None,
        "frame": charts,
        "bar_frame": bars,
        "score": words.score,
        "unit": words.unit,
        "picture": _picture,
        "tiny": _tiny,
        "text": _text,
    }


def _picture(preview: Shown | None) -> str | None:
    """The preview as an address that holds the whole picture; None: it is no picture."""
    if preview is None or preview.media_type not in PICTURES:
        return None
    return f"data:{preview.media_type};base64,{base64.b64encode(preview.base64).decode()}"


def _tiny(preview: Shown) -> bool:
    """A picture of so few pixels that each should be seen as one, not blurred into the next."""
    size = preview.base64[16:24]  # width and height in a PNG's first chunk
    return preview.media_type == "image/png" and len(size) == 8 and max(struct.unpack(">2I", size)) <= TINY


def _text(preview: Shown | None) -> str | None:
    """The preview as text; None: it is none."""
    if preview is None or preview.media_type.partition(";")[0] != "text/plain":
        return None
    text = preview.base64.decode("utf-8", "replace")
    return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + "…"
