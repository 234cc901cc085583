"""Reads the augmentations of a recipe and applies them as one.

Each is written as the name of a file in `augments/`, with settings in the form of a Python call: "flip",
"crop(padding=2)", "resized_crop(scale=(0.5, 1))". Only literals are read; nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from suanli.core import registry
from suanli.core.errors import UsageError, unknown
from suanli.core.schema import Schema, Tensors
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

    @property
    def neighbours(self) -> int:
        """The largest group of examples that a part mixes."""
        return max([1, *(part.neighbours for part in self.parts)])

    def views(self, inputs: Tensors) -> list[Tensors]:
        """Every combination of the parts' views, `inputs` first. Of several parts of one class only the first counts:
        two flips don't make four views."""
        views = [inputs]
        seen: set[type[Augmentation]] = set()
        for part in self.parts:
            if type(part) not in seen:
                seen.add(type(part))
                views = [{**one, part.input: view} for one in views for view in part.views(one[part.input])]
        return views


def compose(specs: Sequence[str], inputs: Collection[str], targets: Schema) -> AugmentationPipeline:
    """The augmentations of a recipe, for data whose inputs have these roles.

    Raises UsageError for one that can't be read, that has nothing to change, and that would make the targets wrong.
    """
    parts = tuple(parse(spec) for spec in specs)
    kept = {column.role for column in targets.values()}
    for spec, part in zip(specs, parts, strict=True):
        if part.input in inputs and part.keeps >= kept:
            continue
        others = registry.load_all("augments").items()
        fitting = [name for name, other in others if other.input in inputs and other.keeps >= kept]
        problem = (
            f"changes {part.input} inputs, and this data has {', '.join(inputs)}"
            if part.input not in inputs
            else f"would make {', '.join(sorted(kept - part.keeps))} targets wrong"
        )
        raise UsageError(
            f"Augmentation {spec!r} {problem}.",
            fix=f"Leave it out; use one of {', '.join(fitting)}." if fitting else "Leave it out; none fits this data.",
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
