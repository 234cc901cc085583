"""The contract of every speedup: it returns why it can't be used, and changes nothing but rounding."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from registered import find_table_rows
from suanli.compute.plan import ORDER_OF_SUMS, apply_plan, switch_plan
from suanli.compute.plan_trial import difference
from suanli.compute.step_runner import StepRunner, apply_settings
from suanli.core import registry
from suanli.core.types import Device, Plan, Speedup, Step
from suanli.machine.device import detect

HERE = detect("cpu")
DEVICES = (
    HERE,
    Device(name="a CPU", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32", "bfloat16", "float16")),
    Device(name="an old GPU", torch_name="cuda:0", memory_bytes=8 << 30, fast_dtypes=("float32",)),
    Device(
        name="a GPU",
        torch_name="cuda:1",
        memory_bytes=80 << 30,
        fast_dtypes=("float32", "float16", "bfloat16", "tfloat32"),
    ),
    Device(name="a Mac's GPU", torch_name="mps", memory_bytes=None, fast_dtypes=("float32", "float16")),
)
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, nesterov=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.002, weight_decay=0.01),
}
STEPS = 3

# torch's compiler uses what torch itself is about to give up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SPEEDUPS: list[Speedup] = list(registry.load_all("speedups").values())
by_file = pytest.mark.parametrize("name", registry.names("speedups"))
every = pytest.mark.parametrize("speedup", SPEEDUPS, ids=lambda s: s.name)
# Compiling takes seconds, so what compiles learns with one optimizer only.
learning = pytest.mark.parametrize(
    ("speedup", "optimizer"),
    [
        pytest.param(s, o, id=f"{s.name}-{o}", marks=[pytest.mark.slow] if s.slow_start else [])
        for s in SPEEDUPS
        for o in OPTIMIZERS
        if not s.slow_start or o == "adamw"
    ],
)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def step_of(optimizer: str = "adamw") -> Step:
    """A small network with all that speedups act on, some way into training: Adam's first steps know only the
    gradients' signs, which rounding can turn."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # a bias before a norm learns nothing but rounding
        nn.BatchNorm2d(8),
        nn.Sequential(Block(8), Block(8)),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )
    step = Step(model=model, optimizer=OPTIMIZERS[optimizer](model))
    runner = StepRunner(step, F.cross_entropy)
    for number in range(STEPS):
        runner(*batch(100 + number))
    return step


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, 4, (12,), generator=generator)


def copied(step: Step) -> Step:
    model, optimizer = copy.deepcopy((step.model, step.optimizer))
    return replace(step, model=model, optimizer=optimizer)


def only_where_used(speedup: Speedup, step: Step) -> None:
    reason = speedup.why_not(HERE) or speedup.needless(step, HERE)
    if reason is not None:
        pytest.skip(f"{speedup.name}: {reason}")


def process_settings() -> dict[str, object]:
    """Flags of the process that a speedup may leave changed: all that torch has both a getter and a setter for, and
    others. A speedup that sets something else adds it here."""
    settings: dict[str, object] = {
        "affinity": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "dtype": torch.get_default_dtype(),
        "flushes_denormals": (torch.tensor(1e-40) * 0.5).item() == 0,
        "precisions": [
            place.fp32_precision
            for place in (
                *(torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv),
                *(torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
                *(torch.backends.mkldnn.rnn, torch.backends.cuda.matmul),
            )
        ],
        "attention": [
            getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
            for kernel in ("cudnn", "flash", "math", "mem_efficient")
        ],
    }
    for name in dir(torch._C):
        match = re.fullmatch(r"(_?)(?:get|is|are)_(\w+)", name)
        if match is None or not hasattr(torch._C, f"{match[1]}set_{match[2]}"):
            continue
        with warnings.catch_warnings(action="ignore"), suppress(TypeError, RuntimeError):  # deprecated; takes arguments
            settings[name] = getattr(torch._C, name)()
    return settings


@every
def test_it_can_be_turned_on_and_off_between_two_steps(speedup: Speedup) -> None:
    """Weights, gradients and the optimizer's state have the bits and the layout of a step that never had it."""
    if not speedup.switchable:
        pytest.skip(f"{speedup.name}: not switchable")
    never, step = step_of(), step_of()
    only_where_used(speedup, step)
    plain, one = Plan(device="cpu", speedups=()), Plan(device="cpu", speedups=(speedup.name,))
    switch_plan(plain, one, step, HERE)
    back = switch_plan(one, plain, step, HERE)
    assert back == step
    for each in (never, back):
        StepRunner(each, F.cross_entropy)(*batch(7))
    assert_same_bits(never, back)


def assert_same_bits(a: Step, b: Step) -> None:
    assert a.optimizer is not None
    assert b.optimizer is not None
    states = [[*s.optimizer.state_dict()["state"].values()] for s in (a, b)]  # type: ignore[union-attr]
    tensors = [[*s.model.state_dict().values()] for s in (a, b)]
    for mine, theirs in zip(*tensors, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    for ours, other in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(other[k])) for k in ours)


@by_file
def test_its_name_is_that_of_its_file(name: str) -> None:
    assert registry.load("speedups", name).name == name


@by_file
def test_the_docs_have_a_row_for_it(name: str) -> None:
    assert name in find_table_rows("speed.md"), f"add a row for {name} to docs/speed.md"


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_flush_denormal(True),
        lambda: torch._C._set_multithreading_enabled(False),
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.backends.cudnn.__setattr__("benchmark", True),
        lambda: torch.use_deterministic_algorithms(True),
    ],
    ids=["denormals", "multithreading", "threads", "cudnn", "deterministic"],
)
def test_a_changed_flag_is_noticed(change: Callable[[], object]) -> None:
    before, threads = process_settings(), torch.get_num_threads()
    change()
    try:
        assert process_settings() != before
    finally:
        torch.set_flush_denormal(False)
        torch._C._set_multithreading_enabled(True)
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(False)
    assert process_settings() == before


@every
def test_why_not_is_a_sentence(speedup: Speedup) -> None:
    reasons = [speedup.why_not(device) for device in DEVICES]
    reasons += [speedup.needless(s, d) for d in DEVICES for s in (step_of(), Step(model=nn.Linear(2, 2)))]
    for reason in reasons:
        assert reason is None or (len(reason) > 10 and not reason.endswith("."))


@every
def test_its_fields_are_consistent(speedup: Speedup) -> None:
    assert set(speedup.risks) <= {"memory", "numerics", "backend"}
    assert ORDER_OF_SUMS <= speedup.tolerance <= 0.1
    assert ("numerics" in speedup.risks) == (speedup.tolerance > ORDER_OF_SUMS and not speedup.slow_start)
    # What is used without measuring can neither cost time by design nor take long to start.
    assert not (speedup.usual and (speedup.saves_memory or speedup.slow_start))


@learning
def test_learns_the_same_up_to_its_tolerance(speedup: Speedup, optimizer: str) -> None:
    plain = step_of(optimizer)
    only_where_used(speedup, plain)
    plan = Plan(device="cpu", speedups=(speedup.name,))
    model, faster = plain.model, apply_plan(plan, copied(plain), HERE)
    runners = StepRunner(plain, F.cross_entropy), StepRunner(faster, F.cross_entropy)
    before = process_settings()
    with apply_settings(faster):
        numbers = runners[1].compute_numbers(*batch(0))
    assert process_settings() == before
    error = difference(runners[0].compute_numbers(*batch(0)), numbers)
    assert error <= speedup.tolerance
    for seed in range(1, STEPS):
        runners[0](*batch(seed))
        with apply_settings(faster):
            runners[1](*batch(seed))
    start, expected, got = (flat(m) for m in (step_of(optimizer).model, model, faster.model))
    # Errors grow from step to step; they stay a small part of the way that the weights went.
    assert (got - expected).norm() <= max(0.01, 2 * speedup.tolerance) * (expected - start).norm()


def flat(model: nn.Module) -> torch.Tensor:
    """Weights and statistics as one vector."""
    return torch.cat([t.float().flatten() for t in model.state_dict().values()])


@every
def test_keeps_settings_of_other_speedups(speedup: Speedup) -> None:
    before = replace(step_of(), micro_batches=2)
    own = {
        f.name for f in fields(Step) if getattr(speedup.apply(copied(before), HERE), f.name) != getattr(before, f.name)
    }
    others = {
        "compute": lambda x: x,
        "autocast_dtype": torch.float64,
        "memory_format": torch.preserve_format,
        "micro_batches": 3,
        "recomputes": True,
        "reads_cache": True,
        "settings": (lambda: pytest.MonkeyPatch.context(),),
    }
    others = {name: value for name, value in others.items() if name not in own or name == "settings"}
    step = replace(copied(before), **others)
    after = speedup.apply(step, HERE)
    for name, value in others.items():
        if name == "settings":
            assert after.settings[: len(step.settings)] == step.settings
        else:
            assert getattr(after, name) == value


@every
def test_keeps_the_objects_their_names_and_their_values(speedup: Speedup) -> None:
    step = step_of()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in step.model.state_dict(keep_vars=True).items()}
    after = speedup.apply(step, HERE)
    assert after.model is step.model
    assert after.optimizer is step.optimizer
    tensors = after.model.state_dict(keep_vars=True)
    assert list(tensors) == list(before)
    for name, (identity, value) in before.items():
        assert id(tensors[name]) == identity, name  # the optimizer still holds it
        assert torch.equal(tensors[name], value)
    assert torch.utils._pytree.tree_all(
        lambda p: any(p is q for q in tensors.values()), after.optimizer.param_groups[0]["params"]
    )


@every
def test_changes_the_step(speedup: Speedup) -> None:
    """The step itself, or what it contains: options of the optimizer, or the forward method of a block."""
    step = replace(step_of(), micro_batches=2)
    groups, forwards = _inside(step)
    after = speedup.apply(step, HERE)
    assert after != step or _inside(after) != (groups, forwards)


@every
def test_its_settings_are_restored_after_an_error(speedup: Speedup) -> None:
    if speedup.name == "allocator" and speedup.why_not(HERE) is not None:
        pytest.skip("its settings are the C library's")
    step, before = speedup.apply(step_of(), HERE), process_settings()
    with apply_settings(step):
        pass
    assert process_settings() == before
    error = pytest.raises(KeyError)
    with error, apply_settings(step):
        raise KeyError
    assert process_settings() == before


def _inside(step: Step) -> tuple[list[dict[str, object]], list[object]]:
    assert step.optimizer is not None
    groups = [{k: v for k, v in g.items() if k != "params"} for g in step.optimizer.param_groups]
    return groups, [(m.__dict__.get("forward"), m.__dict__.get("_compiled_call_impl")) for m in step.model.modules()]


@every
def test_a_copied_step_with_it_can_be_trained(speedup: Speedup) -> None:
    """Trials are copies: deepcopy of model and optimizer together keeps them connected."""
    step = step_of()
    only_where_used(speedup, step)
    step = speedup.apply(copied(step), HERE)
    assert step.optimizer is not None
    parameters = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    assert parameters == {id(p) for p in step.model.parameters()}
