"""The contract of every recipe: its parts exist and fit together, and all data has a recipe that suits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from registered import find_table_rows, forget
from suanli.core import registry
from suanli.core.errors import UsageError
from suanli.core.types import Model, Recipe, RecipeChoice, Traits
from suanli.training import recipes, unfreezing
from suanli.training.augment import compose
from suanli.training.recipe import choose_by_traits

RECIPES: dict[str, RecipeChoice] = registry.load_all("recipes")
MODELS: dict[str, Model] = registry.load_all("models")
every = pytest.mark.parametrize("name", RECIPES)

SIZES = (1, 8, 28, 32, 63, 64, 65, 96, 160, 224, 512)  # px, on both sides of what recipes tell apart
EXAMPLES = (2, 500, 9_999, 10_000, 19_999, 20_000, 2_000_000)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "image": [(channels, size, size) for channels in (1, 3, 4) for size in SIZES] + [(1, 64, 65), (3, 512, 32)],
    "text": [(64,)],
}


def all_traits(kind: str, annotation: str = "class") -> Iterator[Traits]:
    """All data that a recipe might be for; a new kind can have an entry in SHAPES."""
    built_in = [name for name, model in MODELS.items() if kind in model.kinds]
    for shape, examples, weights, model in itertools.product(
        SHAPES.get(kind, [(64,)]), EXAMPLES, (False, True), (None, "mine:net", "timm:resnet10t", *built_in)
    ):
        yield Traits(
            kind=kind,
            annotation=annotation,
            input_shape=shape,
            examples=examples,
            classes=10,
            weights=weights,
            model=model,
        )


@every
def test_has_the_name_of_its_file(name: str) -> None:
    assert RECIPES[name].recipe.name == name


@every
def test_survives_json_with_its_digest(name: str) -> None:
    recipe = RECIPES[name].recipe
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again.digest == recipe.digest


@every
def test_its_parts_exist_and_fit_together(name: str) -> None:
    recipe = RECIPES[name].recipe
    model = MODELS[recipe.model]
    task = registry.load("tasks", recipe.task).of((), recipe.task_args)
    suits = RECIPES[name].suits
    kinds = [
        kind for kind in model.kinds if any(suits(traits) is not None for traits in all_traits(kind, task.annotation))
    ]
    assert kinds, "the recipe suits no data that its model takes"
    for kind in kinds:
        compose(recipe.augment, registry.load("preprocess", kind).roles, task.targets)
    net = torch.nn.ModuleDict({"body": torch.nn.Conv2d(3, 4, 3), "head": torch.nn.Linear(4, 2)})
    registry.load("optimizers", recipe.optimizer).build(
        list(net.named_parameters()),
        head="head",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.backbone_lr_scale,
        **recipe.optimizer_args,
    )


@every
def test_the_warm_up_is_shorter_than_the_run(name: str) -> None:
    recipe = RECIPES[name].recipe
    assert recipe.warmup_epochs < unfreezing.with_all_layers(recipe).epochs / 2


DATA = sorted(
    {
        (kind, registry.load("tasks", c.recipe.task).annotation)
        for c in RECIPES.values()
        for kind in MODELS[c.recipe.model].kinds
    }
)


@pytest.mark.parametrize(("kind", "annotation"), DATA)
def test_one_recipe_suits_any_data_best(kind: str, annotation: str) -> None:
    for traits in all_traits(kind, annotation):
        choose_by_traits(traits)  # raises an error if none suits, or several suit equally


@pytest.mark.parametrize("annotation", [annotation for kind, annotation in DATA if kind == "image"])
def test_weights_and_model_are_respected(annotation: str) -> None:
    for traits in all_traits("image", annotation):
        recipe = choose_by_traits(traits)
        if traits.weights:
            assert recipe.backbone_lr_scale < 1, traits
        elif traits.model in MODELS and MODELS[traits.model].returns != MODELS[recipe.model].returns:
            continue  # refused: it can't learn such targets
        elif traits.model is not None:
            normalized = bool(recipe.optimizer_args.get("normalize_filters"))
            assert normalized == (traits.model == "speednet"), traits  # it would change what other networks compute


def test_small_grey_images_are_never_mirrored() -> None:
    for traits in all_traits("image"):
        if traits.input_shape[0] == 1 and min(traits.input_shape[1:]) <= 64:
            assert not any("flip" in augment for augment in choose_by_traits(traits).augment), traits


def test_few_examples_still_get_enough_steps() -> None:
    for traits in all_traits("image"):
        if traits.examples < 10_000:
            recipe = choose_by_traits(traits)
            assert recipe.batch_size <= 128, traits
            assert unfreezing.with_all_layers(recipe).epochs >= 8, traits


def test_recipes_that_suit_equally_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(recipes.__path__[0], "text.py").read_text(encoding="utf-8")
    (tmp_path / "text_too.py").write_text(shipped.replace('"name": "text"', '"name": "text_too"'), encoding="utf-8")
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    registry.names.cache_clear()
    traits = Traits(
        kind="text",
        annotation="class",
        input_shape=(64,),
        examples=50_000,
        classes=2,
        weights=False,
        model=None,
    )
    try:
        with pytest.raises(UsageError, match="text and text_too suit"):
            choose_by_traits(traits)
    finally:
        monkeypatch.undo()
        forget("recipes", ["text_too"])


@every
def test_the_docs_have_a_row_for_it(name: str) -> None:
    assert name in find_table_rows("recipes.md"), f"add a row for {name} to docs/recipes.md"
