"""From the JSON of a file to a dataclass, with what is missing left out.

A file may come from another version or from an interrupted run. A value that is missing, null or impossible (NaN where
a number must be finite, a negative count) isn't there: its field takes its default or None, and a record that needs it
isn't there either. A value of the wrong type is damage.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from suanli.core.errors import DamagedFile

FIX = "Restore it, or make the run again."
IMPOSSIBLE = {
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    *("finite_number", "int_from_float", "int_parsing_size"),
}

Kind = TypeVar("Kind")
Place = tuple[int | str, ...]  # the keys and positions that lead to a value


def parse_record(kind: type[Kind], value: Any, source: str) -> Kind | None:
    """`value`, which is changed, as a `kind`; None where it isn't there. `source` names the file.

    Raises DamagedFile.
    """
    nulls: set[tuple[int, int | str]] = set()  # where None was put for a missing value: container's id and key
    while True:
        try:
            record: Kind = _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # every class is hashable
            return record
        except ValidationError as error:
            absent: set[Place] = set()
            for details in error.errors(include_url=False):
                place = details["loc"]
                holder = _at(value, place[:-1])
                if details["type"] == "missing" and isinstance(holder, dict):
                    holder[place[-1]] = None
                    nulls.add((id(holder), place[-1]))
                elif details["input"] is None or details["type"] in IMPOSSIBLE:
                    needed = place and (id(holder), place[-1]) in nulls
                    absent.add(place[:-1] if needed else place)
                else:
                    field = ".".join(map(str, place)) or "the file"
                    message = f"{source} can't be used, at {field}: {details['msg']}."
                    raise DamagedFile(message, fix=FIX) from error
        if () in absent:
            return None
        for place in sorted(absent, reverse=True):  # from the last of a list, so that positions hold
            del _at(value, place[:-1])[place[-1]]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value
