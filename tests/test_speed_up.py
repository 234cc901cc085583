"""suanli.speed_up: a plain loop and the same loop through a fast step learn the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import suanli
from suanli.compute.plan import ORDER_OF_SUMS, error_tolerance
from suanli.compute.speed_up import FastStep
from suanli.core.types import Plan
from suanli.machine import device

STEPS = 12
Batches = list[tuple[Any, torch.Tensor]]


def cnn() -> nn.Module:
    def block(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(block(8), block(8)), nn.Flatten(), nn.Linear(512, 4))


class Transformer(nn.Module):
    """Takes named inputs, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.one(a) * self.other(b)))


def some(kind: str) -> Batches:
    random = torch.Generator().manual_seed(5)

    def inputs() -> Any:
        if kind == "cnn":
            return torch.randn(8, 3, 8, 8, generator=random)
        if kind == "two inputs":
            return torch.randn(8, 6, generator=random), torch.randn(8, 3, generator=random)
        lengths = torch.randint(3, 9, (8, 1), generator=random)
        tokens = torch.randint(0, 50, (8, 9), generator=random)
        return {"input_ids": tokens, "attention_mask": (torch.arange(9) < lengths).long()}

    return [(inputs(), torch.randint(0, 4, (8,), generator=random)) for _ in range(4)]


KINDS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "transformer": Transformer, "two inputs": Siamese}


def made(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = KINDS[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, STEPS)


def plain_loop(kind: str, clip_norm: float | None) -> tuple[list[float], nn.Module]:
    model, optimizer, scheduler = made(kind)
    losses, batches = [], some(kind)
    for number in range(STEPS):
        inputs, targets = batches[number % len(batches)]
        optimizer.zero_grad()
        if isinstance(inputs, dict):
            outputs = model(**inputs)
        else:
            outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        loss = F.cross_entropy(outputs, targets)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("speedups", "clip_norm"), [("none", 0.5), ("auto", None), ("auto", 0.5)])
def test_it_trains_like_the_plain_loop(kind: str, speedups: str, clip_norm: float | None) -> None:
    expected, reference = plain_loop(kind, clip_norm)
    model, optimizer, scheduler = made(kind)
    batches = some(kind)
    step, plan = suanli.speed_up(
        model, optimizer, F.cross_entropy, batches[0], speedups=speedups, clip_norm=clip_norm, steps=59
    )
    losses = []
    with step:
        for number in range(STEPS):
            losses.append(float(step(*batches[number % len(batches)])))
            scheduler.step()
    rounding = error_tolerance(plan.speedups, device.detect("cpu"))
    if speedups == "none":
        assert losses == expected
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert plan.origin == ("plain" if speedups == "none" else "short list")
    assert losses[0] == pytest.approx(expected[0], rel=rounding)
    assert losses == pytest.approx(expected, abs=max(5 * rounding, 0.01))
    assert losses[-1] < losses[0] - 0.05


def test_planning_measures_and_leaves_no_trace() -> None:
    model, optimizer, _ = made("cnn")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    step, plan = suanli.speed_up(model, optimizer, F.cross_entropy, some("cnn")[0], steps=3000)
    step.close()
    assert plan.origin == "measured"
    assert plan.trials
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_settings_are_on_until_close(speedup_folder: Callable[..., str]) -> None:
    speedup_folder(
        "other_threads",
        "from suanli.compute.plan import use_threads\n"
        "step = replace(step, settings=(*step.settings, lambda: use_threads(torch.get_num_threads() + 1)))",
    )
    before = torch.get_num_threads()
    model, optimizer, _ = made("two inputs")
    step, plan = suanli.speed_up(model, optimizer, F.cross_entropy, some("two inputs")[0], steps=10)
    assert plan.speedups == ("other_threads",)
    assert torch.get_num_threads() == before + 1
    step.close()
    assert torch.get_num_threads() == before
    step.close()  # once more does no harm

    def fail(step: FastStep) -> None:
        with step:
            raise KeyError

    step, _ = suanli.speed_up(model, optimizer, F.cross_entropy, some("two inputs")[0], steps=10)
    with pytest.raises(KeyError):
        fail(step)
    assert torch.get_num_threads() == before


def test_validation_goes_through_the_same_precision_and_layout() -> None:
    model, optimizer, _ = made("cnn")
    inputs, targets = some("cnn")[0]
    step, _ = suanli.speed_up(model, optimizer, F.cross_entropy, (inputs, targets), speedups="channels_last")
    with step, torch.inference_mode():
        model.eval()
        torch.testing.assert_close(step.forward(inputs), model(inputs))
    assert not model.training


def test_a_loss_of_several_outputs_and_nested_targets() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"label": self.a(x), "value": self.b(x).squeeze(1)}

    def loss(outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(outputs["label"], targets["label"]) + F.mse_loss(outputs["value"], targets["value"])

    model = TwoHeads()
    inputs = torch.randn(6, 5)
    targets = {"label": torch.arange(6) % 2, "value": torch.randn(6)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, plan = suanli.speed_up(model, optimizer, loss, (inputs, targets), speedups="fused_optimizer")
    assert plan.trials[0].error is not None
    assert plan.trials[0].error <= ORDER_OF_SUMS
    with step:
        losses = [float(step(inputs, targets)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_parameters_and_a_part_of_the_model_only() -> None:
    model, _, _ = made("cnn")
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    untouched = model[1][0][0].weight.clone()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)  # only the head
    step, _ = suanli.speed_up(model, optimizer, F.cross_entropy, some("cnn")[0], steps=3000)
    with step:
        for batch in some("cnn"):
            step(*batch)
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(model[1][0][0].weight, untouched)


def test_the_plan_of_another_model_isnt_used(tmp_path: Path, speedup_folder: Callable[..., str]) -> None:
    speedup_folder("nothing", "return step")
    origins = []
    for kind in ("cnn", "cnn", "two inputs"):
        model, optimizer, _ = made(kind)
        step, plan = suanli.speed_up(
            model, optimizer, F.cross_entropy, some(kind)[0], steps=100_000, cache_dir=tmp_path, threads=1
        )
        step.close()
        origins.append(plan.origin)
    assert origins == ["measured", "cached", "measured"]


# --- wrong uses -----------------------------------------------------------------------------------


def refused(
    error: type[Exception], says: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> None:
    batch = options.pop("batch", some("cnn")[0])
    with pytest.raises(error, match=says):
        suanli.speed_up(model, optimizer, F.cross_entropy, batch, **options)


def test_wrong_uses_are_refused_with_a_reason() -> None:
    model, optimizer, _ = made("cnn")
    other, _, _ = made("cnn")
    refused(suanli.UsageError, "aren't the model's", other, optimizer)
    refused(suanli.UsageError, "Unknown speedup 'warp'", model, optimizer, speedups="warp")
    refused(suanli.UsageError, "--threads can't be -1|threads", model, optimizer, threads=-1)
    refused(suanli.UsageError, "no tensor", model, optimizer, batch=([1, 2], torch.zeros(2)))
    refused(suanli.MachineError, "come from the caller", model, optimizer, speedups="read_ahead")
    refused(suanli.MachineError, "NVIDIA", model, optimizer, speedups="graphs")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused(suanli.UsageError, "no parameters to train", model, optimizer)


def test_a_model_that_cant_be_copied_can_be_used_without_speedups() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def __deepcopy__(self, memo: dict[int, Any]) -> Locked:
            raise TypeError("cannot pickle '_thread.lock' object")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    model = Locked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(4, 3), torch.arange(4) % 2
    refused(suanli.UsageError, "can't be copied .*lock", model, optimizer, batch=batch)
    step, plan = suanli.speed_up(model, optimizer, F.cross_entropy, batch, speedups="none")
    assert plan == Plan(device="cpu", speedups=(), origin="plain")
    with step:
        assert step(*batch).dim() == 0


def test_weights_with_an_autograd_history_cant_be_copied() -> None:
    """torch refuses to copy a tensor that is no leaf, with a RuntimeError."""
    model = nn.Linear(3, 2)
    model.extra = model.weight * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(suanli.UsageError, "can't be copied", model, optimizer, batch=(torch.randn(4, 3), torch.arange(4) % 2))


def test_errors_of_the_callers_code_are_raised_unchanged(speedup_folder: Callable[..., str]) -> None:
    """A batch that the model can't take fails with the model's own error, whatever the plan."""
    speedup_folder("nothing", "return step")
    model, optimizer, _ = made("cnn")
    refused(RuntimeError, "shapes|size", model, optimizer, batch=(torch.randn(2, 3, 5, 5), torch.zeros(2).long()))
