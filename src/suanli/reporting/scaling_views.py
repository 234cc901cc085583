"""What the report and the terminal show of processes that share each batch: two tables and the verdict."""

from __future__ import annotations

from collections.abc import Callable

from suanli.reporting import words
from suanli.training.scaling_records import Scaling, ScalingSize

Columns = dict[str, Callable[[ScalingSize], str]]
SPEEDS: Columns = {
    "processes": lambda one: words.number(one.processes),
    "threads of each": lambda one: words.number(one.threads),
    "images/s": lambda one: words.spread(one.images_per_s.median, one.images_per_s.half_iqr, words.ratio),
    "speed-up": lambda one: words.spread(one.speedup.median, one.speedup.half_iqr, words.ratio),
    "efficiency": lambda one: words.percent(one.efficiency, 0),
}
PARTS: Columns = {
    "processes": lambda one: words.number(one.processes),
    "step": lambda one: words.span(one.step_s),
    "computing": lambda one: words.span(one.compute_s),
    "waiting": lambda one: words.span(one.wait_s),
    "exposed": lambda one: words.span(one.exposed_s),
    "all-reduce": lambda one: words.span(one.all_reduce_s),
}


def tables(scaling: Scaling) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Columns and rows, by title."""
    titles = {"Processes that share each batch": SPEEDS, "Where the time of a step goes": PARTS}
    return {
        title: (list(columns), [[show(one) for show in columns.values()] for one in scaling.sizes])
        for title, columns in titles.items()
    }


def abstract(scaling: Scaling) -> list[str]:
    """For a directory that holds nothing else."""
    summary = f"Processes that share each batch: {scaling.model} on {scaling.data}, {scaling.device}, "
    summary += f"batches of {words.number(scaling.batch_size)}."
    return [summary, scaling.verdict.sentences]
