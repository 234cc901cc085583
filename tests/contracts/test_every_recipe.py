"""The contract of every recipe: its parts exist and fit together, and all data has a recipe that suits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core import registry
from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.augment import compose

RECIPES: dict[str, RecipeChoice] = registry.load_all("recipes")
every = pytest.mark.parametrize("name", RECIPES)

images = st.builds(
    Traits,
    kind=st.just("image"),
    input_shape=st.tuples(st.sampled_from([1, 3, 4]), st.integers(1, 600), st.integers(1, 600)),
    examples=st.integers(2, 2_000_000),
    classes=st.integers(2, 1000),
    weights=st.booleans(),
    model=st.sampled_from([None, "mine:net", "timm:resnet10t", "speednet", "resnet18", "alexnet", "vit_tiny"]),
)


def chosen(traits: Traits) -> Recipe:
    scores = {name: choice.suits(traits) for name, choice in RECIPES.items()}
    suitable = {name: score for name, score in scores.items() if score is not None}
    best = [name for name, score in suitable.items() if score == max(suitable.values())]
    assert len(best) == 1, f"{best} suit {traits} equally"
    return RECIPES[best[0]].recipe


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
    model = registry.load("models", recipe.model)
    registry.load("tasks", recipe.task)
    kinds = [kind for kind in model.kinds if RECIPES[name].suits(example(kind, recipe)) is not None]
    assert kinds, "the recipe suits no data that its model takes"
    for kind in kinds:
        compose(recipe.augment, kind)
    net = torch.nn.ModuleDict({"body": torch.nn.Conv2d(3, 4, 3), "head": torch.nn.Linear(4, 2)})
    registry.load("optimizers", recipe.optimizer).build(
        list(net.named_parameters()),
        head="head",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.backbone_lr_scale,
        **recipe.optimizer_args,
    )


def example(kind: str, recipe: Recipe) -> Traits:
    """Traits of data that the recipe suits, chosen from a few."""
    for shape in ((3, 32, 32), (1, 8, 8), (3, 224, 224), (64,)):
        for examples in (500, 100_000):
            for weights in (False, True):
                for model in (None, recipe.model, "mine:net"):
                    traits = Traits(
                        kind=kind,
                        input_shape=shape,
                        examples=examples,
                        classes=10,
                        weights=weights,
                        model=model,
                    )
                    if len(shape) == (3 if kind == "image" else 1) and RECIPES[recipe.name].suits(traits) is not None:
                        return traits
    raise AssertionError(f"{recipe.name} suits no {kind} data")


@every
def test_the_warm_up_is_shorter_than_the_run(name: str) -> None:
    recipe = RECIPES[name].recipe
    assert recipe.warmup_epochs < recipe.epochs / 2


@given(images)
def test_one_recipe_suits_any_images_best(traits: Traits) -> None:
    recipe = chosen(traits)
    if traits.weights:
        assert recipe.backbone_lr_scale < 1
    elif traits.model is not None:
        normalized = bool(recipe.optimizer_args.get("normalize_filters"))
        assert normalized == (traits.model == "speednet")  # it would change what other networks compute


@given(images)
def test_small_grey_images_are_never_mirrored(traits: Traits) -> None:
    if traits.input_shape[0] == 1 and min(traits.input_shape[1:]) <= 64:
        assert not any("flip" in augment for augment in chosen(traits).augment)


@given(images, st.integers(2, 9_999))
def test_few_examples_still_get_enough_steps(traits: Traits, examples: int) -> None:
    recipe = chosen(Traits(**{**vars(traits), "examples": examples}))
    assert recipe.batch_size <= 128
    assert recipe.epochs >= 8
