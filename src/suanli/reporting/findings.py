"""The data check as things to act on: each finding, what it means and what to do; the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.data.checks import describe_traits
from suanli.reporting import words
from suanli.reporting.records import Check, Duplicate

LISTED = 10  # of each finding; the others fold away
IMBALANCED = 3.0  # largest class over smallest
MANY_BAD = 0.01
FEW_GROUPS = 5


@dataclass(frozen=True, kw_only=True)
class Group:
    """Names that belong together: one input, or all that equal it."""

    names: Sequence[str]
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`weight` is 'severe' (the scores can't be trusted), 'warning' or 'note'."""

    weight: str
    title: str
    advice: str
    groups: Sequence[Group] = ()
    total: int = 0  # how many there are; `groups` may be fewer


def list_findings(check: Check) -> list[Finding]:
    targets = _classes(check) if words.is_known(check.imbalance) or check.empty_classes else _remarks(check)
    fitting = [
        Finding(weight="warning", title=words.sentence(one), advice="")
        for one in (*check.input_remarks, *check.target_remarks)
    ]
    return [*_duplicates(check), *_divisions(check), *_unusable(check), *targets, *fitting, *_oddities(check)]


def _total(check: Check, field: str, examples: Sequence[object]) -> int:
    return max(check.counts.get(field, 0), len(examples))


def _groups(duplicates: Sequence[Duplicate]) -> list[Group]:
    """Equal inputs with the labels or the splits that they are under."""
    groups = []
    for one in duplicates:
        names = one.names
        if len(one.labels) == len(names):
            names = tuple(f"{name} ({label})" for name, label in zip(names, one.labels, strict=True))
        groups.append(Group(names=names, remark="in " + " and ".join(one.splits) if one.splits else ""))
    return groups


def _duplicates(check: Check) -> list[Finding]:
    across, conflicts = check.duplicates_across_splits, check.label_conflicts
    findings = _leaks(check)
    if not findings and (n := _total(check, "duplicates_across_splits", across)):
        findings.append(
            Finding(
                weight="severe",
                title=f"{words.count(n, 'example')} in more than one split",
                advice="A model that was trained on test examples scores too high on them. Delete one copy of each, or"
                " give the data without splits: suanli then splits by content and keeps equal examples together.",
                groups=_groups(across),
                total=n,
            )
        )
    if n := _total(check, "label_conflicts", conflicts):
        findings.append(
            Finding(
                weight="warning",
                title=f"{words.count(n, 'example')} under more than one label",
                advice="No model can get all copies right. Keep the copy with the right label.",
                groups=_groups(conflicts),
                total=n,
            )
        )
    return findings


def _leaks(check: Check) -> list[Finding]:
    findings = []
    for split in ("test", "val"):
        if (leaks := check.leakage.get(split)) is None or not leaks.total:
            continue
        listed = [one for one in check.leaks if one.split == split]
        groups = [
            Group(
                names=(one.example, *(copy.name for copy in one.copies)),
                remark="near-duplicate" if one.kind == "near" else "",
            )
            for one in listed
        ]
        score = "test score" if split == "test" else "validation score"
        findings.append(
            Finding(
                weight="severe" if split == "test" else "warning",
                title=f"Data leakage: {leaks.describe(split)}, so the {score} is too high",
                advice="Delete one copy of each (leaks.csv in the run lists them all), or give the data without splits:"
                " suanli then splits by content and keeps equal examples together.",
                groups=groups,
                total=leaks.total,
            )
        )
    return findings


def _divisions(check: Check) -> list[Finding]:
    """What groups and times say of the splits."""
    findings = []
    divided = check.groups_across_splits
    if n := _total(check, "groups_across_splits", divided):
        findings.append(
            Finding(
                weight="severe",
                title=f"{words.count(n, 'group')} in more than one split",
                advice="Examples of one group are alike, so a model trained on some of them scores too high on the"
                " others. Move each group into one split, or give the data without splits: suanli divides no group.",
                groups=[Group(names=(one.group,), remark="in " + " and ".join(one.splits)) for one in divided],
                total=n,
            )
        )
    if check.test_before_train:
        findings.append(
            Finding(
                weight="warning",
                title=f"{words.count(check.test_before_train, 'test example')} before the latest training example",
                advice="The score says less about future data. A split by time alone avoids this.",
            )
        )
    if check.groups:
        few = any(0 < n < FEW_GROUPS for n in check.groups.values())
        listed = ", ".join(f"{words.number(n)} {split}" for split, n in check.groups.items())
        findings.append(
            Finding(
                weight="warning" if few else "note",
                title=f"Groups: {listed}",
                advice=f"A score on fewer than {FEW_GROUPS} groups says little about new ones." if few else "",
            )
        )
    return findings


def _unusable(check: Check) -> list[Finding]:
    if not (n := _total(check, "bad", check.bad)):
        return []
    share = f" ({words.percent(check.bad_share, 2)} of all)" if words.is_known(check.bad_share) else ""
    return [
        Finding(
            weight="severe" if (check.bad_share or 0) > MANY_BAD else "warning",
            title=f"{words.count(n, 'example')} can't be decoded{share}",
            advice="They were left out of every split. Replace or delete them.",
            groups=[Group(names=(one.name,), remark=one.reason) for one in check.bad],
            total=n,
        )
    ]


def _classes(check: Check) -> list[Finding]:
    findings = []
    if check.empty_classes:
        n = len(check.empty_classes)
        findings.append(
            Finding(
                weight="warning",
                title=f"{words.count(n, 'class', 'classes')} without examples",
                advice="They can't be learned. Add examples or remove the class.",
                groups=[Group(names=(name,)) for name in check.empty_classes],
                total=n,
            )
        )
    if words.is_known(check.imbalance) and check.imbalance >= IMBALANCED:
        findings.append(
            Finding(
                weight="warning",
                title=f"The largest class is {words.times(check.imbalance)} times the smallest",
                advice="Read the scores of each class beside those of all. Where the task has weights of classes, they"
                " may help the small ones: --set class_weights=balanced",
            )
        )
    return findings


def _remarks(check: Check) -> list[Finding]:
    """The task's, on targets that aren't classes."""
    return [Finding(weight="warning", title=words.sentence(one), advice="") for one in check.remarks]


def _oddities(check: Check) -> list[Finding]:
    findings = []
    within = check.duplicates_within
    if n := _total(check, "duplicates_within", within):
        findings.append(
            Finding(
                weight="note",
                title=f"{words.count(n, 'example')} more than once in one split",
                advice="Each copy counts as an example. Delete unintended copies.",
                groups=_groups(within),
                total=n,
            )
        )
    if check.traits:
        findings.append(
            Finding(
                weight="note",
                title=f"Converted: {describe_traits(check.traits)}",
                advice="They now have the same form as all others. Nothing to do if they belong here.",
            )
        )
    if check.sizes and check.sizes.min and check.sizes.min != check.sizes.max:
        sizes = check.sizes
        distinct = f", {words.number(sizes.distinct)} different" if sizes.distinct else ""
        findings.append(
            Finding(
                weight="note",
                title=f"Sizes from {words.shape(sizes.min)} to {words.shape(sizes.max)},"
                f" median {words.shape(sizes.median)}{distinct}",
                advice="All were brought to the model's input size.",
            )
        )
    findings += [Finding(weight="note", title=note, advice="") for note in check.notes]
    return findings
