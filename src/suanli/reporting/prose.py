"""The sentences of the report: the run in brief, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass

from suanli.core.run import CROSS_VALIDATION
from suanli.reporting import bench_views, scaling_views, views, words
from suanli.reporting.files import RunFiles
from suanli.reporting.records import StartingWeights


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


def weights_facts(weights: StartingWeights) -> list[tuple[str, str]]:
    """What is known of the weights that a training started from: name and value, for people."""
    facts = {
        "name": weights.name if weights.title in (None, weights.name) else f"{weights.title} ({weights.name})",
        "network": weights.model,
        "licence": weights.licence or "not stated",
        "learned from": ", ".join(weights.learned_from),
        "top-1 on ImageNet-1k": "" if weights.accuracy is None else f"{weights.accuracy:.1%}, says the publisher",
        "publisher": weights.homepage,
        "revision": weights.revision,
        "checksum": weights.checksum,
    }
    return [(name, value) for name, value in facts.items() if value]


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
        what = (
            "These are validation scores, and training uses that split to choose; the test split is not evaluated yet."
        )
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
        sentence = f"On {describe_examples(run, score.split)},"
        sentence += f" {words.with_spaces(score.name)} is {score.text}"
        if score.interval:
            sentence += f" (95 % interval {score.interval})"
        sentences.append(sentence + ".")
        evaluation = run.evaluations[score.split]
        sentences += [one.describe(run.metric(score.name)) for one in evaluation.baselines]
        sentences += [*evaluation.remarks, *describe_leakage(run, score.split), *describe_overlap(run, score.split)]
    return sentences + describe_cross_validation(run)


def describe_cross_validation(run: RunFiles) -> list[str]:
    """A sentence, where there was one."""
    evaluation = run.evaluations.get(CROSS_VALIDATION)
    if evaluation is None or (primary := evaluation.primary) is None or evaluation.folds is None:
        return []
    unit = run.unit_of(primary)
    bounds = words.interval(evaluation.all_intervals.get(primary), unit)
    sentence = (
        f"In cross-validation with {words.number(evaluation.folds.count)} folds, each of the"
        f" {words.count(evaluation.count, 'example')} was predicted by a model that hadn't seen it:"
        f" {words.with_spaces(primary)} is {words.score(evaluation.scores[primary], unit)}"
    )
    remarks = [*describe_leakage(run, CROSS_VALIDATION), *describe_overlap(run, CROSS_VALIDATION)]
    return [sentence + (f" (95 % interval {bounds})." if bounds else "."), *remarks]


def describe_examples(run: RunFiles, split: str) -> str:
    """The examples whose scores are shown, and whether the model has seen them: "the 143 test examples that …"."""
    evaluation = run.evaluations[split]
    name = views.SPLIT_NAMES[split].lower()
    count = words.count(evaluation.count, f"{name} example") if evaluation.count is not None else f"{name} examples"
    leakage = evaluation.leakage
    unseen = leakage is None and not _has_duplicates(run, split)
    if split == "test" and (unseen or (leakage is not None and leakage.excluded)):
        return f"the {count} that took no part in training or in any choice"
    return f"the {count}"


def describe_leakage(run: RunFiles, split: str) -> list[str]:
    """What the scores of a split would be with the examples that the model has seen, or without."""
    evaluation = run.evaluations[split]
    leakage, primary = evaluation.leakage, evaluation.primary
    if leakage is None or primary is None:
        if _has_duplicates(run, split):
            return ["Some examples are in more than one split, so the scores are too high."]
        return []
    sentences = [words.sentence(f"data leakage: {leakage.describe(split)}")]
    other = leakage.whole if leakage.excluded else leakage.new
    if other is not None:
        text = words.score(other.scores.get(primary), run.unit_of(primary))
        which = "With these" if leakage.excluded else "Without these"
        sentences.append(f"{which}, on {words.count(other.count, 'example')}, {words.with_spaces(primary)} is {text}.")
    if not leakage.excluded:
        sentences.append("Too few other examples remain for a score of their own, so the test scores are too high.")
    return sentences


def describe_overlap(run: RunFiles, split: str) -> list[str]:
    """That the score is contaminated, where it is known to be."""
    found = run.evaluations[split].contamination
    return [] if found is None else [found.describe()]


def _has_duplicates(run: RunFiles, split: str) -> bool:
    """Whether an older version, which didn't count them, found examples of the test split in others."""
    if run.check is None or run.check.leakage or split != "test":
        return False
    return run.check.counts.get("duplicates_across_splits", 0) > 0


def _training(run: RunFiles) -> str:
    recipe, sizes, summary = run.recipe, views.split_sizes(run.data), run.summary
    model = str(recipe.get("model") or "A model")
    name = (run.data and run.data.name) or "the data"
    sentence = f"{model} was trained on {name}"
    if sizes.get("train") and run.data:
        names = views.count_names(run.data) if run.data.classes else []
        classes = f" in {words.count(len(names), 'class', 'classes')}" if names else ""
        sentence += f" ({words.count(sizes['train'], 'training example')}{classes})"
    if summary and summary.frozen and not summary.steps:
        sentence = sentence.replace(" was trained on ", " got a new head, fitted to its features of ", 1)
    elif summary and words.is_known(summary.epochs):
        epochs = "epoch" if summary.epochs == 1 else "epochs"
        sentence += f" for {words.number(summary.epochs)} {epochs}"
    if summary and summary.steps != 0 and words.is_known(summary.seconds.get("train")):
        sentence += f" in {words.seconds(summary.seconds['train'])}"
    return sentence + "."
