"""The data check: what a person should know of a data set before a machine learns from it.

Built from what decoding found out about each input (a digest of its content, its odd traits, its
size), so it costs nothing extra. It reports; the caller decides whether to stop. Lists are cut at
`LISTED` entries, counts are complete.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.core.types import SPLITS, Json

LISTED = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeResult:
    """What decoding found out about one input; `reason` is set where it could not be decoded."""

    digest: bytes = b""
    traits: tuple[str, ...] = ()
    size: tuple[int, ...] = ()
    reason: str | None = None


def collect_findings(
    *,
    names: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[str],
    seen: Sequence[DecodeResult],
    classes: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Json]:
    """The findings as JSON; all four sequences have one entry for each input."""
    bad = [{"name": n, "reason": s.reason} for n, s in zip(names, seen, strict=True) if s.reason is not None]
    good = [i for i, s in enumerate(seen) if s.reason is None]
    across, within, conflicts = _same_content(names, labels, splits, seen, good)
    counts = _class_counts(labels, splits, classes, good)
    totals = {c: sum(counts[s][c] for s in SPLITS) for c in classes}
    filled = [n for n in totals.values() if n]
    return {
        "total": len(names),
        "bad": bad[:LISTED],
        "bad_share": len(bad) / max(len(names), 1),
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
        "empty_classes": [c for c, n in totals.items() if n == 0],
        "traits": dict(Counter(t for i in good for t in seen[i].traits).most_common()),
        "sizes": _sizes([seen[i].size for i in good if seen[i].size]),
        "notes": list(notes),
    }


def _same_content(
    names: Sequence[str], labels: Sequence[str], splits: Sequence[str], seen: Sequence[DecodeResult], good: list[int]
) -> tuple[list[Json], list[Json], list[Json]]:
    """Groups of inputs with equal content: across splits, within one split, with several labels."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i in good:
        groups[seen[i].digest].append(i)
    across: list[Json] = []
    within: list[Json] = []
    conflicts: list[Json] = []
    for members in groups.values():
        if len(members) == 1:
            continue
        found_in = sorted({splits[i] for i in members}, key=SPLITS.index)
        group_names = [names[i] for i in members]
        if len(found_in) > 1:
            across.append({"names": group_names, "splits": found_in})
        else:
            within.append({"names": group_names, "split": found_in[0]})
        if len({labels[i] for i in members}) > 1:
            conflicts.append({"names": group_names, "labels": [labels[i] for i in members]})
    # The headline first: an exam question that was also a lesson.
    across.sort(key=lambda d: ("test" not in d["splits"], "train" not in d["splits"]))
    return across, within, conflicts


def _class_counts(
    labels: Sequence[str], splits: Sequence[str], classes: Sequence[str], good: list[int]
) -> dict[str, dict[str, int]]:
    counts = {s: dict.fromkeys(classes, 0) for s in SPLITS}
    for i in good:
        counts[splits[i]][labels[i]] += 1
    return counts


def _sizes(sizes: list[tuple[int, ...]]) -> Json:
    if not sizes:
        return None
    table = np.array(sizes)
    return {
        "min": table.min(axis=0).tolist(),
        "median": np.median(table, axis=0).astype(int).tolist(),
        "max": table.max(axis=0).tolist(),
        "distinct": len(set(sizes)),
    }


def refuse_bad_share(findings: Json, max_bad: float) -> None:
    """Raises DataError that lists the files when more than `max_bad` of them can't be decoded."""
    if findings["bad_share"] <= max_bad:
        return
    listed = "\n".join(f"  {b['name']}: {b['reason']}" for b in findings["bad"][:20])
    more = findings["counts"]["bad"] - 20
    if more > 0:
        listed += f"\n  … and {more} more"
    raise DataError(
        f"{findings['counts']['bad']} of {findings['total']} inputs can't be decoded "
        f"({findings['bad_share']:.1%}, allowed is {max_bad:.1%}):\n{listed}\n",
        fix=f"Repair or remove them, or accept them with --max-bad {min(1.0, findings['bad_share'] + 0.01):.2f}.",
    )


def refuse_unlearnable(findings: Json) -> None:
    """Raises DataError when a class or a split is too small to learn from or to examine with."""
    counts = findings["class_counts"]
    totals = {c: sum(counts[s][c] for s in SPLITS) for c in counts["train"]}
    filled = [c for c, n in totals.items() if n]
    if len(filled) < 2:
        raise DataError(
            f"Only one class has usable inputs: {', '.join(map(repr, filled)) or 'none'}.",
            fix="A classifier needs at least two; add a second class.",
        )
    single = [c for c in filled if totals[c] == 1]
    if single:
        raise DataError(
            f"Class {single[0]!r} has a single usable input"
            + (f" (and so have {len(single) - 1} other classes)." if len(single) > 1 else "."),
            fix="What is learned can't be examined with the same input: add more of that class or remove it.",
        )
    for split in SPLITS:
        if not any(counts[split].values()):
            raise DataError(
                f"The {split} split is empty.",
                fix="With so few inputs, choose the splits yourself (folders train/, val/ and test/), "
                "or give them a larger share: --set val_fraction=0.25 --set test_fraction=0.25.",
            )
    untaught = [c for c in filled if counts["train"][c] == 0]
    if untaught:
        raise DataError(
            f"Class {untaught[0]!r} has no training input.",
            fix="Add some to the training split, or remove the class from the others.",
        )


def format_findings(findings: Json) -> list[str]:
    """The findings as sentences for a terminal, the most important first."""
    n = findings["counts"]
    lines = []
    if n["duplicates_across_splits"]:
        first = findings["duplicates_across_splits"][0]
        lines.append(
            f"{plural(n['duplicates_across_splits'], 'input')} found in more than one split, so the score flatters: "
            f"{' = '.join(first['names'][:3])}"
        )
    if n["label_conflicts"]:
        first = findings["label_conflicts"][0]
        lines.append(
            f"{plural(n['label_conflicts'], 'input')} with two labels: {first['names'][0]} ({first['labels'][0]}) = "
            f"{first['names'][1]} ({first['labels'][1]})"
        )
    if n["bad"]:
        first = findings["bad"][0]
        lines.append(f"{plural(n['bad'], 'input')} left out, not decodable: {first['name']} ({first['reason']})")
    if n["duplicates_within"]:
        lines.append(f"{plural(n['duplicates_within'], 'group')} of identical inputs within a split")
    unexamined = [
        name
        for name, count in findings["class_counts"]["train"].items()
        if count and not findings["class_counts"]["test"][name]
    ]
    if unexamined:
        lines.append(f"classes without test inputs: {', '.join(unexamined[:10])}")
    if findings["empty_classes"]:
        lines.append(f"classes without inputs: {', '.join(findings['empty_classes'][:10])}")
    if findings["imbalance"] and findings["imbalance"] >= 3:
        lines.append(
            f"the largest class has {findings['imbalance']:.1f} times the inputs of the smallest; "
            "--set class_weights=balanced may help"
        )
    if findings["traits"]:
        lines.append("odd inputs, handled: " + ", ".join(f"{n} {t}" for t, n in findings["traits"].items()))
    return lines + list(findings["notes"])
