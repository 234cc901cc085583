"""The data check: what a person should know about a data set before training on it.

It uses what decoding learns about each input (a digest of the content, unusual traits, the size), so it costs nothing
extra. It only reports; the caller decides whether to stop. Lists have at most `LISTED` entries, counts are complete.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np

from suanli.core.checked_targets import CheckedTarget, TargetReport
from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.core.registry import load_all
from suanli.core.schema import Geometry
from suanli.core.task import Task
from suanli.core.types import SPLITS, Json, Source
from suanli.data.example_columns import ExampleColumns
from suanli.data.examples import rows_of_bytes
from suanli.data.lazy_sequence import LazySequence
from suanli.data.leaks import LeakCounts, LeakEntry, Leaks, count_leaks, describe_leaks

LISTED = 100
NAMED = 1000  # of a group of equal inputs
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
    input_remarks: NotRequired[list[str]]  # what the kind of data says of the inputs, and what it measured
    input_figures: NotRequired[dict[str, Json]]
    test_before_train: NotRequired[int]  # test inputs earlier than a training input, where examples have times


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeResult:
    """What decoding learned about one input."""

    digest: bytes = b""
    key: bytes = b""  # of near-duplicates
    traits: tuple[str, ...] = ()
    geometry: Geometry | None = None
    windows: tuple[Geometry, ...] = ()  # as EncodedInput has them
    reason: str | None = None  # why it can't be decoded; None: it can


@dataclass(frozen=True, kw_only=True)
class DecodeResults:
    """What decoding learned about N inputs."""

    digests: np.ndarray  # (N, 16) uint8; zeros: it can't be decoded
    keys: np.ndarray  # (N, bytes) uint8; zeros: it has none
    geometries: np.ndarray  # (N, 3, axes) float64; zeros: it can't be decoded
    reasons: Mapping[int, str]  # why an input can't be used
    traits: Mapping[str, int]  # of those that can: how many have each
    windows: np.ndarray = field(default_factory=partial(np.zeros, (0, 3, 2)))  # (R, 3, axes): of all windows
    orientations: Mapping[int, int] = field(default_factory=dict)  # `Geometry.orientation`, where it isn't 1

    def __len__(self) -> int:
        return len(self.digests)

    @classmethod
    def of(cls, results: Sequence[DecodeResult]) -> DecodeResults:
        axes = max((len(one.geometry.size) for one in results if one.geometry is not None), default=0)
        empty = np.zeros((3, axes))
        geometries = [empty if one.geometry is None else one.geometry.to_array() for one in results]
        return cls(
            digests=rows_of_bytes([one.digest for one in results], 16),
            keys=rows_of_bytes([one.key for one in results]),
            geometries=np.stack(geometries) if results else np.zeros((0, 3, axes)),
            reasons={i: one.reason for i, one in enumerate(results) if one.reason is not None},
            traits=Counter(trait for one in results if one.reason is None for trait in one.traits),
            windows=np.array([window.to_array() for one in results for window in one.windows]),
            orientations={
                i: one.geometry.orientation
                for i, one in enumerate(results)
                if one.geometry is not None and one.geometry.orientation != 1
            },
        )

    @classmethod
    def join(cls, parts: Sequence[DecodeResults]) -> DecodeResults:
        traits: Counter[str] = Counter()
        reasons: dict[int, str] = {}
        start = 0
        for part in parts:
            traits.update(part.traits)
            reasons |= {start + i: reason for i, reason in part.reasons.items()}
            start += len(part)
        digests, keys, geometries = zip(*((one.digests, one.keys, one.geometries) for one in parts), strict=True)
        widest, axes = max(key.shape[1] for key in keys), max(one.shape[2] for one in geometries)
        return cls(
            digests=np.concatenate(digests),
            keys=np.concatenate([np.pad(key, ((0, 0), (0, widest - key.shape[1]))) for key in keys]),
            geometries=np.concatenate([np.pad(g, ((0, 0), (0, 0), (0, axes - g.shape[2]))) for g in geometries]),
            reasons=reasons,
            traits=traits,
        )

    @property
    def good(self) -> np.ndarray:
        """Positions of the inputs that can be used."""
        usable = np.ones(len(self), bool)
        usable[list(self.reasons)] = False
        return np.flatnonzero(usable)

    @property
    def sizes(self) -> np.ndarray:
        """(M, axes): of the inputs before preprocessing, (H, W) or (L,)."""
        sizes: np.ndarray = self.geometries[self.good, 0].astype(np.int64)
        return sizes


def collect_findings(
    source: Source, task: Task, splits: Sequence[str], results: DecodeResults, leaks: Leaks
) -> Findings:
    """The findings; `splits`, `results` and `leaks` have one entry for each example of `source`."""
    rows = ExampleColumns.of(source.examples)
    bad = [Bad(name=rows.names[i], reason=reason) for i, reason in results.reasons.items()]
    good = results.good
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
        "traits": dict(Counter(results.traits).most_common()),
        "sizes": _summarize_sizes(results.sizes),
        "notes": list(source.notes),
        "leakage": {},
        "leaks": list(leaks.entries[:LISTED]),
    }
    if report.figures:
        findings["target_figures"] = dict(report.figures)
    for split in ("val", "test"):
        own = [i for i in good.tolist() if splits[i] == split]
        findings["leakage"][split] = count_leaks(leaks.kinds[own])
    _add_groups(findings, rows, splits, good)
    _add_times(findings, rows, splits, good)
    return findings


class _Checked(LazySequence[CheckedTarget]):
    """The targets at some positions, each made when somebody looks at it."""

    def __init__(self, rows: ExampleColumns, results: DecodeResults, positions: Sequence[int]) -> None:
        self._rows, self._results, self._positions = rows, results, positions

    def __len__(self) -> int:
        return len(self._positions)

    def _item(self, position: int) -> CheckedTarget:
        i = self._positions[position]
        geometry = Geometry.from_array(self._results.geometries[i])
        if (orientation := self._results.orientations.get(i, 1)) != 1:
            geometry = replace(geometry, orientation=orientation)
        return CheckedTarget(self._rows.names[i], self._rows.targets[i], geometry)


def _check_targets(
    task: Task, rows: ExampleColumns, splits: Sequence[str], results: DecodeResults, good: np.ndarray
) -> tuple[dict[str, dict[str, int]], TargetReport]:
    """The table of counts, and what else the task says of the targets."""
    by_split: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i in good.tolist():
        by_split[splits[i]].append(i)
    counts = task.count_targets({split: [rows.targets[i] for i in own] for split, own in by_split.items()})
    checked = {split: _Checked(rows, results, own) for split, own in by_split.items()}
    return counts, task.check_targets(checked)


def _add_groups(findings: Findings, rows: ExampleColumns, splits: Sequence[str], good: np.ndarray) -> None:
    if rows.groups is None:
        return
    splits_of: dict[str, set[str]] = defaultdict(set)
    for i in good.tolist():
        if (group := rows.groups[i]) is not None:
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


def _add_times(findings: Findings, rows: ExampleColumns, splits: Sequence[str], good: np.ndarray) -> None:
    if rows.times is None:
        return
    times = [(splits[i], time) for i in good.tolist() if (time := rows.times[i]) is not None]
    if times:
        latest = max((time for split, time in times if split == "train"), default=-np.inf)
        findings["test_before_train"] = sum(split == "test" and time < latest for split, time in times)


def _worst_first(item: DividedGroup | EqualInputs) -> tuple[bool, bool]:
    """Sorts test inputs that the model is trained on to the front."""
    return "test" not in item["splits"], "train" not in item["splits"]


def _group_equal(
    task: Task, rows: ExampleColumns, splits: Sequence[str], results: DecodeResults, good: np.ndarray
) -> tuple[list[EqualInputs], list[EqualInputs], list[EqualInputs]]:
    """Groups of inputs with equal content: across splits, within one split, and with several labels. Of a group, the
    first `NAMED` are named."""
    across: list[EqualInputs] = []
    within: list[EqualInputs] = []
    conflicts: list[EqualInputs] = []
    for members in _find_groups(results.digests[good]):
        at = good[members].tolist()
        in_splits = sorted({splits[i] for i in at}, key=SPLITS.index)
        labels = {name: i for i in reversed(at) if (name := task.name_target(rows.targets[i]))}
        several = len(labels) > 1
        shown = sorted({*at[:NAMED], *(labels.values() if several else ())})
        names = [rows.names[i] for i in shown]
        if len(in_splits) > 1:
            across.append({"names": names, "splits": in_splits})
        else:
            within.append({"names": names, "split": in_splits[0]})
        if several:
            conflicts.append({"names": names, "labels": [task.name_target(rows.targets[i]) for i in shown]})
    across.sort(key=_worst_first)
    return across, within, conflicts


def _find_groups(digests: np.ndarray) -> Iterator[np.ndarray]:
    """The positions of each group of equal rows (N, 16), ascending; in the order of their first members."""
    if not len(digests):
        return
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: the positions of equal rows ascend
    new = np.flatnonzero((words[order[1:]] != words[order[:-1]]).any(1)) + 1
    starts, ends = np.append(0, new), np.append(new, len(order))
    several = np.flatnonzero(ends - starts > 1)
    for i in several[np.argsort(order[starts[several]], kind="stable")]:
        yield order[starts[i] : ends[i]]


def _summarize_sizes(table: np.ndarray) -> Sizes | None:
    if not table.size:
        return None
    return {
        "min": table.min(axis=0).tolist(),
        "median": np.median(table, axis=0).astype(int).tolist(),
        "max": table.max(axis=0).tolist(),
        "distinct": len(np.unique(table, axis=0)),
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
    lines += findings.get("input_remarks", [])
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
