"""The data check: what a person should know about a data set before training on it.

It uses what decoding learns about each input (a digest of the content, unusual traits, the size), so it costs nothing
extra. It only reports; the caller decides whether to stop. Lists have at most `LISTED` entries, counts are complete.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np

from suanli.core.checked_targets import CheckedTarget, TargetReport
from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.core.registry import load_all
from suanli.core.schema import Geometry
from suanli.core.task import Task
from suanli.core.types import SPLITS, Example, Json, Source
from suanli.data.leaks import LeakCounts, LeakEntry, Leaks, count_leaks, describe_leaks

LISTED = 100
FEW_GROUPS = 5  # a split with fewer says little about groups that the model hasn't seen


class Bad(TypedDict):
    """An input that can't be decoded."""

    name: str
    reason: str


class EqualInputs(TypedDict):
    """A group of inputs with equal content."""

    names: list[str]
    split: NotRequired[str]  # of duplicates within a split
    splits: NotRequired[list[str]]  # of duplicates across splits
    labels: NotRequired[list[str]]  # of label conflicts, one for each name


class DividedGroup(TypedDict):
    """A group that the data puts into several splits."""

    group: str
    splits: list[str]


class Sizes(TypedDict):
    """Of inputs before preprocessing, by axis."""

    min: list[int]
    median: list[int]
    max: list[int]
    distinct: int


class Findings(TypedDict):
    """What the check found: check.json."""

    total: int
    bad: list[Bad]
    bad_share: float
    duplicates_across_splits: list[EqualInputs]
    duplicates_within: list[EqualInputs]
    label_conflicts: list[EqualInputs]
    counts: dict[str, int]  # how long the lists of bad inputs, duplicates and conflicts are before they are cut
    class_counts: dict[str, dict[str, int]]  # by split and class, or range of values, of inputs that can be decoded
    imbalance: float | None  # inputs of the largest class over those of the smallest; None: there are no classes
    empty_classes: list[str]
    remarks: NotRequired[list[str]]  # what the task says of `class_counts`; older versions didn't write these two
    target_remarks: NotRequired[list[str]]  # and of how targets fit their inputs
    traits: dict[str, int]  # how many inputs have each, the most frequent first
    sizes: Sizes | None
    notes: list[str]  # from the reader
    groups: NotRequired[dict[str, int]]  # by split, how many there are; these two where examples have groups
    groups_across_splits: NotRequired[list[DividedGroup]]
    set_aside: NotRequired[dict[str, int]]  # examples that suanli took for val and test itself
    leakage: NotRequired[dict[str, LeakCounts]]  # of val and test; older versions wrote neither of these two
    leaks: NotRequired[list[LeakEntry]]  # the full list is leaks.csv
    target_figures: NotRequired[dict[str, Json]]  # what the task measured of the targets, such as sizes of objects
    test_before_train: NotRequired[int]  # test inputs earlier than a training input, where examples have times


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeResult:
    """What decoding learned about one input."""

    digest: bytes = b""
    key: bytes = b""  # of near-duplicates
    traits: tuple[str, ...] = ()
    geometry: Geometry | None = None
    reason: str | None = None  # why it can't be decoded; None: it can

    @property
    def size(self) -> tuple[int, ...]:
        """Before preprocessing: (H, W), or (L,)."""
        return () if self.geometry is None else self.geometry.size


def collect_findings(
    source: Source, task: Task, splits: Sequence[str], results: Sequence[DecodeResult], leaks: Leaks
) -> Findings:
    """The findings; `splits`, `results` and `leaks` have one entry for each example of `source`."""
    rows = source.examples
    bad = [Bad(name=r.name, reason=d.reason) for r, d in zip(rows, results, strict=True) if d.reason is not None]
    good = [i for i, result in enumerate(results) if result.reason is None]
    across, within, conflicts = _group_equal(task, rows, splits, results, good)
    counts, report = _check_targets(task, rows, splits, results, good)
    totals = {name: sum(counts[split][name] for split in SPLITS) for name in task.classes}
    filled = [n for n in totals.values() if n]
    findings: Findings = {
        "total": len(rows),
        "bad": bad[:LISTED],
        "bad_share": len(bad) / max(len(rows), 1),
        "duplicates_across_splits": across[:LISTED],
        "duplicates_within": within[:LISTED],
        "label_conflicts": conflicts[:LISTED],
        "counts": {
            "bad": len(bad),
            "duplicates_across_splits": len(across),
            "duplicates_within": len(within),
            "label_conflicts": len(conflicts),
        },
        "class_counts": counts,
        "imbalance": max(filled) / min(filled) if filled else None,
        "empty_classes": [name for name, n in totals.items() if n == 0],
        "remarks": task.describe_counts(counts),
        "target_remarks": list(report.remarks),
        "traits": dict(Counter(t for i in good for t in results[i].traits).most_common()),
        "sizes": _summarize_sizes([results[i].size for i in good if results[i].size]),
        "notes": list(source.notes),
        "leakage": {},
        "leaks": list(leaks.entries[:LISTED]),
    }
    if report.figures:
        findings["target_figures"] = dict(report.figures)
    for split in ("val", "test"):
        own = [i for i in good if splits[i] == split]
        findings["leakage"][split] = count_leaks(leaks.kinds[own])
    _add_groups(findings, rows, splits, good)
    _add_times(findings, rows, splits, good)
    return findings


def _check_targets(
    task: Task,
    rows: Sequence[Example],
    splits: Sequence[str],
    results: Sequence[DecodeResult],
    good: Sequence[int],
) -> tuple[dict[str, dict[str, int]], TargetReport]:
    """The table of counts, and what else the task says of the targets."""
    by_split: dict[str, list[CheckedTarget]] = {split: [] for split in SPLITS}
    for i in good:
        if (geometry := results[i].geometry) is not None:
            by_split[splits[i]].append(CheckedTarget(rows[i].name, rows[i].target, geometry))
    counts = task.count_targets({split: [one.target for one in examples] for split, examples in by_split.items()})
    return counts, task.check_targets(by_split)


def _add_groups(findings: Findings, rows: Sequence[Example], splits: Sequence[str], good: Sequence[int]) -> None:
    if all(row.group is None for row in rows):
        return
    splits_of: dict[str, set[str]] = defaultdict(set)
    for i in good:
        if (group := rows[i].group) is not None:
            splits_of[group].add(splits[i])
    divided = [
        DividedGroup(group=group, splits=sorted(in_splits, key=SPLITS.index))
        for group, in_splits in splits_of.items()
        if len(in_splits) > 1
    ]
    divided.sort(key=_worst_first)
    findings["groups"] = {s: sum(s in in_splits for in_splits in splits_of.values()) for s in SPLITS}
    findings["groups_across_splits"] = divided[:LISTED]
    findings["counts"]["groups_across_splits"] = len(divided)


def _add_times(findings: Findings, rows: Sequence[Example], splits: Sequence[str], good: Sequence[int]) -> None:
    times = [(splits[i], time) for i in good if (time := rows[i].time) is not None]
    if times:
        latest = max((time for split, time in times if split == "train"), default=-np.inf)
        findings["test_before_train"] = sum(split == "test" and time < latest for split, time in times)


def _worst_first(item: DividedGroup | EqualInputs) -> tuple[bool, bool]:
    """Sorts test inputs that the model is trained on to the front."""
    return "test" not in item["splits"], "train" not in item["splits"]


def _group_equal(
    task: Task, rows: Sequence[Example], splits: Sequence[str], results: Sequence[DecodeResult], good: list[int]
) -> tuple[list[EqualInputs], list[EqualInputs], list[EqualInputs]]:
    """Groups of inputs with equal content: across splits, within one split, and with several labels."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i in good:
        groups[results[i].digest].append(i)
    across: list[EqualInputs] = []
    within: list[EqualInputs] = []
    conflicts: list[EqualInputs] = []
    for members in groups.values():
        if len(members) == 1:
            continue
        in_splits = sorted({splits[i] for i in members}, key=SPLITS.index)
        names, labels = [rows[i].name for i in members], [task.name_target(rows[i].target) for i in members]
        if len(in_splits) > 1:
            across.append({"names": names, "splits": in_splits})
        else:
            within.append({"names": names, "split": in_splits[0]})
        if len(set(labels)) > 1:
            conflicts.append({"names": names, "labels": labels})
    across.sort(key=_worst_first)
    return across, within, conflicts


def _summarize_sizes(sizes: list[tuple[int, ...]]) -> Sizes | None:
    if not sizes:
        return None
    table = np.array(sizes)
    return {
        "min": table.min(axis=0).tolist(),
        "median": np.median(table, axis=0).astype(int).tolist(),
        "max": table.max(axis=0).tolist(),
        "distinct": len(set(sizes)),
    }


def refuse_bad_share(findings: Findings, max_bad: float) -> None:
    """Raises DataError, with a list, if more than the share `max_bad` of the inputs can't be decoded."""
    if findings["bad_share"] <= max_bad:
        return
    listed = "\n".join(f"  {b['name']}: {b['reason']}" for b in findings["bad"][:20])
    more = findings["counts"]["bad"] - 20
    if more > 0:
        listed += f"\n  … and {more} more"
    raise DataError(
        f"{findings['counts']['bad']} of {findings['total']} examples can't be decoded "
        f"({findings['bad_share']:.1%}, allowed is {max_bad:.1%}):\n{listed}\n",
        fix=f"Repair or remove them, or accept them with --max-bad {min(1.0, findings['bad_share'] + 0.01):.2f}.",
    )


def refuse_unlearnable(findings: Findings, task: Task) -> None:
    """Raises DataError if a class or a split is too small for training or evaluation."""
    task.refuse_unlearnable(findings["class_counts"])
    counts = findings["class_counts"]
    few = "groups" if "groups" in findings else "examples"
    for split in SPLITS:
        if not any(counts[split].values()):
            raise DataError(
                f"The {split} split is empty.",
                fix=f"With so few {few}, choose the splits yourself (folders train/, val/ and test/), "
                "or give them a larger share: --set val_fraction=0.25 --set test_fraction=0.25.",
            )


def format_findings(findings: Findings) -> list[str]:
    """The findings as sentences for a terminal, the most important first."""
    counts = findings["counts"]
    lines = []
    lines += _format_leaks(findings)
    if not lines and counts["duplicates_across_splits"]:
        names = findings["duplicates_across_splits"][0]["names"]
        lines.append(
            f"{plural(counts['duplicates_across_splits'], 'example')} in more than one split, so scores are too high: "
            f"{' = '.join(names[:3])}"
        )
    lines += _format_groups(findings)
    if early := findings.get("test_before_train"):
        lines.append(f"{plural(early, 'test example')} earlier than the last training example")
    if counts["label_conflicts"]:
        first = findings["label_conflicts"][0]
        named: dict[str, str] = {}
        for name, label in zip(first["names"], first["labels"], strict=True):
            named.setdefault(label, name)
        examples = " = ".join(f"{name} ({label})" for label, name in list(named.items())[:3])
        lines.append(f"{plural(counts['label_conflicts'], 'example')} with different labels: {examples}")
    if counts["bad"]:
        bad = findings["bad"][0]
        lines.append(f"{plural(counts['bad'], 'example')} left out, can't be decoded: {bad['name']} ({bad['reason']})")
    if counts["duplicates_within"]:
        lines.append(f"{plural(counts['duplicates_within'], 'group')} of identical examples within a split")
    lines += [*findings.get("remarks", []), *findings.get("target_remarks", [])]
    if findings["traits"]:
        lines.append(f"converted: {describe_traits(findings['traits'])}")
    return lines + list(findings["notes"])


def describe_traits(traits: Mapping[str, int]) -> str:
    """ "1 palette image, 12 grayscale images"."""
    nouns = {trait: noun for kind in load_all("preprocess").values() for trait, noun in kind.trait_names.items()}
    return ", ".join(plural(count, nouns.get(trait, trait)) for trait, count in traits.items())


def _format_leaks(findings: Findings) -> list[str]:
    lines = []
    for split, score in (("test", "test score"), ("val", "validation score")):
        leaks = findings.get("leakage", {}).get(split)
        if leaks is None or not leaks["exact"] + leaks["near"]:
            continue
        first = next((one for one in findings["leaks"] if one["split"] == split), None)
        example = f": {first['example']} = {first['copies'][0]['name']}" if first else ""
        lines.append(f"data leakage: {describe_leaks(split, **leaks)}, so the {score} is too high{example}")
    return lines


def _format_groups(findings: Findings) -> list[str]:
    if "groups" not in findings:
        return []
    lines = []
    if divided := findings["groups_across_splits"]:
        first = divided[0]
        lines.append(
            f"{plural(findings['counts']['groups_across_splits'], 'group')} in more than one split, as the data states "
            f"them, so scores are too high: {first['group']} ({', '.join(first['splits'])})"
        )
    few = [f"{n:,} in {split}" for split, n in findings["groups"].items() if n < FEW_GROUPS]
    if few:
        lines.append(f"few groups ({', '.join(few)}), so the score says little about new ones")
    return lines
