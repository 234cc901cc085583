"""The sentences of the report: the run in brief, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass

from suanli.reporting import bench_views, scaling_views, views, words
from suanli.reporting.files import RunFiles


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why a part of the report isn't there, and the command that brings it."""

    said: str
    command: tuple[str, ...] = ()


def title(run: RunFiles) -> tuple[str, str, str]:
    """Model, what was done, data: 'speednet', 'on', 'cifar10'."""
    model = run.recipe.get("model") or "A run"
    data = (run.data and run.data.name) or "unknown data"
    return words.plain(model), "bench on" if run.only_bench else "on", data


def missing(run: RunFiles, head: views.Headline | None) -> list[Missing]:
    if run.only_bench:
        found = (run.bench and run.bench.rungs) or (run.scaling and run.scaling.sizes)
        return [] if found else [Missing(said="This bench has not finished.")]
    status = run.summary.status if run.summary else None
    reached = f" after step {words.number(run.metrics[-1].step)}" if run.metrics else ""
    said = []
    if status == "stopped early":
        said.append(Missing(said="Training stopped early: the validation score no longer improved."))
    elif status == "diverged":
        said.append(Missing(said=f"This run diverged{reached}: its numbers became NaN or infinite, so it stopped."))
    elif status != "finished":
        how = "was interrupted" if status == "interrupted" else "has not finished"
        said.append(Missing(said=f"This run {how}{reached}. To go on:", command=("suanli", "train", str(run.path))))
    if head is None or head.split != "test":
        what = "There is no evaluation of this run yet."
        if head is not None:
            what = "These scores are of validation, which took part in choices; test is not examined yet."
        if run.trained:
            said.append(Missing(said=f"{what} To examine it:", command=("suanli", "evaluate", str(run.path))))
        else:
            said.append(Missing(said=f"{what} It needs a trained model first."))
    return said


def abstract(run: RunFiles, head: views.Headline | None) -> list[str]:
    """The run in a few sentences."""
    if run.only_bench and run.bench:
        model, _, data = title(run)
        return bench_views.sentences(run.bench, model, data)
    if run.only_bench and run.scaling:
        return scaling_views.abstract(run.scaling)
    sentences = [_what_was_trained(run)]
    if head is not None:
        inputs = words.count(head.count, "input") if head.count is not None else "inputs"
        taken_for = "which took no part in training or in any choice" if head.split == "test" else ""
        sentence = f"On the {inputs} of the {views.SPLIT_NAMES[head.split].lower()} split"
        sentence += f", {taken_for}," if taken_for else ","
        sentence += f" {words.spaced(head.name)} is {words.score(head.name, head.value)}"
        if head.interval:
            low, high = (words.score(head.name, value) for value in head.interval)
            sentence += f" (95 % interval {low} to {high})"
        sentences.append(sentence + ".")
    return sentences


def _what_was_trained(run: RunFiles) -> str:
    recipe, sizes, summary = run.recipe, views.split_sizes(run.data), run.summary
    model = str(recipe.get("model") or "A model")
    name = (run.data and run.data.name) or "the data"
    sentence = f"{model} was trained on {name}"
    if sizes.get("train") and run.data:
        classes = words.count(len(views.class_names(run.data)), "class", "classes")
        sentence += f" ({words.count(sizes['train'], 'training input')} in {classes})"
    if summary and words.known(summary.epochs):
        sentence += f" for {words.number(summary.epochs)} epochs"
    if summary and words.known(summary.seconds.get("train")):
        sentence += f" in {words.seconds(summary.seconds['train'])}"
    return sentence + "."
