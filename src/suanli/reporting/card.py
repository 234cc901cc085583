"""The model card: README.md of a run, for readers who have the model and can't ask its authors.

Short and plain: what it is for, how good it is and on what, how to use it, what is not known. The
report has the details. Sections follow Mitchell et al., "Model Cards for Model Reporting" (2019).
"""

from __future__ import annotations

import shlex

from suanli.core.task import Task
from suanli.reporting import prose
from suanli.reporting.files import RunFiles
from suanli.reporting.records import Data, StartingWeights
from suanli.reporting.views import split_sizes
from suanli.reporting.words import interval, score


def card(run: RunFiles) -> str:
    """The card in Markdown."""
    if run.only_bench:
        return _bench_card(run)
    recipe = run.recipe
    name = run.path.resolve().name
    kind = run.data.kind if run.data else None
    lines = [f"# {_plain(name)}", ""]
    lines.append(
        f"A `{recipe.get('model', '?')}` for {kind or 'data'} {recipe.get('task', '?')}, trained with suanli.",
    )
    if run.data:
        lines += ["", "## Data", "", *_data(run.data)]
    if run.weights:
        lines += ["", "## Weights that it started from", "", *_weights(run.weights)]
    lines += ["", "## How good it is", "", *_scores(run)]
    if run.trained:
        lines += ["", "## Use", "", *_use(name, run.encoding_code)]
    lines += ["", "## Limits", "", *_limits(run)]
    lines += _command(run)
    return "\n".join(lines) + "\n"


def _bench_card(run: RunFiles) -> str:
    """Of a directory that measures speed and holds no model."""
    lines = [f"# {_plain(run.path.resolve().name)}", "", *map(_plain, prose.abstract(run, None)), ""]
    file = "bench.json" if run.ablation else "scaling.json"
    lines.append(f"The figures are in `{file}`, and in `report.html` for people.")
    return "\n".join([*lines, *_command(run)]) + "\n"


def _command(run: RunFiles) -> list[str]:
    if not run.environment or not run.environment.command:
        return []
    lines = ["", "## Made with", "", "```sh", shlex.join(run.environment.command), "```"]
    versions = ", ".join(f"{n} {v}" for n, v in run.environment.versions.items() if v)
    return [*lines, "", f"On {run.environment.cpu or 'an unknown machine'}; {versions}."]


def _data(data: Data) -> list[str]:
    sizes = ", ".join(f"{n:,} {split}" for split, n in split_sizes(data).items())
    classes = ", ".join(map(_plain, data.classes[:20])) + (", …" if len(data.classes) > 20 else "")
    return [
        f"- {_plain(data.name or '?')}: {sizes}",
        *([f"- {len(data.classes)} classes: {classes}"] if data.classes else []),
        f"- Licence: {_plain(data.licence or 'not stated')}",
    ]


def _weights(weights: StartingWeights) -> list[str]:
    lines = [f"- {name[:1].upper()}{name[1:]}: {_plain(value)}" for name, value in prose.weights_facts(weights)]
    return [*lines, *([f"- {weights.caution}"] if weights.caution else [])]


def _scores(run: RunFiles) -> list[str]:
    if (evaluation := run.evaluations.get("test")) is None:
        lines = ["Not evaluated on the test split yet: `suanli evaluate` does it."]
        return [*lines, *(line for sentence in prose.describe_cross_validation(run) for line in ("", sentence))]
    lines = [f"On {prose.describe_examples(run, 'test')}:", ""]
    for name, value in evaluation.scores.items():
        unit = run.unit_of(name)
        bounds = interval(evaluation.all_intervals.get(name), unit)
        remark = ", lower is better" if name == evaluation.primary and not evaluation.higher_is_better else ""
        bounds = f" (95 % interval {bounds})" if bounds else ""
        others = "".join(f"; {one.name} baseline {score(one.scores.get(name), unit)}" for one in evaluation.baselines)
        lines.append(f"- {name.replace('_', ' ')}: {score(value, unit)}{bounds}{remark}{others}")
    metric = run.metric(evaluation.primary or "")
    worth = [_plain(one.describe(metric)) for one in evaluation.baselines]
    remarks = [
        worth,
        list(evaluation.remarks),
        prose.describe_leakage(run, "test"),
        prose.describe_overlap(run, "test"),
        prose.describe_cross_validation(run),
    ]
    return [*lines, *(line for sentences in remarks if sentences for line in ("", " ".join(sentences)))]


def _use(name: str, encoding_code: str | None) -> list[str]:
    lines = [
        "```sh",
        f"suanli predict {shlex.quote(name)} INPUT...",
        "```",
        "",
        "The folder `model/` alone is enough for predictions.",
    ]
    if encoding_code is None:
        return lines
    about = "An exported model needs its input prepared like this, from the file `path`:"
    return [*lines, "", about, "", "```python", encoding_code, "```"]


def _limits(run: RunFiles) -> list[str]:
    lines = ["- It was evaluated on examples from the source of its training data; other data can be harder."]
    if run.data and run.data.classes:
        task = run.task or Task
        lines.insert(0, f"- It knows these classes only: {task.other_classes}.")
    if run.check and run.check.counts.get("groups_across_splits"):
        lines.append("- Some groups are in more than one split, so the scores are too high (see the report).")
    return lines


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in " ".join(text.split()))
