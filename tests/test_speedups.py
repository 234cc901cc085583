"""What each speedup changes, where it is used, and that the first line of its file is true."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from suanli.compute import cuda_graph
from suanli.compute.cuda_graph import CapturedStep
from suanli.compute.plan import apply_plan, error_tolerance, sort_speedups, usable_speedups
from suanli.compute.plan_trial import difference
from suanli.compute.speedups import allocator, bind_threads
from suanli.compute.step_runner import StepRunner, apply_settings
from suanli.core import registry
from suanli.core.types import Device, Example, Plan, Recipe, Source, Speedup, Split, Step
from suanli.data.cache import PreparedData, prepare_source
from suanli.data.loader import Feed
from suanli.machine.device import detect
from suanli.machine.threads import start_thread
from suanli.parallel.blocks import repeated_blocks
from suanli.parallel.group import Group
from suanli.training.setup import Setup

CPU = detect("cpu")


def device(kind: str, *dtypes: str) -> Device:
    return Device(name="the device", torch_name=kind, memory_bytes=None, fast_dtypes=dtypes)


def speedup(name: str) -> Speedup:
    value: Speedup = registry.load("speedups", name)
    return value


def test_a_loss_scale_that_overflows_at_first_is_no_error_of_float16() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = copy.deepcopy(plain)
    step = Step(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, targets = torch.randn(16, 8), torch.randint(0, 2, (16,))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 100 * F.cross_entropy(outputs.float(), targets)  # its gradients fit float16, 2^16 times them don't

    plain_step = Step(model=plain, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1))
    expected = StepRunner(plain_step, loss).compute_numbers(inputs, targets)
    runner = StepRunner(speedup("fp16").apply(step, CPU), loss)
    assert difference(expected, runner.compute_numbers(inputs, targets)) <= speedup("fp16").tolerance
    assert runner.scaler.get_scale() < 1 << 16


# --- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where", "usable"),
    [
        ("bf16", device("cpu", "float32"), False),
        ("bf16", device("cpu", "float32", "bfloat16"), True),
        ("bf16", device("cuda:0", "float32", "float16"), False),
        ("bf16", device("cuda:0", "float32", "float16", "bfloat16"), True),
        ("fp16", device("cuda:0", "float32", "float16"), True),
        ("fp16", device("cpu", "float32", "bfloat16"), False),
        ("tf32", device("cuda:0", "float32", "tfloat32"), True),
        ("tf32", device("cuda:0", "float32", "float16"), False),
        ("tf32", device("cpu", "float32"), False),
        ("channels_last", device("cpu", "float32"), True),
        ("channels_last", device("cuda:1", "float32"), True),
        ("channels_last", device("mps", "float32"), False),
        ("fused_optimizer", device("cpu", "float32"), True),
        ("fused_optimizer", device("xpu", "float32"), False),
        ("allocator", device("cuda:0", "float32"), True),
        ("allocator", device("mps", "float32"), False),
        ("bind_threads", device("cuda:0", "float32"), False),
        ("short_spin", device("cuda:0", "float32"), False),
        ("cudnn_benchmark", device("cpu", "float32"), False),
        ("onednn_bf16", device("cuda:0", "bfloat16"), False),
        ("graphs", device("cuda:0", "float32"), True),
        ("graphs", device("cpu", "float32"), False),
        ("compile", device("mps", "float32"), False),
        ("resident", device("cuda:0", "float32"), True),
        ("resident", device("cpu", "float32"), False),
        ("read_ahead", device("cpu", "float32"), True),
        ("whole_batch", device("mps", "float32"), True),
        ("activation_checkpointing", device("mps", "float32"), True),
    ],
)
def test_where_it_is_used(name: str, where: Device, usable: bool) -> None:
    assert (speedup(name).why_not(where) is None) == usable


def block(channels: int = 4, *, norm: bool = True) -> nn.Sequential:
    norms = [nn.BatchNorm2d(channels)] if norm else []
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=not norm), *norms, nn.ReLU())


def net(*, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(block(norm=norm), block(norm=norm), block(norm=norm))
    return nn.Sequential(nn.Conv2d(3, 4, 1), body, nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 36, 3))


def step_of(model: nn.Module, **fields: object) -> Step:
    return Step(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **fields)  # type: ignore[arg-type]


CONV, LINEAR = net(), nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("name", "step", "where", "needless"),
    [
        ("channels_last", step_of(CONV), CPU, False),
        ("channels_last", step_of(LINEAR), CPU, True),
        ("cudnn_benchmark", step_of(LINEAR), CPU, True),
        ("cudnn_benchmark", step_of(nn.Conv1d(2, 2, 1)), CPU, False),
        ("activation_checkpointing", step_of(CONV), CPU, False),
        ("activation_checkpointing", step_of(LINEAR), CPU, True),
        ("compile_blocks", step_of(LINEAR), CPU, True),
        ("fused_optimizer", step_of(LINEAR), CPU, False),
        ("fused_optimizer", Step(model=LINEAR), CPU, True),
        ("fused_optimizer", replace(step_of(LINEAR), optimizer=torch.optim.RMSprop(LINEAR.parameters())), CPU, True),
        ("graphs", step_of(LINEAR, loss_scaling=True), CPU, True),
        ("graphs", step_of(LINEAR, recomputes=True), CPU, True),
        ("graphs", step_of(LINEAR), CPU, False),
        ("read_ahead", step_of(LINEAR), CPU, True),
        ("read_ahead", step_of(LINEAR, reads_cache=True), CPU, False),
        ("read_ahead", step_of(LINEAR, reads_cache=True, resident=True), CPU, True),
        ("bind_threads", step_of(LINEAR, read_ahead=True), CPU, True),
        ("resident", step_of(LINEAR, reads_cache=True), CPU, True),
        ("resident", step_of(LINEAR, reads_cache=True, can_reside=True), CPU, False),
        ("whole_batch", step_of(LINEAR), CPU, True),
        ("whole_batch", step_of(LINEAR, micro_batches=2), CPU, False),
        ("whole_batch", step_of(CONV, micro_batches=2), CPU, True),  # batch norms
        ("whole_batch", step_of(net(norm=False), micro_batches=2), CPU, False),
    ],
)
def test_which_trainings_have_no_use_for_it(name: str, step: Step, where: Device, needless: bool) -> None:
    assert (speedup(name).needless(step, where) is not None) == needless


def test_reasons_name_the_cause() -> None:
    assert "the device" in (speedup("bf16").why_not(device("cpu", "float32")) or "")
    rms = replace(step_of(LINEAR), optimizer=torch.optim.RMSprop(LINEAR.parameters()))
    assert "RMSprop" in (speedup("fused_optimizer").needless(rms, CPU) or "")


# --- layout and blocks ----------------------------------------------------------------------------


def test_channels_last_changes_filters_and_not_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    step = speedup("channels_last").apply(Step(model=model), CPU)
    conv, _, linear = step.model
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert linear.weight.is_contiguous()
    assert step.memory_format is torch.channels_last


def test_blocks_are_the_repeated_parts_and_none_is_inside_another() -> None:
    model = net()
    assert repeated_blocks(model) == list(model[1])
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    assert repeated_blocks(layers) == list(layers.layers)
    for name in ("resnet18", "speednet"):
        built = registry.load("models", name).build(classes=3, in_channels=3, image_size=(32, 32))
        outermost = repeated_blocks(built)
        inside = [id(m) for outer in outermost for m in outer.modules()]
        assert len(inside) == len(set(inside))


# --- activation checkpointing ---------------------------------------------------------------------


def batch(examples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(examples, 3, 6, 6, generator=generator), torch.arange(examples) % 3


def test_recomputing_gives_the_same_bits_and_counts_statistics_once() -> None:
    """With dropout: the second pass draws the same as the first."""
    results = []
    for change in (lambda s: s, lambda s: speedup("activation_checkpointing").apply(s, CPU)):
        step = change(step_of(nn.Sequential(net(), nn.Identity())))
        step.model[0][1][1].add_module("dropout", nn.Dropout(0.3))
        runner = StepRunner(step, F.cross_entropy)
        for number in range(3):
            torch.manual_seed(number)
            runner(*batch())
        grads = {name: p.grad for name, p in step.model.named_parameters()}
        results.append((dict(step.model.state_dict()), grads))
    (state, grads), (other_state, other_grads) = results
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    tracked = [int(value) for name, value in other_state.items() if name.endswith("num_batches_tracked")]
    assert tracked == [3, 3, 3]


def test_recomputing_keeps_fewer_bytes() -> None:
    kept = []
    for change in (lambda s: s, lambda s: speedup("activation_checkpointing").apply(s, CPU)):
        step = change(step_of(net()))
        own = {p.untyped_storage().data_ptr() for p in step.model.state_dict().values()}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own: set[int] = own, seen: dict[int, int] = seen) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs, targets = batch(64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = F.cross_entropy(step.model(inputs), targets)
        kept.append(sum(seen.values()))
        loss.backward()
    assert kept[1] < 0.7 * kept[0]


def test_recomputing_doesnt_change_evaluation_and_can_be_copied() -> None:
    step = speedup("activation_checkpointing").apply(step_of(net()), CPU)
    plain = net()
    inputs, _ = batch()
    assert torch.equal(step.model.eval()(inputs), plain.eval()(inputs))
    assert list(step.model.state_dict()) == list(plain.state_dict())


# --- parts of a batch -----------------------------------------------------------------------------


def test_the_whole_batch_is_the_same_as_its_parts() -> None:
    results = []
    for change in (lambda s: s, lambda s: speedup("whole_batch").apply(s, CPU)):
        model = net(norm=False)
        runner = StepRunner(change(step_of(model, micro_batches=3)), F.cross_entropy)
        results.append(runner.compute_numbers(*batch(7)))
    assert [len(r.outputs) for r in results] == [3, 1]
    torch.testing.assert_close(torch.cat(results[0].outputs), results[1].outputs[0])
    for one, other in zip(results[0].gradients, results[1].gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_dropout_is_restored_after_computing_numbers() -> None:
    model = net()
    StepRunner(step_of(model), F.cross_entropy).compute_numbers(*batch())
    assert model[3].p == 0.3


# --- the optimizer --------------------------------------------------------------------------------


def test_the_fused_kernel_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    step = speedup("fused_optimizer").apply(step_of(net()), CPU)
    assert step.optimizer is not None
    calls: list[int] = []
    real = torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *a, **k: calls.append(1) or real(*a, **k))
    StepRunner(step, F.cross_entropy)(*batch())
    assert calls
    assert all(g["fused"] for g in step.optimizer.state_dict()["param_groups"])


# --- settings of the process ----------------------------------------------------------------------

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has affinities of threads")


@linux_only
def test_bound_threads_may_run_anywhere_afterwards() -> None:
    """With two threads, in a separate process: operations have one in this one."""
    script = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(2)
torch.ones(1 << 22).exp_()
from suanli.compute.speedups.bind_threads import bind_threads
allowed = os.sched_getaffinity(0)
def affinities():
    return sorted(len(os.sched_getaffinity(int(t.name))) for t in Path("/proc/self/task").iterdir())
before = affinities()
with bind_threads():
    own = os.sched_getaffinity(0)
    inside = affinities()
assert len(own) == 1, own
assert os.sched_getaffinity(0) == allowed
assert affinities() == before, (before, affinities())
print(inside.count(1))
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is only one core")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1  # this thread at least; the pool's other one where it got to work


@linux_only
def test_waiting_threads_spin_less_and_as_before_afterwards() -> None:
    """By the CPU time of a process whose second thread waits for work: with its usual spinning, some thirty times."""
    script = """
import os, time
import torch
torch.set_num_threads(2)
from suanli.compute.speedups.short_spin import spin_less, why_not
from suanli.core.types import Device
values = torch.ones(1 << 20)
def spun():
    values.neg_()
    time.sleep(0.2)
    before = time.process_time()
    for _ in range(20):
        values[: 1 << 17].neg_()
        time.sleep(0.03)
    return time.process_time() - before
def threads():
    return len(os.listdir("/proc/self/task"))
assert why_not(Device(name="", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32",))) is None
before, count = spun(), threads()
with spin_less():
    inside = spun()
    assert torch.get_num_threads() == 2
    assert threads() > count
while threads() > count:  # the second pool ends a moment after its thread
    time.sleep(0.01)
assert torch.get_num_threads() == 2
print(before, inside, spun())
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is only one core")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120, env=variables
    )
    assert done.returncode == 0, done.stderr
    before, inside, after = map(float, done.stdout.split())
    assert inside < before / 2
    assert inside < after / 2


def test_a_thread_has_its_own_number_of_threads_for_operations() -> None:
    seen: list[int] = []

    def compute() -> None:
        torch.ones(1 << 17).exp_()
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        start_thread(compute, name="own", pool=1).join()
        plain = threading.Thread(target=compute)
        plain.start()
        plain.join()
        assert [*seen, torch.get_num_threads()] == [1, 2, 2]
    finally:
        torch.set_num_threads(before)


@linux_only
def test_threads_may_run_anywhere_after_an_error() -> None:
    allowed = os.sched_getaffinity(0)
    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()
    try:
        assert other.native_id is not None
        with pytest.raises(KeyError) as left, bind_threads.bind_threads():
            raise KeyError((len(os.sched_getaffinity(0)), os.sched_getaffinity(other.native_id)))
    finally:
        idle.set()
        other.join()
    assert left.value.args[0] == (1, allowed)  # the other thread computes nothing, so it may go anywhere
    assert os.sched_getaffinity(0) == allowed


FROM_THE_HEAP = """
import ctypes
from suanli.compute.speedups import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def from_the_heap():
    place = libc.malloc(64 << 20)
    chunk_size = ctypes.c_size_t.from_address(place - ctypes.sizeof(ctypes.c_size_t)).value
    libc.free(place)
    return not chunk_size & 2  # malloc(3): IS_MMAPPED

with allocator.keep_heap():
    assert from_the_heap()
assert not from_the_heap()
"""


@pytest.mark.skipif(allocator.why_not(CPU) is not None, reason="another C library or allocator")
def test_freed_memory_is_kept_while_the_setting_is_on() -> None:
    """A block of 64 MiB comes from the heap, where it lies again the next time, not from a fresh map. In a process of
    its own: what others have done to the heap decides where the next block comes from."""
    subprocess.run([sys.executable, "-c", FROM_THE_HEAP], check=True)


# --- reading ahead --------------------------------------------------------------------------------


def split_of(rows: np.ndarray, index: np.ndarray) -> Split:
    return Split(
        inputs={"image": rows},
        index=index,
        targets={"class": index % 3},
        names=[str(i) for i in index],
        geometries=np.zeros((len(index), 3, 2)),
    )


def test_reading_ahead_gives_the_same_batches() -> None:
    rows = np.arange(400, dtype=np.uint8).reshape(100, 4)
    index = np.random.default_rng(0).permutation(100)[:70]
    split = split_of(rows, index)
    feed = Feed(split, CPU)
    order = [torch.randperm(70, generator=torch.Generator().manual_seed(s))[:16] for s in range(12)]
    plain, ahead = (list(feed.batches(iter(order), read_ahead=how)) for how in (False, True))
    assert len(plain) == len(ahead) == 12
    for one, other in zip(plain, ahead, strict=True):
        assert torch.equal(one[0]["image"], other[0]["image"])
        assert torch.equal(one[1]["class"], other[1]["class"])
        assert torch.equal(one[2], other[2])


def test_a_reader_that_fails_or_isnt_needed_ends() -> None:
    feed = Feed(split_of(np.zeros((10, 2), np.uint8), np.arange(10)), CPU)
    bad = iter([torch.arange(3), torch.tensor([99])])
    with pytest.raises(IndexError):
        list(feed.batches(bad, read_ahead=True))
    batches = feed.batches((torch.arange(3) for _ in iter(int, 1)), read_ahead=True)  # without end
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not any(t.name == "suanli-read-ahead" for t in threading.enumerate())


# --- a captured step ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    pictures = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    rows = [Example(name=str(i), target="ab"[i % 2], split=None, read=lambda p=p: p) for i, p in enumerate(pictures)]  # type: ignore[misc]
    source = Source(name="noise", kind="image", examples=rows, classes=("a", "b"), fingerprint="noise", size_bytes=1)
    return prepare_source(source, Recipe(), tmp_path_factory.mktemp("cache"), threads=1)


def test_the_plan_of_one_process_is_not_used_for_several(prepared: PreparedData) -> None:
    """It may contain speedups that they have no use for, such as graphs."""
    alone = Setup(Recipe(), prepared, CPU).key
    keys = {size: Setup(Recipe(), prepared, CPU, group=Group(rank=0, size=size)).key for size in (1, 2, 4)}
    assert keys[1] == alone
    assert len(set(keys.values())) == 3


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_a_captured_step_learns_the_same_with_a_changing_rate(prepared: PreparedData, optimizer: str) -> None:
    """On a device without graphs all but the recording is as on a GPU: tensors that stay where they are, and
    learning rates that are read from them."""
    recipe = Recipe(
        optimizer=optimizer,
        lr=0.02,
        epochs=3,
        batch_size=16,
        schedule="one_cycle",
        clip_norm=1.0,
        model_args={"widths": [8, 16]},
    )
    states, rates = [], []
    for graph in (False, True):
        setup = Setup(recipe, prepared, CPU)
        loop = setup.loop(Plan(device="cpu", speedups=()))
        if graph:
            loop.runner = StepRunner(replace(loop.compute, graph=True), loop.loss, clip_norm=recipe.clip_norm)
        seen = []
        for _ in loop.run():
            seen.append([float(g["lr"]) for g in loop.optimizer.param_groups])
        states.append({name: t.clone() for name, t in loop.model.state_dict().items()})
        rates.append(seen)
        assert all(isinstance(g["lr"], torch.Tensor) == graph for g in loop.optimizer.param_groups)
    np.testing.assert_allclose(rates[0], rates[1], rtol=1e-6)
    assert len({tuple(r) for r in rates[0]}) > 3  # it did change
    start = Setup(recipe, prepared, CPU).module.state_dict()
    one, other, before = (torch.cat([t.float().flatten() for t in s.values()]) for s in (*states, start))
    # Muon's iteration may run in bfloat16, which makes more of a rate's last bit.
    allowed = 0.02 if optimizer == "muon" else 1e-4
    assert (one - other).norm() <= allowed * (one - before).norm()


def test_a_captured_step_reads_from_fixed_tensors_one_set_for_each_shape() -> None:
    model = net(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[tuple[int, float]] = []

    def train_step(inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        seen.append((inputs["x"].data_ptr(), float(inputs["x"].sum() + targets.sum())))
        return torch.zeros(())

    captured = CapturedStep(model, optimizer, train_step)
    sizes = [4, 4, 3, 4, 3, 5, 6]  # MAX_SHAPES different ones
    batches = [({"x": torch.full((size, 2), float(n))}, torch.full((size,), n)) for n, size in enumerate(sizes)]
    for inputs, targets in batches:
        captured(inputs, targets)
    addresses = [address for address, _ in seen]
    assert len(set(addresses)) == cuda_graph.MAX_SHAPES
    assert addresses[0] == addresses[1] == addresses[3]
    assert addresses[2] == addresses[4]
    assert [value for _, value in seen] == [float(i["x"].sum() + t.sum()) for i, t in batches]
    one_more = {"x": torch.ones(7, 2)}
    captured(one_more, torch.ones(7))
    assert addresses.count(seen[-1][0]) == 0
    assert seen[-1][0] == one_more["x"].data_ptr()


# --- together -------------------------------------------------------------------------------------


def test_all_usual_speedups_together_compute_the_same() -> None:
    plain = step_of(net())
    chosen: dict[str, str] = {}
    for name, found in usable_speedups(CPU)[0].items():
        if found.usual and found.needless(plain, CPU) is None:
            chosen.setdefault(found.group or name, name)
    plan = Plan(device="cpu", speedups=sort_speedups(chosen.values()), threads=1)
    model, optimizer = copy.deepcopy((plain.model, plain.optimizer))
    together = apply_plan(plan, replace(plain, model=model, optimizer=optimizer), CPU)
    numbers = StepRunner(plain, F.cross_entropy).compute_numbers(*batch())
    with apply_settings(together):
        found_numbers = StepRunner(together, F.cross_entropy).compute_numbers(*batch())
    assert difference(numbers, found_numbers) <= error_tolerance(plan.speedups, CPU)


def test_the_number_of_threads_applies_while_the_step_computes() -> None:
    before = torch.get_num_threads()
    step = apply_plan(Plan(device="cpu", speedups=(), threads=before + 1), step_of(LINEAR), CPU)
    with apply_settings(step):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_graphs_are_for_optimizers_whose_first_steps_can_be_undone() -> None:
    """State that did not exist before the warm-up steps becomes zero, but step sizes of Rprop start otherwise."""
    model = nn.Linear(2, 2)
    for optimizer, taken in ((torch.optim.AdamW, True), (torch.optim.SGD, True), (torch.optim.Rprop, False)):
        step = Step(model=model, optimizer=optimizer(model.parameters(), lr=0.1))
        reason = registry.load("speedups", "graphs").needless(step, device("cuda:0", "float32"))
        assert (reason is None) == taken
        assert taken or "Rprop" in reason
