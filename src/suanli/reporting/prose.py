"""The sentences of the report: the run in brief, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass

from suanli.reporting import bench_views, scaling_views, views, words
from suanli.reporting.files import RunFiles


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why a part of the report isn't there, and the command that adds it."""

    message: str
    command: tuple[str, ...] = ()


def title(run: RunFiles) -> tuple[str, str, str]:
    """Model, what was done, data: 'speednet', 'on', 'cifar10'."""
    model = run.recipe.get("model") or "A run"
    data = (run.data and run.data.name) or "unknown data"
    return words.plain(model), "bench on" if run.only_bench else "on", data


def list_missing(run: RunFiles, score: views.PrimaryScore | None) -> list[Missing]:
    if run.only_bench:
        figures = (run.ablation and run.ablation.variants) or (run.scaling and run.scaling.sizes)
        unreadable = "There are no figures here that this version of suanli can show. Run `suanli bench` again."
        return [] if figures else [Missing(message=unreadable)]
    return [*_missing_training(run), *_missing_evaluation(run, score)]


def _missing_training(run: RunFiles) -> list[Missing]:
    status = run.summary.status if run.summary else None
    reached = f" after step {words.number(run.metrics[-1].step)}" if run.metrics else ""
    if status == "finished":
        return []
    if status == "stopped early":
        return [Missing(message="Training stopped early: the validation score no longer improved.")]
    if status == "diverged":
        return [Missing(message=f"This run diverged{reached}: its numbers became NaN or infinite, so it stopped.")]
    how = "was interrupted" if status == "interrupted" else "has not finished"
    return [Missing(message=f"This run {how}{reached}. To resume it:", command=("suanli", "train", str(run.path)))]


def _missing_evaluation(run: RunFiles, score: views.PrimaryScore | None) -> list[Missing]:
    if score is not None and score.split == "test":
        return []
    what = "There is no evaluation of this run yet."
    if score is not None:
        what = "These scores are of validation, which took part in choices; test is not evaluated yet."
    if run.trained:
        return [Missing(message=f"{what} To evaluate it:", command=("suanli", "evaluate", str(run.path)))]
    return [Missing(message=f"{what} It needs a trained model first.")]


def abstract(run: RunFiles, score: views.PrimaryScore | None) -> list[str]:
    """The run in a few sentences."""
    if run.only_bench and run.ablation:
        model, _, data = title(run)
        return bench_views.sentences(run.ablation, model, data)
    if run.only_bench and run.scaling:
        return scaling_views.abstract(run.scaling)
    sentences = [_training(run)]
    if score is not None:
        inputs = words.count(score.count, "input") if score.count is not None else "inputs"
        caveat = "which took no part in training or in any choice" if score.split == "test" else ""
        sentence = f"On the {inputs} of the {views.SPLIT_NAMES[score.split].lower()} split"
        sentence += f", {caveat}," if caveat else ","
        sentence += f" {words.with_spaces(score.name)} is {score.text}"
        if score.interval:
            sentence += f" (95 % interval {score.interval})"
        sentences.append(sentence + ".")
    return sentences


def _training(run: RunFiles) -> str:
    recipe, sizes, summary = run.recipe, views.split_sizes(run.data), run.summary
    model = str(recipe.get("model") or "A model")
    name = (run.data and run.data.name) or "the data"
    sentence = f"{model} was trained on {name}"
    if sizes.get("train") and run.data:
        names = views.count_names(run.data) if run.data.classes else []
        classes = f" in {words.count(len(names), 'class', 'classes')}" if names else ""
        sentence += f" ({words.count(sizes['train'], 'training input')}{classes})"
    if summary and words.is_known(summary.epochs):
        sentence += f" for {words.number(summary.epochs)} epochs"
    if summary and words.is_known(summary.seconds.get("train")):
        sentence += f" in {words.seconds(summary.seconds['train'])}"
    return sentence + "."
