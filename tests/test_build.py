"""Building networks from names, and loading weights files."""

from __future__ import annotations

import contextlib
import importlib.util
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import suanli.models.build as building
from suanli.core import registry
from suanli.core.errors import UsageError
from suanli.core.types import Json, Recipe
from suanli.data.preprocess._column_types import TableColumn
from suanli.data.preprocess.image import ImagePreprocess
from suanli.data.preprocess.table import TablePreprocess
from suanli.data.preprocess.text import TextPreprocess
from suanli.tasks.classification import Classification

SMALL = ImagePreprocess(height=12, width=16, channels=3)


def classify(classes: int) -> Classification:
    return Classification(classes=tuple(map(str, range(classes))))


PARTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.top = nn.Linear(6, classes)
    def forward(self, x):
        return self.top(self.norm(self.conv(x)).mean((2, 3)))
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    """Writes a module into the current directory and returns its name; removes it afterwards."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(PARTS + textwrap.dedent(code))
        importlib.invalidate_caches()
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("mine"):
            del sys.modules[name]


def recipe(model: str, **args: Json) -> Recipe:
    return Recipe(model=model, model_args=args)


# --- names ---


@pytest.mark.parametrize("name", ["speednet", "resnet18"])
def test_built_in_models_can_be_built(name: str) -> None:
    module = building.build(recipe(name), SMALL, classify(7))
    assert module.training
    assert module(torch.zeros(2, 3, 12, 16)).shape == (2, 7)
    assert building.head_of(module, building.resolve(name)) == building.resolve(name).head


NUMBER = TableColumn(name="a", type="number", quantiles=((0.0, 1.0, 2.0),))
PREPROCESSES = (SMALL, TextPreprocess(vocabulary=("a", "b"), length=8), TablePreprocess(columns=(NUMBER,)))


@pytest.mark.parametrize("name", sorted(registry.names("models")))
def test_built_in_models_on_the_meta_device_differ_only_in_values(name: str) -> None:
    model = building.resolve(name)
    preprocess = next(one for one in PREPROCESSES if one.kind in model.kinds)
    args = building.builder_arguments(recipe(name), preprocess, classify(7))  # a detector takes the same
    outline, whole = building.build_on_meta(model, args), building.construct(model, args)
    if callable(getattr(whole, "initialize", None)):
        assert outline is None
        return
    assert outline is not None
    assert all(tensor.is_meta for tensor in outline.state_dict().values())
    assert shapes(outline) == shapes(whole)


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("line", "on_meta"),
    [
        ("net.conv.bias.data.fill_(3)", True),
        ("net.register_buffer('table', torch.arange(3.0), persistent=False)", True),
        ("net.size = float(torch.ones(2).sum())", False),
        ("net.top = nn.LazyLinear(classes)", False),
        ("net.table = torch.arange(3.0)", False),
        ("net.tables = {'all': [torch.arange(3.0)]}", False),
        ("net.norm.mean = net.norm.running_mean", False),
        ("table = torch.arange(4.0); net.top.register_forward_hook(lambda *a: a[2] + table)", False),
        ("net.initialize = lambda inputs: None", False),
    ],
)
def test_what_needs_values_isnt_built_on_the_meta_device(
    user_module: Callable[[str, str], str], line: str, on_meta: bool
) -> None:
    user_module("mine_o", f"def build(classes):\n    net = Net(classes)\n    {line}\n    return net\n")
    module = building.build(recipe("mine_o:build"), SMALL, classify(4), on_meta=True)
    assert all(p.is_meta == on_meta for p in module.parameters())


def test_model_arguments_reach_the_builder() -> None:
    module = building.build(recipe("speednet", widths=[8, 16]), SMALL, classify(3))
    assert module.get_submodule("head").in_features == 16


def test_an_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="'resnet18'"):
        building.resolve("resnet81")


def test_an_unknown_model_argument_suggests_the_nearest_of_its_own() -> None:
    with pytest.raises(UsageError, match="'widths'") as caught:
        building.build(recipe("speednet", width=[8]), SMALL, classify(3))
    assert "in_channels" not in caught.value.fix


@pytest.mark.parametrize(("name", "args"), [("speednet", {"widths": "wide"}), ("resnet18", {"stem": "huge"})])
def test_an_impossible_model_argument_is_the_users_error(name: str, args: dict[str, Json]) -> None:
    with pytest.raises(UsageError, match="can't be built"):
        building.build(recipe(name, **args), SMALL, classify(3))


def test_a_model_for_other_data_names_those_that_fit() -> None:
    others = [n for n, m in registry.load_all("models").items() if "image" not in m.kinds]
    if not others:
        pytest.skip("every model is for images")
    with pytest.raises(UsageError, match="speednet"):
        building.build(recipe(others[0]), SMALL, classify(3))


# --- the user's functions ---


def test_a_users_function_gets_the_arguments_that_it_names(user_module: Callable[[str, str], str]) -> None:
    user_module("mine_a", "def build(classes, in_channels, wide=1):\n    return Net(classes, in_channels)\n")
    module = building.build(recipe("mine_a:build", wide=3), SMALL, classify(4))
    assert module(torch.zeros(1, 3, 12, 16)).shape == (1, 4)
    assert building.head_of(module, building.resolve("mine_a:build")) == "top"
    args = building.builder_arguments(recipe("mine_a:build", wide=3), SMALL, classify(4))
    assert args == {"classes": 4, "in_channels": 3, "wide": 3}


def test_a_users_function_may_take_everything(user_module: Callable[[str, str], str]) -> None:
    user_module(
        "mine_b",
        "def build(**given):\n    assert tuple(given['image_size']) == (12, 16)\n    return Net(given['classes'])",
    )
    assert building.build(recipe("mine_b:build"), SMALL, classify(4)) is not None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def build(classes):\n    raise KeyError('no such layer')", "KeyError: 'no such layer'"),
        ("def build(classes):\n    return 'a network'", "returned str, not a torch.nn.Module"),
        ("def build(classes):\n    return Net(classes + 1)", r"returned \(2, 6\) .* \(2, 5\)"),
        ("def build(classes):\n    return nn.Flatten()", r"returned \(2, 576\)"),
        ("def build(classes):\n    return Net(classes, 5)", r"fails on a batch of shape \(2, 3, 12, 16\)"),
        ("def build(classes):\n    return nn.LSTM(16, 4)", "fails on a batch"),
        ("build = 3", "no function 'build'"),
        ("", "no function 'build'"),
        ("def build(classes:\n", "Can't import 'mine_c'"),
        ("import not_there", "not_there"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    ],
)
def test_a_users_function_that_is_wrong(user_module: Callable[[str, str], str], code: str, message: str) -> None:
    user_module("mine_c", code)
    with pytest.raises(UsageError, match=message):
        building.build(recipe("mine_c:build"), SMALL, classify(5))


@pytest.mark.parametrize("spec", ["mine_nowhere:build", ":build", "os:", "..:x", "a b:c", "speednet:"])
def test_model_names_that_cant_be_resolved(spec: str) -> None:
    with pytest.raises(UsageError):
        building.resolve(spec)


@given(st.text(max_size=12))
def test_any_text_is_a_model_or_the_users_error(spec: str) -> None:
    with contextlib.suppress(UsageError):
        assert building.resolve(spec).name == spec


def test_the_head_of_a_network_without_layers_is_refused(user_module: Callable[[str, str], str]) -> None:
    user_module("mine_d", "def build(classes):\n    return nn.Flatten()")
    with pytest.raises(UsageError, match="no linear or convolution layer"):
        building.head_of(nn.Flatten(), building.resolve("mine_d:build"))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_the_error_is_a_command() -> None:
    with pytest.raises(UsageError, match="pip install"):
        building.resolve("timm:resnet10t")
