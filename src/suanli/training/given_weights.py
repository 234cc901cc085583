"""What given weights bring to a training: fields of its recipe, and the preprocessing that they learned with.

Weights of a network that learns the recipe's task are taken with their network. Those of another become its backbone,
where the recipe's network has one: then neck and head start from nothing, and images have the recipe's size.
"""

from __future__ import annotations

from collections.abc import Mapping

from suanli.core.errors import UsageError
from suanli.core.registry import load
from suanli.core.types import Json, Preprocess, Pretrained, Recipe
from suanli.models import build
from suanli.models.model_folder import refuse_foreign_code
from suanli.training.recipe import change


def bring(
    given: Pretrained, recipe: Recipe, changes: Mapping[str, object], *, kind: str, trust_code: bool
) -> tuple[dict[str, object], Mapping[str, object] | None]:
    """Fields of `recipe`, which the user's `changes` replace, and the fitted preprocessing of a run, which stays unless
    the user changes it. `kind` is that of the data. Raises UsageError for code that isn't trusted, and for weights of
    another backbone than the user names."""
    fields: dict[str, object] = {"weights": given.name}
    if given.model is not None and _is_backbone(given.model, recipe, changes):
        _refuse_another_backbone(given.model, changes)
        fields |= {"model_args.backbone": given.model, "model_args.backbone_args": dict(given.model_args)}
        preprocess: type[Preprocess] = load("preprocess", kind)
        known = {**given.preprocess, **(given.fitted_preprocess or {}).get("settings", {})}
        names = [name for name in preprocess.sizeless_settings if known.get(name) is not None]
        return fields | {f"preprocess.{name}": known[name] for name in names}, None
    fields |= {f"preprocess.{setting}": value for setting, value in given.preprocess.items()}
    if given.model is not None and changes.get("model", given.model) == given.model:
        if not trust_code:
            refuse_foreign_code(given.model, given.file)
        fields |= {"model": given.model, "model_args": dict(given.model_args)}
    changed = any(name.partition(".")[0] == "preprocess" for name in changes)
    return fields, None if changed else given.fitted_preprocess


def _is_backbone(model: str, recipe: Recipe, changes: Mapping[str, Json]) -> bool:
    """Whether the network `model` is one for another task than the recipe's, whose network has a backbone."""
    wanted = change(recipe, {name: changes[name] for name in ("model", "task") if name in changes})
    returned = build.resolve(model).returns
    return bool(build.resolve(wanted.model).backbone) and returned not in ("", load("tasks", wanted.task).learns_from)


def _refuse_another_backbone(model: str, changes: Mapping[str, object]) -> None:
    named = changes.get("model_args.backbone")
    arguments = changes.get("model_args")
    if named is None and isinstance(arguments, Mapping):
        named = arguments.get("backbone")
    if named not in (None, model):
        raise UsageError(
            f"The weights are of {model}, and the backbone is {named}.", fix="Leave the backbone to the weights."
        )
