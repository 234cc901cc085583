"""What a person or a client gets for one input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LISTS = {"boxes": "boxes"}  # the value of an answer of this kind that is a list, of whose entries a table has rows
BOX_COLUMNS = ("label", "probability", "left", "top", "right", "bottom")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a person or a client gets for one input.

    Page, report, tables and drawn images read these by their values: "classes" by `label`, `probability` and
    `probabilities` (by class); "labels" by `labels` and `probabilities`; "boxes" by `boxes`, each with a `label`, a
    `probability` and a `box` (left, top, right, bottom in the input's pixels). A target has no probabilities. Any other
    is drawn as its text.

    Where an answer was compared with the target, each entry of both lists has a `verdict`, "right" or what is wrong
    with it ("missed", "duplicate", …), or None where it doesn't count.
    """

    kind: str  # "classes", "labels", "value", "boxes", "mask", "text", "match", "tensors"
    text: str  # one line for people
    # For JSON, in the user's own coordinates and names. The same keys for all answers of a task, none of them "name" or
    # "error".
    values: Mapping[str, Any]
    columns: tuple[str, ...] = ()  # the values that a table (CSV) has room for, or those of an entry of its list

    def rows(self) -> list[Mapping[str, Any]] | None:
        """A row for each entry of its list, for a table; None: it has no list, and is a row itself."""
        if self.kind not in LISTS:
            return None
        return [_flatten(entry) for entry in self.values.get(LISTS[self.kind]) or ()]


def _flatten(entry: Mapping[str, Any]) -> dict[str, Any]:
    """With the sides of a box as values of their own."""
    sides = dict(zip(BOX_COLUMNS[2:], entry.get("box") or (), strict=False))
    return {**{name: value for name, value in entry.items() if name != "box"}, **sides}
