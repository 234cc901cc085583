"""The roofline: operations and bytes are exact for any model, and no hook or setting is left behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from suanli.compute.flops import flops
from suanli.compute.roofline import measure_layers
from suanli.compute.roofline_records import Layer, Roofline
from suanli.core.types import Device

CPU = Device(name="a CPU", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32",))
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def layers(model: nn.Module, *inputs: Any, mode: str = "training", **options: Any) -> dict[str, Layer]:
    model.train(mode == "training")
    with MODES[mode]():
        measured = measure_layers(model, lambda: model(*inputs, **options), device=CPU, passes=1)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    return {one.name: one for one in measured}


# --- operations -----------------------------------------------------------------------------

B, L, D, H = 3, 5, 8, 16  # inputs, positions, features, hidden features
SEQUENCE, PICTURES = torch.zeros(B, L, D), torch.zeros(B, 4, 6, 7)
ATTENTION = 2 * B * L * D * D * 4 + 2 * B * L * L * D * 2  # four projections; scores, and their sums of values
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...], int]] = {
    "linear": (lambda: nn.Linear(D, H), (SEQUENCE,), 2 * B * L * D * H),
    "linear of one input": (lambda: nn.Linear(D, H), (torch.zeros(D),), 2 * D * H),
    "convolution": (lambda: nn.Conv2d(4, 8, 3), (PICTURES,), 2 * B * 8 * (4 * 5) * 4 * 9),
    "padded, with strides": (
        lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
        (PICTURES,),
        2 * B * 8 * (3 * 4) * 4 * 9,
    ),
    "in groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (PICTURES,), 2 * B * 8 * (4 * 5) * 2 * 9),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (PICTURES,), 2 * B * 4 * (4 * 5) * 9),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), (PICTURES,), 2 * B * (6 * 7) * 4 * 8 * 9),
    "attention": (lambda: Attention(D, 2), (SEQUENCE,), ATTENTION),
    "multi-head attention": (
        lambda: nn.MultiheadAttention(D, 2, batch_first=True),
        (SEQUENCE, SEQUENCE, SEQUENCE),
        ATTENTION,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, H, batch_first=True),
        (SEQUENCE,),
        ATTENTION + 2 * 2 * B * L * D * H,
    ),
    "lstm": (lambda: nn.LSTM(D, H), (SEQUENCE,), 2 * B * L * 4 * H * (D + H)),
    "lstm, both ways, two layers": (
        lambda: nn.LSTM(D, H, num_layers=2, bidirectional=True),
        (SEQUENCE,),
        2 * B * L * 2 * 4 * H * ((D + H) + (2 * H + H)),
    ),
    "gru": (lambda: nn.GRU(D, H), (SEQUENCE,), 2 * B * L * 3 * H * (D + H)),
    "a vector": (lambda: Pooling(D), (SEQUENCE,), 2 * B * L * D),
    "no products": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (PICTURES,), 0),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return out


class Pooling(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.query


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_operations_are_exact_in_every_mode(name: str, mode: str) -> None:
    build, inputs, expected = CASES[name]
    model = build().train(mode == "training")
    with MODES[mode]():
        assert flops(lambda: model(*inputs)) == expected
    assert sum(layer.flops for layer in layers(model, *inputs, mode=mode).values()) == expected


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_operations_of_a_linear_layer(batch: int, width: int, out: int) -> None:
    model, inputs = nn.Linear(width, out), torch.zeros(batch, width)
    assert flops(lambda: model(inputs)) == 2 * batch * width * out


def test_a_backward_pass_counts_twice_a_forward_pass() -> None:
    model, inputs = nn.Linear(D, H), torch.zeros(B, D, requires_grad=True)
    assert flops(lambda: model(inputs).sum().backward()) == 3 * 2 * B * D * H
    lstm, sequence = nn.LSTM(D, H), SEQUENCE.clone().requires_grad_()
    assert flops(lambda: lstm(sequence)[0].sum().backward()) == 3 * 2 * B * L * 4 * H * (D + H)


def test_a_backward_pass_of_attention_computes_the_scores_again() -> None:
    x = torch.zeros(B, 2, L, D, requires_grad=True)
    product = 2 * B * 2 * L * L * D
    assert flops(lambda: F.scaled_dot_product_attention(x, x, x).sum().backward()) == 7 * product


def test_the_longer_of_two_branches_counts() -> None:
    inputs, once = torch.randn(4, 8), torch.nn.Linear(8, 8)
    branches = (once, lambda x: once(once(x)))

    def work() -> None:
        torch.ops.higher_order.cond(torch.tensor(True), *branches, (inputs,))

    with torch.no_grad():
        assert flops(work) == 2 * 2 * 4 * 8 * 8


def test_counting_changes_no_setting() -> None:
    def fail() -> None:
        raise KeyError

    for was in (True, False):
        torch.backends.mha.set_fastpath_enabled(was)
        try:
            flops(lambda: None)
            with pytest.raises(KeyError):
                flops(fail)
            assert torch.backends.mha.get_fastpath_enabled() == was
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


# --- bytes ----------------------------------------------------------------------------------


def test_bytes_are_inputs_weights_and_outputs() -> None:
    linear = layers(nn.Linear(D, H), torch.zeros(B, D))["(model)"]
    assert linear.bytes == 4 * (B * D + (D * H + H) + B * H)
    conv = layers(nn.Conv2d(4, 8, 3, bias=False), PICTURES)["(model)"]
    assert conv.bytes == 4 * (B * 4 * 6 * 7 + 8 * 4 * 9 + B * 8 * 4 * 5)
    norm = layers(nn.BatchNorm2d(4), PICTURES)["(model)"]
    assert norm.bytes == 4 * (2 * PICTURES.numel() + 2 * 4)


def test_autocast_moves_half_the_bytes() -> None:
    model = nn.Linear(D, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layers(model, torch.zeros(B, D))["(model)"]
    assert narrow.bytes == 2 * (B * D + (D * H + H) + B * H)


def test_an_embedding_reads_only_the_rows_that_are_looked_up() -> None:
    tokens = torch.zeros(B, L, dtype=torch.int64)
    by_name = layers(nn.Embedding(1000, D), tokens)["(model)"]
    assert by_name.bytes == 8 * B * L + 4 * (B * L * D) * 2
    small = layers(nn.Embedding(2, D), tokens)["(model)"]
    assert small.bytes == 8 * B * L + 4 * (2 * D + B * L * D)


def test_a_tensor_passed_twice_is_read_once() -> None:
    by_name = layers(nn.MultiheadAttention(D, 2, batch_first=True), SEQUENCE, SEQUENCE, SEQUENCE, need_weights=False)
    assert by_name["(model)"].bytes == 4 * (2 * SEQUENCE.numel() + 4 * D * D + 4 * D)


# --- any model ------------------------------------------------------------------------------


class Shared(nn.Module):
    """One module under two names, called three times, and operations outside of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.again = self.first
        self.out = nn.Linear(D, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.first(self.first(x)))
        out: torch.Tensor = self.out(torch.relu(x @ x.T @ x))
        return out


def test_a_shared_module_is_one_layer_with_all_its_calls() -> None:
    by_name = layers(Shared(), torch.zeros(B, D))
    assert set(by_name) == {"first", "out", "(model)"}
    assert by_name["first"].flops == 3 * 2 * B * D * D
    assert by_name["first"].bytes == 3 * 4 * (B * D + D * D + D + B * D)
    assert by_name["(model)"].flops == 2 * 2 * B * B * D  # its own products
    assert by_name["(model)"].kind == "Shared"


@dataclass
class Answer:
    logits: torch.Tensor
    other: list[torch.Tensor]


class Bag(nn.Module):
    def forward(self, bag: dict[str, Any], *, scale: torch.Tensor) -> Answer:
        return Answer(logits=bag["x"] * scale, other=[bag["more"][0] + 1])


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = Bag()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.bag({"x": x, "more": (x + 1, None, "text")}, scale=torch.ones(1)).logits, None


def test_tensors_are_found_in_all_containers() -> None:
    by_name = layers(Nested(), torch.zeros(B, D))
    assert by_name["bag"].bytes == 4 * (4 * B * D + 1)
    assert by_name["(model)"].bytes is None  # a container without products of its own


class Tries(nn.Module):
    """Continues after a layer has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.broken, self.good = nn.Linear(D + 1, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            x = self.broken(x)
        except RuntimeError:
            x = self.good(x)
        return x


def test_a_layer_that_fails_does_not_shift_the_others() -> None:
    by_name = layers(Tries(), torch.zeros(B, D))
    assert by_name["good"].flops == 2 * B * D * D
    assert by_name["broken"].flops == by_name["(model)"].flops == 0


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D + 1, D))
    with pytest.raises(RuntimeError, match="shapes"):
        measure_layers(model, lambda: model(torch.zeros(B, D)), device=CPU)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_pass_may_call_only_parts() -> None:
    model = nn.ModuleDict({"model": nn.Linear(D, H), "unused": nn.Linear(D, H)})
    by_name = measure_layers(model, lambda: model["model"](torch.zeros(B, D)), device=CPU, passes=1)
    assert [(one.name, one.flops) for one in by_name] == [("model", 2 * B * D * H)]


def test_the_time_of_layers_doesnt_overlap() -> None:
    wide = nn.Sequential(nn.Linear(400, 400), nn.Sequential(nn.Linear(400, 400), nn.ReLU()))
    inputs = torch.zeros(2000, 400)
    by_name = {one.name: one for one in measure_layers(wide, lambda: wide(inputs), device=CPU, passes=3)}
    products = by_name["0"].seconds + by_name["1.0"].seconds
    assert products > 0.5 * sum(one.seconds for one in by_name.values())
    assert by_name["1"].seconds < products / 4
    assert all(one.seconds > 0 for one in by_name.values())


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval()
    before = copy.deepcopy(model.state_dict())
    layers(model, PICTURES, mode="inference")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the record -----------------------------------------------------------------------------


def layer(name: str, seconds: float, **values: Any) -> Layer:
    return Layer(**({"name": name, "kind": "Linear", "flops": 100, "bytes": 10, "seconds": seconds} | values))


def test_the_record_lists_the_longest_layers_and_sums_the_rest() -> None:
    many = tuple(layer(f"l{i}", i + 1.0) for i in range(50))
    idle = layer("between", 0.5, flops=0, bytes=None)
    record = Roofline(device="a CPU", dtype="float32", batch=10, layers=(*many, idle))
    assert record.flops_per_example == 500
    record_json = json.loads(json.dumps(record.to_json()))
    assert [one["name"] for one in record_json["layers"]] == [*(f"l{i}" for i in range(49, 9, -1)), "…"]
    rest = record_json["layers"][-1]
    assert (rest["flops"], rest["bytes"], rest["seconds"]) == (1000, 100, sum(range(1, 11)) + 0.5)
    assert sum(one["flops"] for one in record_json["layers"]) == record.flops_per_example * record.batch


def test_a_container_that_takes_long_is_listed() -> None:
    record = Roofline(
        device="a CPU",
        dtype="float32",
        batch=1,
        layers=(layer("a", 1.0), layer("b", 0.5, flops=0, bytes=None), layer("c", 0.001, flops=0, bytes=None)),
    )
    record_json = record.to_json()["layers"]
    assert [(one["name"], one["bytes"]) for one in record_json] == [("a", 10), ("b", None), ("…", None)]
