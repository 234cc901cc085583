"""What every model promises, for every kind of data that it names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from suanli.core import registry
from suanli.core.members import flatten_members
from suanli.core.types import Model
from suanli.models.backbone import HeadInputs
from suanli.models.build import recognize

MODELS: dict[str, Model] = registry.load_all("models")
IMAGES: list[dict[str, Any]] = [
    {"in_channels": 3, "image_size": (32, 32)},
    {"in_channels": 1, "image_size": (8, 8)},
    {"in_channels": 4, "image_size": (33, 65)},
    {"in_channels": 3, "image_size": (97, 71)},
    {"in_channels": 1, "image_size": (16, 40)},
]
# Of networks that can have any size, a small one.
SMALL: dict[str, dict[str, Any]] = {
    "convnext": {"depths": [1, 1, 2, 1], "widths": [8, 16, 24, 32]},
    "detnet_n": {"width": 8, "depths": [1, 1, 1, 1], "neck": 16},
    "tabm": {"members": 3, "width": 8, "bins": 4, "embedding": 2},
    "resnet": {"depths": [1, 1, 1, 1]},
    "vit": {"width": 64, "depth": 2, "registers": 2, "layer_scale": True},
}
TEXTS: list[dict[str, Any]] = [{"vocabulary_size": 50, "length": 24}, {"vocabulary_size": 9, "length": 3}]
STEPS = [i / 16 for i in range(17)]
TABLES: list[dict[str, Any]] = [
    {"numbers": 3, "cardinalities": [4, 9], "quantiles": [STEPS, [0.0] * 9 + [1e6] * 8, [5.0] * 17]},
    {"numbers": 1, "cardinalities": [], "quantiles": [STEPS]},
    {"numbers": 0, "cardinalities": [3], "quantiles": []},
]
ARGUMENTS = {"image": IMAGES, "text": TEXTS, "table": TABLES}
FIRST_OF_CODE = {model.build.__code__: name for name, model in reversed(MODELS.items())}  # sizes share their code


def inputs_of(name: str, model: Model) -> list[dict[str, Any]]:
    """All for the first of the networks that one function builds, two for the others."""
    inputs = [args for kind in model.kinds for args in ARGUMENTS[kind]]
    return inputs if FIRST_OF_CODE[model.build.__code__] == name else inputs[:2]


CASES = [
    pytest.param(model, args, id=f"{name}-{'-'.join(map(str, args.values()))}")
    for name, model in MODELS.items()
    for args in inputs_of(name, model)
]
FIRST = [pytest.param(m, ARGUMENTS[m.kinds[0]][0], id=name) for name, m in MODELS.items()]


def build(model: Model, args: dict[str, Any], classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return model.build(classes=classes, **args, **SMALL.get(model.name, {}))


Inputs = tuple[torch.Tensor, ...]


def outputs_of(module: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What the network returns; of a classifier, its logits alone."""
    returned = module(*inputs)
    return returned if isinstance(returned, tuple) else (returned,)


def batch(args: dict[str, Any], count: int) -> Inputs:
    generator = torch.Generator().manual_seed(count)
    if "image_size" in args:
        return (torch.randn(count, args["in_channels"], *args["image_size"], generator=generator),)
    if "length" in args:
        return (torch.randint(args["vocabulary_size"], (count, args["length"]), generator=generator),)
    numbers = torch.randn(count, args["numbers"], generator=generator)
    numbers[0, :1] = torch.nan
    codes = [torch.randint(limit, (count,), generator=generator) for limit in args["cardinalities"]]
    return (*([numbers] if args["numbers"] else []), *([torch.stack(codes, 1)] if codes else []))


@pytest.mark.parametrize("name", MODELS)
def test_is_called_as_its_file_and_names_a_source(name: str) -> None:
    assert MODELS[name].name == name
    assert MODELS[name].source
    assert set(MODELS[name].kinds) <= set(registry.names("preprocess"))


@pytest.mark.parametrize(("model", "args"), CASES)
def test_answers_a_batch_as_it_answers_one(model: Model, args: dict[str, Any]) -> None:
    module = build(model, args).eval()
    inputs = batch(args, 3)
    with torch.inference_mode():
        with HeadInputs(module, model.head) as seen:
            together = outputs_of(module, inputs)
        alone = outputs_of(module, tuple(tensor[:1] for tensor in inputs))
    logits = together[-1 if model.returns == "scores" else 1]
    assert logits.shape[0] == 3
    assert logits.shape[-1] == 5
    assert seen.vectors(3).ndim == 2  # an embedding of each
    for one, of_batch in zip(alone, together, strict=True):
        torch.testing.assert_close(one, of_batch[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "args"), CASES[1::2])
def test_every_trainable_parameter_gets_a_finite_gradient(model: Model, args: dict[str, Any]) -> None:
    module = build(model, args).train()
    inputs = batch(args, 4)
    if callable(initialize := getattr(module, "initialize", None)):
        initialize(*inputs)
    outputs = outputs_of(module, inputs)
    if model.returns == "scores":
        logits, target, _ = flatten_members(outputs[0], torch.tensor([0, 1, 2, 3]))
        nn.functional.cross_entropy(logits, target).backward()
    else:
        sum(output.square().mean() for output in outputs).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("model", "args"), FIRST)
def test_the_same_seed_builds_the_same_network(model: Model, args: dict[str, Any]) -> None:
    one, same, other = (build(model, args, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("model", "args"), FIRST)
@pytest.mark.parametrize("classes", [2, 1000])
def test_the_head_is_where_the_model_says(model: Model, args: dict[str, Any], classes: int) -> None:
    with torch.device("meta"):  # shapes need no values
        module = build(model, args, classes)
    head = module.get_submodule(model.head)
    with torch.inference_mode():
        outputs = outputs_of(module.eval(), tuple(tensor.to("meta") for tensor in batch(args, 1)))
    if model.returns == "scores" and outputs[0].ndim == 3:  # of each member
        assert head.bias.shape == outputs[0].shape[1:] == (outputs[0].shape[1], classes)
    elif model.returns == "scores":
        assert isinstance(head, nn.Linear | nn.Conv2d)
        assert len(head.weight) == classes
        assert outputs[0].shape == (1, classes)
    else:
        assert outputs[1].shape[2] == classes


@pytest.mark.parametrize(("model", "args"), FIRST)
def test_weights_survive_safetensors(model: Model, args: dict[str, Any], tmp_path: Path) -> None:
    module = build(model, args)
    other = copy.deepcopy(module)
    for tensor in other.state_dict().values():
        tensor.zero_()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")  # refuses tensors that share memory
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    inputs = batch(args, 2)
    with torch.inference_mode():
        pairs = zip(outputs_of(module.eval(), inputs), outputs_of(other.eval(), inputs), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


READERS = [pytest.param(model, id=name) for name, model in MODELS.items() if model.recognize is not Model.recognize]


@pytest.mark.parametrize("model", READERS)
def test_recognizes_its_own_tensors_and_leaves_their_names(model: Model) -> None:
    with torch.device("meta"):
        state = build(model, {"in_channels": 1, "image_size": (224, 224)}).state_dict()
    assert model.convert(dict(state)).keys() == state.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = recognize(shapes)
    assert found is not None
    assert found[0] == model.name
    with torch.device("meta"):
        again = model.build(classes=5, in_channels=1, image_size=(224, 224), **found[1]).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == shapes


@pytest.mark.parametrize("model", [m for m in MODELS.values() if "image" in m.kinds], ids=lambda model: model.name)
def test_feature_maps_are_at_strides_4_to_32(model: Model) -> None:
    with torch.device("meta"):
        module = build(model, {"in_channels": 3, "image_size": (128, 96)})
        images = torch.zeros(2, 3, 128, 96)
    if not callable(feature_maps := getattr(module, "feature_maps", None)):
        pytest.skip("this network has none")
    assert [tuple(maps.shape[2:]) for maps in feature_maps(images)] == [(32, 24), (16, 12), (8, 6), (4, 3)]
