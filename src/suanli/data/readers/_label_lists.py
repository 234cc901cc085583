"""Finds out whether the cells of a label column hold several labels each, and how they are separated.

A comma alone proves nothing: "New York, USA" is one name. What does is that the parts are labels themselves: they occur
alone, too, or in several combinations.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

LISTS = "list"  # instead of a separator: each cell is a list as JSON or Python writes it
SEPARATORS = ("|", ";", ",", " ")  # the surest first
PROVEN = 0.9  # of the parts, counted as often as they occur, must be labels themselves
_NUMBERS = re.compile(r"[-+]?\d+[.,]\d*|[-+]?[\d.,]+")
_FLAGS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
MOST_WORDS = 100  # different labels that a space may separate: more are words of texts
_AS_CLASSES = "--set task=classification reads each as one class"


def find_separator(labels: Sequence[str], *, wanted: bool = False) -> str | None:
    """What separates the labels in a cell, or LISTS; None: each cell is one label. Where several labels are `wanted`,
    without proof."""
    cells = Counter(label for label in labels if label)
    if cells and all(_parse_list(cell) is not None for cell in cells):
        return LISTS
    found = [separator for separator in SEPARATORS if any(separator in cell for cell in cells)]
    if wanted:
        return found[0] if found else None
    return next((separator for separator in found if _is_proven(cells, separator)), None)


def split_labels(cell: str, separator: str | None) -> tuple[str, ...]:
    """The labels in a cell, each once, in the order of the cell."""
    if separator == LISTS:
        return tuple(dict.fromkeys(_parse_list(cell) or ()))
    parts = [cell] if separator is None else cell.split(separator)
    return tuple(dict.fromkeys(part for one in parts if (part := one.strip())))


def parse_flag(cell: str) -> int | None:
    """0 or 1; None: neither."""
    return _FLAGS.get(cell.strip().casefold())


def describe_separator(separator: str | None) -> str:
    """What is said to the user."""
    how = {None: "", LISTS: ", each cell is a list"}.get(separator, f', separated by "{separator}"')
    return f"label column read as several labels{how}; {_AS_CLASSES}"


def _parse_list(cell: str) -> list[str] | None:
    """None: it isn't a list of texts or numbers."""
    if not (cell.startswith("[") and cell.endswith("]")) or len(cell) > 100_000:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            values = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(values, list) and all(isinstance(value, str | int | float) for value in values):
            return [str(value).strip() for value in values]
    return None


def _is_proven(cells: Counter[str], separator: str) -> bool:
    combinations: dict[str, set[frozenset[str]]] = defaultdict(set)
    occurrences: Counter[str] = Counter()
    lengths: set[int] = set()
    for cell, count in cells.items():
        parts = split_labels(cell, separator)
        lengths.add(len(parts))
        for part in parts if len(parts) > 1 else ():
            occurrences[part] += count
            combinations[part].add(frozenset(parts))
    if not occurrences or _are_decimals(cells, separator) or (separator == " " and len(occurrences) > MOST_WORDS):
        return False
    alone = {part for part in occurrences if part in cells}
    repeated = {part for part, sets in combinations.items() if len(sets) > 1}
    if separator == " ":  # also stands between the words of one name: "light blue" beside "dark blue"
        own = alone if len(lengths) < 3 else alone | repeated
    else:
        own = alone | repeated
    return sum(occurrences[part] for part in own) >= PROVEN * occurrences.total()


def _are_decimals(cells: Counter[str], separator: str) -> bool:
    """Whether they are numbers with a decimal comma, or with commas between thousands."""
    return separator == "," and all(map(_NUMBERS.fullmatch, cells)) and all(cell.count(",") < 2 for cell in cells)
