"""`suanli train --shard`: a sharded network learns the same as an unsharded one, in less memory, and resumes with
any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import member
from groups import MEMBER, read_outputs, run_group
from served import until
from suanli.compute.plan import use_threads
from suanli.core import registry
from suanli.core.errors import DamagedFile
from suanli.core.run import Run
from suanli.core.types import Step
from suanli.machine import device
from suanli.models.model_folder import load_model
from suanli.training import checkpoint
from test_cli import call
from test_launch import SETTINGS, errors, members, started, train

NORMS = {"model": "speednet", "model_args": {"widths": [8, 8, 8]}, "epochs": 5, "batch_size": 90}
# Muon needs whole matrices; no width is a multiple of three.
MUON = NORMS | {
    "accumulate": 2,
    "ema_decay": 0.9,
    "clip_norm": 1.0,
    "task_args": {"class_weights": "balanced"},
    "optimizer": "muon",
}
SMALL = NORMS | {"optimizer": "adamw", "lr": 1e-3, "ema_decay": 0.9}
BLOCKS = {"model": "vit_tiny", "optimizer": "adamw", "lr": 1e-4, "epochs": 1, "batch_size": 30, "clip_norm": 1.0}


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def group(count: int, settings: dict, *trainings: dict) -> list[list[dict]]:
    """The results of each of `count` processes in each of the trainings, one after the other."""
    wanted = [{"data": "digits", "settings": settings, "double": True} | training for training in trainings]
    if count == 1:
        with use_threads(1):
            return [[found] for found in member.main(wanted)]
    every = read_outputs(run_group(count, [str(MEMBER), json.dumps(wanted)]))
    return [list(found) for found in zip(*every, strict=True)]


def assert_alike(got: list[float], expected: list[float]) -> None:
    """Of trainings in float64: sums of up to a few thousand terms in another order, each rounded to 2^-53. In flat
    parts of an image that rounding decides which of equal values a max pooling takes: on a processor with AVX512_BF16
    this changed losses by up to 1e-8."""
    np.testing.assert_allclose(got, expected, rtol=1e-6)


STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """The cache that all trainings here share, also while a module's fixture trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUANLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def alone():
    """What one process learns."""
    return group(1, MUON, {"steps": STEPS})[0][0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes learn: a network of which one has more than the other; a folder with checkpoints of steps 4
    and 8 of another, and what happened then. Starting processes takes most of the time, so they learn all of it."""
    folder = tmp_path_factory.mktemp("begun")
    straight = {"steps": 16, "shard": True, "save": str(folder / "sharded"), "save_at": [2, 4, 8]}
    on = {"steps": 8, "resume": str(folder / "sharded")}
    trainings = [
        straight,
        on | {"shard": True},
        on | {"save": str(folder / "plain"), "save_at": [4]},
        {"steps": 4, "shard": True, "resume": str(folder / "plain")},
        {"settings": MUON, "steps": STEPS, "shard": True, "shares": [0.7, 0.3]},
    ]
    *saved, uneven = group(2, SMALL, *trainings)
    return uneven, folder, [every[0] for every in saved]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_what_is_learned_is_the_same(alone, count, request):
    if count == 2:
        every = request.getfixturevalue("pair")[0]
    else:
        (every,) = group(count, MUON, {"steps": STEPS, "shard": True})
    assert len({m["weights"] for m in every}) == 1
    assert sum(m["mine"] for m in every) == alone["whole"]
    assert sum(m["held"] for m in every) == pytest.approx(1)
    assert max(m["held"] for m in every) < 1 / count + 0.05
    assert_alike(every[0]["losses"], alone["losses"])
    assert every[0]["scores"] == pytest.approx(alone["scores"], abs=1e-6)
    assert every[0]["validated"] == alone["validated"]


@pytest.mark.long
def test_speedups_work_on_a_sharded_network():
    ((one,),) = group(1, BLOCKS, {"steps": 8})
    names = "activation_checkpointing,allocator,channels_last,fused_optimizer,read_ahead"
    (every,) = group(2, BLOCKS, {"steps": 8, "shard": True, "speedups": names})
    assert set(every[0]["speedups"]) == set(names.split(","))
    assert max(m["held"] for m in every) < 0.51
    assert_alike(every[0]["losses"], one["losses"])


def test_speedups_that_dont_work_sharded_say_why():
    step = Step(model=torch.nn.Linear(2, 2), distributed=True, sharded=True)
    cpu = device.detect("cpu")
    reasons = {
        name: registry.load("speedups", name).needless(step, cpu) for name in ("compile", "graphs", "bf16_gradients")
    }
    assert "compile_blocks" in reasons["compile"]
    assert "other processes" in reasons["graphs"]
    assert "their own precision" in reasons["bf16_gradients"]


# --- memory ---------------------------------------------------------------------------------

# Room beyond what the process has mapped once everything is imported.
LIMITED = """
import resource, sys
import suanli.verbs.run, suanli.data.datasets.digits, suanli.training.recipes.small_images, suanli.training.trainer
import sklearn.datasets, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + {room},) * 2)
from suanli.cli import main
main(sys.argv[1:])
"""
LARGE = """
from torch import nn
class Block(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)
def block():
    return Block(nn.LayerNorm(1024), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
def net(classes, in_channels, image_size):
    ends = nn.Linear(64 * in_channels, 1024), nn.Linear(1024, classes)
    return nn.Sequential(nn.Flatten(), ends[0], nn.Sequential(*(block() for _ in range(16))), ends[1])
"""
WEIGHTS_BYTES = 16 * 2 * 1024 * 1025 * 4


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_network_too_large_for_one_process_is_trained_by_two(monkeypatch):
    # The limit counts what each thread only reserves, and what is free within the heap, too.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    Path("large.py").write_text(LARGE)
    limit = LIMITED.format(room=int(3.9 * WEIGHTS_BYTES))  # weights, gradients and two moments are four times as much
    options = ["train", "digits", "--model=large:net", "--set=optimizer=adamw", "--lr=1e-4", "--epochs=0.05"]
    options += ["--batch-size=32", "--device=cpu", "--speedups=none"]
    whole = run_group(2, ["-c", limit, *options, "--out=whole"], timeout_s=150)
    assert [p.returncode for p in whole] == [4, 4], whole[0].stderr
    assert not Path("whole").exists()
    shared = run_group(2, ["-c", limit, *options, "--out=shared", "--shard"], timeout_s=150)
    assert [p.returncode for p in shared] == [0, 0], shared[0].stderr + shared[1].stderr
    module = load_model(Path("shared/model"), trust_code=True).module
    assert sum(p.numel() for p in module.parameters()) > WEIGHTS_BYTES / 4
    assert checkpoint.read_newest(Path("shared/checkpoints")).step == Run.open("shared").summary["steps"] > 0


BUILT = """
import os, sys
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
from pathlib import Path
from suanli.machine.device import detect
from suanli.parallel import dtensor
from suanli.parallel.group import join_group, leave_group
from suanli.training.setup import Setup
from suanli.training.prepare import DataOptions, resolve
options = DataOptions.of("digits", data_dir=None, cache_dir=None)
group = join_group("cpu")
def resident(name):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(name))
for network in ("large:net", "growing:net"):
    settings = {"model": network, "optimizer": "adamw"}
    recipe, prepared = resolve(options, recipe=None, settings=settings, announce=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS:")
    module = Setup(recipe, prepared, detect("cpu"), group=group, shard=not group.is_alone).module
    print(resident("VmHWM:") - before)
    print(sum(float(dtensor.gather(p.detach()).double().abs().sum()) for p in module.parameters()))
group.finish()
leave_group()
sys.stdout.flush()
os._exit(0)  # torch was seen to abort once in many ends of an interpreter, which is not what is tested here
"""


GROWING = """
import torch
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(64))
            self.append(nn.Linear(20, 10))
        return super().forward(x)
def net(classes):
    return Net(nn.Flatten(), nn.Linear(64, 20))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Of both networks, the bytes that building takes and the sum of weights: by one process, and by each of two."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peaks are Linux's")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is let go doesn't stay in the heap
        patch.chdir(tmp_path_factory.mktemp("built"))
        Path("large.py").write_text(LARGE)
        Path("growing.py").write_text(GROWING)
        every = [*run_group(1, ["-c", BUILT]), *run_group(2, ["-c", BUILT])]
    assert [p.returncode for p in every] == [0, 0, 0], every[1].stderr + every[2].stderr
    return [[float(n) for n in p.stdout.split()] for p in every]


def test_only_the_first_process_builds_the_whole_network(built):
    (_, whole), (first, one), (second, other) = (figures[:2] for figures in built)
    assert one == other == pytest.approx(whole, rel=1e-9)
    assert second < 0.8 * WEIGHTS_BYTES  # its half, and a block
    assert first > WEIGHTS_BYTES


def test_a_network_may_complete_itself_when_it_is_tried(built):
    assert built[0][3] == pytest.approx(built[1][3], rel=1e-9)
    assert built[1][3] == built[2][3]


# --- checkpoints ----------------------------------------------------------------------------


@pytest.fixture
def begun(pair):
    return pair[1:]


def test_the_same_number_of_processes_resumes_to_the_same_bits(begun):
    straight, again = begun[1][:2]
    assert again["losses"] == straight["losses"][8:]
    assert again["weights"] == straight["weights"]


def test_sharded_and_unsharded_runs_resume_from_each_other(begun):
    straight, _, plain, sharded = begun[1]
    assert_alike(plain["losses"], straight["losses"][8:])
    assert_alike(sharded["losses"], straight["losses"][12:])


@pytest.mark.long
def test_any_number_of_processes_can_resume(begun, tmp_path):
    folder, (straight, *_) = begun
    on = {"steps": 8, "shard": True, "resume": str(folder / "sharded"), "save": str(tmp_path), "save_at": [4]}
    ((three, *_),) = group(3, SMALL, on)
    assert_alike(three["losses"], straight["losses"][8:])
    ((one,),) = group(1, SMALL, {"steps": 4, "resume": str(tmp_path)})
    assert_alike(one["losses"], straight["losses"][12:])
    assert one["scores"] == pytest.approx(straight["scores"], abs=1e-6)


def files(folder: Path) -> list[str]:
    return sorted(p.name.replace(p.name.split(".")[1], "ID") if "-of-" in p.name else p.name for p in folder.iterdir())


def of_step(step: int) -> list[str]:
    return [f"step-{step:08d}.ID.{i}-of-2.safetensors" for i in range(2)] + [f"step-{step:08d}.json"]


def part(folder: Path, step: int, rank: int) -> Path:
    (path,) = folder.glob(f"step-{step:08d}.*.{rank}-of-2.safetensors")
    return path


def test_each_process_writes_what_it_holds(begun):
    folder = begun[0] / "sharded"
    assert files(folder) == of_step(4) + of_step(8)
    assert not checkpoint.read_newest(begun[0] / "plain").path.name.endswith(".json")
    sizes = [part(folder, 8, rank).stat().st_size for rank in range(2)]
    assert min(sizes) > 0.4 * sum(sizes)
    tensors = checkpoint.read_newest(folder).tensors
    name = next(n for n in tensors if tensors.shape(n)[:1] == (8,) and n.startswith("model."))
    assert torch.equal(torch.cat([tensors.rows(name, slice(0, 3)), tensors.rows(name, slice(3, 8))]), tensors[name])


@pytest.mark.parametrize("what", ["a part is cut", "a part is missing", "no index", "the index is cut"])
def test_damaged_checkpoints_are_skipped(begun, tmp_path, what):
    folder = shutil.copytree(begun[0] / "sharded", tmp_path / "copy")
    assert checkpoint.read_newest(folder).step == 8
    victim = part(folder, 8, 1) if "part" in what else folder / "step-00000008.json"
    if "cut" in what:
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    newest = checkpoint.read_newest(folder)
    assert newest.step == 4
    assert all(newest.tensors[name].shape == newest.tensors.shape(name) for name in newest.tensors)
    part(folder, 4, 0).unlink()
    with pytest.raises(DamagedFile):
        checkpoint.read_newest(folder)


def test_unfinished_checkpoints_are_removed(begun, tmp_path):
    folder = shutil.copytree(begun[0] / "sharded", tmp_path / "copy")
    (folder / "step-00000008.json").unlink()
    (folder / ".step-00000009.1234.0-of-2.safetensors.x.tmp").write_bytes(b"cut short")
    checkpoint.save_step(folder, 6, {"model.weight": torch.zeros(3)}, {})
    assert files(folder) == [*of_step(4), "step-00000006.safetensors"]
    checkpoint.remove_all(folder)
    assert files(folder) == []


# --- the command ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_by_two_processes(tmp_path, capsys):
    code = train("digits", "--nproc=2", "--shard", "--out=run", *SETTINGS, "--epochs=1", "--speedups=auto")
    assert code == 0, errors()
    run = Run.open("run")
    assert run.summary["shard"] is True
    assert run.summary["plan"]["origin"] == "sharded"
    assert list((tmp_path / "run" / "checkpoints").glob("*.json"))
    load_model(run.model_path)
    # One process goes on, and still knows that several would shard the network.
    assert call("train", "run", "--more-epochs=0.5", "--device=cpu", "--speedups=none") == 0
    assert "not sharded" in capsys.readouterr().err
    assert run.summary["shard"] is True
    assert not list((tmp_path / "run" / "checkpoints").glob("*-of-*"))


@pytest.mark.long
def test_a_run_killed_while_it_saves_resumes_to_the_same_bits(tmp_path):
    options = ["digits", "--nproc=2", "--shard", *SETTINGS]
    assert train(*options, "--out=whole") == 0, errors()
    folder = tmp_path / "killed" / "checkpoints"
    with started(*options, "--out=killed", "--checkpoint-every-s=0") as process:
        until(lambda: bool(list(folder.glob("*.json"))), within_s=90, what="a checkpoint")
        os.kill(members(process.pid)[-1], signal.SIGKILL)
        assert process.wait() == 0, errors()
    assert "going on from step" in errors()
    weights = [(tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    named = {part["file"] for index in folder.glob("*.json") for part in json.loads(index.read_text())["parts"]}
    assert {p.name for p in folder.iterdir() if "-of-" in p.name} == named
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shard"], "--nproc 2"),
        (["--shard", "--nproc=2", "--balance"], "--balance"),
        (["--shard", "--nproc=2", "--set=unfreeze_epochs=1"], "unfreeze_epochs isn't for a sharded network"),
        (["--shard", "--nproc=2", "--set=lora_rank=4"], "lora_rank isn't for a sharded network"),
    ],
)
def test_networks_that_cant_be_sharded(options, says, capsys):
    assert call("train", "digits", *SETTINGS, *options, "--out=refused") == 2
    assert says in capsys.readouterr().err
    assert not Path("refused").exists()
