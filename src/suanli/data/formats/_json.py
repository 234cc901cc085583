"""Reads JSON of unknown origin, and names what in it is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

from suanli.core.types import Json
from suanli.data.annotated import Files


def read_json(files: Files, path: str) -> Json:
    """Raises DataError, with the line, for what is no JSON: also for NaN, and for too many brackets."""
    try:
        return json.loads(files.text(path), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise files.error(path, f"is no JSON that can be read: {error.msg}", line=error.lineno) from error
    except RecursionError as error:
        raise files.error(path, "has too many brackets inside of each other") from error
    except ValueError as error:  # also a whole number of thousands of digits
        raise files.error(path, f"is no JSON that can be read: {error}") from error


def entries(value: Json, key: str) -> Sequence[Json]:
    """The list under a key of an object. Raises ValueError where there is none."""
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, list):
        raise ValueError(f"has no list {key!r}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
