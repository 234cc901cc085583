"""Images with boxes, from nothing.

Chosen on the 87 validation images of BCCD: records/2026-12-01_epyc-2core_detection.
"""

from suanli.core.types import Budget, Recipe, RecipeChoice, Traits
from suanli.training.recipes._boxes import BOXES


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and not traits.weights else None


RECIPE = RecipeChoice(
    recipe=Recipe(**BOXES.model_dump() | {"name": "boxes"}),
    suits=suits,
    budgets=(
        Budget(changes={"model": "detnet_n", "epochs": 30}),
        Budget(changes={"model": "detnet_n", "epochs": 80}),
        Budget(changes={"model": "detnet_s", "epochs": 100}),
    ),
)
