"""What the numbers of examples of each class mean for a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.tasks._class_names import find_order


def refuse_unlearnable(classes: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> None:
    """Raises DataError for one class only, and for a class that can't be both learned and evaluated."""
    totals = {name: sum(split[name] for split in counts.values()) for name in classes}
    filled = [name for name, n in totals.items() if n]
    if len(filled) < 2:
        raise DataError(
            f"Only one class has usable examples: {', '.join(map(repr, filled)) or 'none'}.",
            fix="A classifier needs at least two; add a second class.",
        )
    single = [name for name in filled if totals[name] == 1]
    if single:
        others = len(single) - 1
        do = "does" if others == 1 else "do"
        also = f", and so {do} {plural(others, 'other class', 'other classes')}" if others else ""
        raise DataError(
            f"Class {single[0]!r} has a single usable example{also}.",
            fix="Training and evaluation need different examples: add more of that class or remove it.",
        )
    untrained = [name for name in filled if counts["train"][name] == 0]
    if untrained and any(counts["train"].values()):
        raise DataError(
            f"Class {untrained[0]!r} has no training example.",
            fix="Add some to the training split, or remove the class from the others.",
        )


def describe_counts(classes: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Classes without test examples, and without any; classes that look ordered."""
    lines = []
    if untested := [name for name, n in counts["train"].items() if n and not counts["test"][name]]:
        lines.append(f"classes without test examples: {', '.join(untested[:10])}")
    if empty := [name for name in classes if not any(split[name] for split in counts.values())]:
        lines.append(f"classes without examples: {', '.join(empty[:10])}")
    totals = [n for name in classes if (n := sum(split[name] for split in counts.values()))]
    if totals and max(totals) >= 3 * min(totals):
        lines.append(
            f"the largest class has {max(totals) / min(totals):.1f} times the examples of the smallest; "
            "--set class_weights=balanced may help"
        )
    if (ranks := find_order(classes)) is not None:
        names = " < ".join(classes[ranks.index(place)] for place in range(len(ranks)))
        lines.append(
            f"the classes look ordered ({names}); they are learned as classes, and a mistake by two ranks costs as "
            "much as one by one. To learn numbers instead, label with numbers and add --set task=regression"
        )
    return lines
