"""What the data check hands to a task of each target, and what the task says of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from suanli.core.schema import Geometry
from suanli.core.types import Json, Target


class CheckedTarget(NamedTuple):
    """The raw target of an example that can be decoded, for the data check."""

    name: str
    target: Target
    geometry: Geometry


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """What a task says of the targets of a data set."""

    remarks: tuple[str, ...] = ()  # sentences, the most important first
    figures: Mapping[str, Json] = field(default_factory=dict)  # plain values for JSON; `Task.data_sections` shows them
