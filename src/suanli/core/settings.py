"""Reads what a user writes for settings and times."""

from __future__ import annotations

import json
import re

from suanli.core.errors import UsageError
from suanli.core.types import Json


def parse_assignment(assignment: str) -> tuple[str, Json]:
    """("lr", 0.1) from "lr=0.1". The value is read as JSON; what isn't JSON is text. Raises UsageError."""
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set takes field=value, not {assignment!r}.", fix="For example: --set lr=0.01.")
    try:
        return name.strip(), json.loads(text)
    except ValueError:
        return name.strip(), text


_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_duration(text: str | float) -> float:
    """Seconds from "90", "90s", "5m", "1.5h" or a number. Raises UsageError for anything else, and for zero."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-z]*)\s*", str(text))
    if match is None or match[2] not in _SECONDS or not float(match[1]):
        raise UsageError(f"{text!r} is not a time.", fix="Write it like 90s, 5m or 1.5h.")
    return float(match[1]) * _SECONDS[match[2]]
