"""Reads the augmentations of a recipe and applies them as one.

Each is written as the name of a file in `augments/`, with settings in the form of a Python call: "flip",
"crop(padding=2)", "resized_crop(scale=(0.5, 1))". Only literals are read; nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from suanli.core import registry
from suanli.core.errors import UsageError, unknown
from suanli.core.types import Augmentation, Batch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AugmentationPipeline:
    """Applies augmentations in order. Without parts it changes nothing."""

    parts: tuple[Augmentation, ...] = ()

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        for part in self.parts:
            batch = part(batch, generator)
        return batch

    def views(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Every combination of the parts' views, `inputs` first. Of several parts of one class only the first counts:
        two flips don't make four views."""
        views = [inputs]
        seen: set[type[Augmentation]] = set()
        for part in self.parts:
            if type(part) not in seen:
                seen.add(type(part))
                views = [view for before in views for view in part.views(before)]
        return views


def compose(specs: Sequence[str], kind: str) -> AugmentationPipeline:
    """The augmentations of a recipe for one kind of data ("image", "text").

    Raises UsageError for one that can't be read and for one that can't change such inputs.
    """
    parts = tuple(parse(spec) for spec in specs)
    for spec, part in zip(specs, parts, strict=True):
        if kind not in part.kinds:
            others = [name for name, other in registry.load_all("augments").items() if kind in other.kinds]
            allowed = f"use one of {', '.join(others)}" if others else f"there is none for {kind} yet"
            raise UsageError(
                f"Augmentation {spec!r} is for {' or '.join(part.kinds)} data, and this is {kind}.",
                fix=f"Leave it out; {allowed}.",
            )
    return AugmentationPipeline(parts=parts)


def parse(spec: str) -> Augmentation:
    """One augmentation from its text. Raises UsageError."""
    name, settings = _parse_call(spec)
    augment: type[Augmentation] = registry.load("augments", name)
    allowed = [field.name for field in fields(augment)]  # type: ignore[arg-type]  # all are dataclasses
    for setting in settings:
        if setting not in allowed:
            raise unknown(f"setting of augmentation {name}", setting, allowed)
    return augment(**settings)


def _parse_call(spec: str) -> tuple[str, dict[str, object]]:
    """Name and settings of "name" or "name(setting=value, …)"."""
    malformed = UsageError(f"Augmentation {spec!r} can't be read.", fix='Write it like "flip" or "crop(padding=2)".')
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise malformed from error
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
        raise malformed
    settings: dict[str, object] = {}
    for keyword in tree.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise malformed from error
        if keyword.arg is None or keyword.arg in settings:
            raise malformed
        settings[keyword.arg] = value
    return tree.func.id, settings
