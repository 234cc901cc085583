"""A plan that fails on the way is followed by a weaker one, from the last good state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import suanli
from interrupts import press_ctrl_c
from suanli.compute.speedups import onednn_bf16
from suanli.core.run import Run
from suanli.core.types import Batch
from suanli.machine import device
from suanli.training import checkpoint
from suanli.training.loop import Loop

Put = Callable[..., str]
Folder = Callable[..., Path]

SMALL = {
    "batch_size": 16,
    "epochs": 8,  # 24 steps: too few to measure, so planted speedups are used as they are
    "settings": {"model_args.widths": [8, 8], "optimizer": "sgd", "lr": 0.01, "ema_decay": 0.9},
}
STEPS = 24
# Computes a little differently, so that it shows which steps it took part in; and fails in the twentieth call.
ODD = "1.001 * model(x)"
FAILS = """
calls = []
def compute(x):
    calls.append(1)
    if len(calls) == 20 and model.training:
        {failure}
    return {answer}
step = replace(step, compute=compute)
"""


def failing(failure: str, answer: str = ODD) -> str:
    return FAILS.format(failure=failure, answer=answer).strip()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model_path / "weights.safetensors")


def same(one: Run, other: Run) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("risk", "failure", "says"),
    [
        ("backend", "raise RuntimeError('the kernel is broken')", "RuntimeError: the kernel is broken"),
        ("backend", "raise KeyError('x')", "KeyError: 'x'"),
        ("memory", "raise torch.OutOfMemoryError('CUDA out of memory')", "memory ran out"),
        ("memory", "raise RuntimeError('not enough memory: you tried to allocate')", "memory ran out"),
        ("numerics", "return model(x) * torch.nan", "The loss became nan at step"),
    ],
)
def test_without_a_checkpoint_it_begins_anew(
    picture_folder: Folder,
    speedup_folder: Put,
    capsys: pytest.CaptureFixture[str],
    risk: str,
    failure: str,
    says: str,
) -> None:
    root = picture_folder()
    speedup_folder("odd", failing(failure), risks=(risk,), tolerance=0.05)
    speedup_folder("other", "return step", risks=())
    run = suanli.train(root, **SMALL, checkpoint_every_s=1e6)
    (fallback,) = run.summary["fallbacks"]
    assert 15 <= fallback["step"] <= 20
    assert fallback["speedups"] == ["other"]
    assert says in fallback["said"]
    assert fallback["said"].endswith("going on from step 0 without odd")
    # A loss that is NaN comes with its own step.
    where = "" if risk == "numerics" else f"Step {fallback['step'] + 1} failed: "
    assert f"warning: {where}{fallback['said']}." in capsys.readouterr().err
    plan = run.summary["plan"]
    assert plan["speedups"] == ["other"]
    assert plan["dropped"]["odd"].startswith("it failed in training: ")
    assert (run.summary["status"], run.summary["steps"]) == ("finished", STEPS)
    assert same(run, suanli.train(root, **SMALL, speedups="none"))
    # Bad luck with numbers can have other reasons; what else has failed isn't used again.
    again = suanli.train(root, **(SMALL | {"epochs": 1}))
    assert ("odd" in again.summary["plan"]["speedups"]) == (risk == "numerics")
    assert again.summary["fallbacks"] == []


def test_with_a_checkpoint_it_goes_on_from_there(
    picture_folder: Folder, speedup_folder: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = picture_folder()
    speedup_folder("odd", failing("raise RuntimeError('broken')"), risks=("backend",), tolerance=0.05)
    fell = suanli.train(root, **SMALL, checkpoint_every_s=0)
    (fallback,) = fell.summary["fallbacks"]
    step = fallback["step"]
    assert 15 <= step <= 20
    assert f"going on from step {step} without odd" in fallback["said"]

    # The same by hand: as far with the speedup, then on without it.
    speedup_folder("as_odd", f"step = replace(step, compute=lambda x: {ODD})", tolerance=0.05)
    real = Loop._train_on

    def learn(loop: Loop, batch: Batch) -> torch.Tensor:
        if loop.progress.step + 1 == step:
            press_ctrl_c()
        return real(loop, batch)

    monkeypatch.setattr(Loop, "_train_on", learn)
    with pytest.raises(suanli.Interrupted):
        suanli.train(root, **SMALL, checkpoint_every_s=0, speedups="as_odd", out="by_hand")
    monkeypatch.setattr(Loop, "_train_on", real)
    assert checkpoint.last_step(Path("by_hand/checkpoints")) == step
    by_hand = suanli.train("by_hand", speedups="none")
    assert same(fell, by_hand)
    assert not same(fell, suanli.train(root, **SMALL, speedups="none"))


def test_one_after_the_other(picture_folder: Folder, speedup_folder: Put) -> None:
    root = picture_folder()
    speedup_folder("first", failing("raise RuntimeError('one')"), risks=("backend",), stage=1)
    speedup_folder(
        "second",
        failing("raise RuntimeError('two')"),
        risks=("backend",),
        stage=2,
    )
    run = suanli.train(root, **SMALL)
    assert [f["speedups"] for f in run.summary["fallbacks"]] == [["first"], []]
    assert run.summary["status"] == "finished"
    assert same(run, suanli.train(root, **SMALL, speedups="none"))


def test_what_no_speedup_can_have_caused_is_raised(picture_folder: Folder, speedup_folder: Put) -> None:
    speedup_folder("odd", failing("raise RuntimeError('broken')"), risks=("memory", "numerics"))
    with pytest.raises(RuntimeError, match="broken"):
        suanli.train(picture_folder(), **SMALL, out="run")
    assert not Path("run/model").exists()


def test_a_plan_that_the_user_named_stays(picture_folder: Folder, speedup_folder: Put) -> None:
    root = picture_folder()
    speedup_folder("odd", failing("raise RuntimeError('broken')"), risks=("backend",), tolerance=0.05)
    with pytest.raises(RuntimeError, match="broken"):
        suanli.train(root, **SMALL, speedups="odd")
    speedup_folder("nan", failing("return model(x) * torch.nan"), risks=("numerics",), tolerance=0.05)
    with pytest.raises(suanli.Diverged, match="became nan"):
        suanli.train(root, **SMALL, speedups="nan", out="diverged")
    assert Run.open("diverged").summary["status"] == "diverged"


def test_where_memory_runs_out_blocks_are_recomputed(
    picture_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the speedups that are shipped: none of the usual ones has cost the memory."""
    Path("tight.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def block():\n    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, channels, classes):\n"
        "        super().__init__()\n"
        "        self.stem, self.blocks = nn.Conv2d(channels, 8, 1), nn.Sequential(block(), block())\n"
        "        self.fc, self.calls = nn.Linear(8, classes), 0\n"
        "    def forward(self, x):\n"
        "        self.calls += self.training\n"
        "        if self.calls == 20 and 'forward' not in vars(self.blocks[0]):\n"
        "            raise RuntimeError('DefaultCPUAllocator: not enough memory')\n"
        "        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))\n"
        "def net(classes, in_channels, image_size):\n    return Net(in_channels, classes)\n"
    )
    run = suanli.train(picture_folder(), model="tight:net", batch_size=16, epochs=8)
    assert run.summary["status"] == "finished"
    (fallback,) = run.summary["fallbacks"]
    assert fallback["said"] == "memory ran out; going on from step 0 with activation_checkpointing"
    assert "activation_checkpointing" in run.summary["plan"]["speedups"]
    assert fallback["said"] in capsys.readouterr().err


def test_memory_that_still_runs_out_is_said_with_the_way_out(picture_folder: Folder, speedup_folder: Put) -> None:
    speedup_folder("odd", failing("raise MemoryError"), risks=("backend",))
    speedup_folder("activation_checkpointing", "return step", saves_memory=True, usual=False)
    with pytest.raises(suanli.MachineError, match="--batch-size 4 would fit"):
        suanli.train(picture_folder(), **SMALL)


# --- a learning rate that was too high ------------------------------------------------------------

WILD = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.head = nn.Linear(channels, classes)
    def forward(self, x):
        answers = self.head(x.mean((2, 3)))
        wild = self.head.weight.detach().abs().max() > 5
        return {else_} if self.training and wild else answers
def net(*, in_channels, classes):
    return Net(in_channels, classes)
"""


@pytest.mark.parametrize(
    ("else_", "says"),
    [
        ("answers * torch.nan", "The loss became nan at step"),
        ("answers * 0 + torch.randn_like(answers) * 60", "The loss climbed from"),
    ],
)
@pytest.mark.parametrize("speedups", ["auto", "none"])
def test_divergence_early_on_begins_again_at_a_lower_rate(
    picture_folder: Folder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    else_: str,
    says: str,
    speedups: str,
) -> None:
    # Where bfloat16 is fast, the plan may have it, and it would be blamed first.
    monkeypatch.setattr(device, "instruction_sets", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(onednn_bf16, "_rounds", lambda: False)
    name = "climbing" if "randn" in else_ else "breaking"  # an imported module stays
    Path(f"{name}.py").write_text(WILD.format(else_=else_))
    root = picture_folder(each=60)
    options: dict[str, object] = {
        "model": f"{name}:net",
        "batch_size": 8,
        "epochs": 30,
        "settings": {"optimizer": "sgd", "augment": [], "clip_norm": None, "warmup_epochs": 0.0, "weight_decay": 0.02},
        "checkpoint_every_s": 0,
        "speedups": speedups,
    }
    run = suanli.train(root, **options, lr=12.0)
    told = [f["said"] for f in run.summary["fallbacks"]]
    assert told[-1].startswith(says)
    assert told[-1].endswith("beginning again at a learning rate of 4")
    assert told[-1] in capsys.readouterr().err
    assert (run.summary["status"], run.recipe.lr) == ("finished", pytest.approx(4.0))
    # As if it had been told so at once.
    plan = {"speedups": ",".join(run.summary["plan"]["speedups"]) or "none", "threads": run.summary["plan"]["threads"]}
    assert same(run, suanli.train(root, **(options | plan), lr=run.recipe.lr))


def test_it_begins_again_once_and_only_early(picture_folder: Folder) -> None:
    Path("breaking.py").write_text(WILD.format(else_="answers * torch.nan"))
    root = picture_folder(each=60)
    options = {"model": "breaking:net", "batch_size": 8, "epochs": 30, "speedups": "none"}
    settings = {"optimizer": "sgd", "augment": [], "clip_norm": None, "warmup_epochs": 0.0, "weight_decay": 0.02}
    with pytest.raises(suanli.Diverged, match="became nan"):
        suanli.train(root, **options, settings=settings, lr=1e4, out="hopeless")
    (only,) = Run("hopeless").summary["fallbacks"]
    assert only["said"].endswith("at a learning rate of 3.3e+03")
    # Nor when it is gone on with: what happened before is known.
    with pytest.raises(suanli.Diverged, match="became nan"):
        suanli.train("hopeless", trust_code=True)
    assert len(Run("hopeless").summary["fallbacks"]) == 1
    # A warm-up that reaches the rate after a third of the run: by then it isn't begun again.
    with pytest.raises(suanli.Diverged, match="became nan"):
        suanli.train(root, **options, settings=settings | {"warmup_epochs": 29.0}, lr=20.0, out="late")
    assert Run("late").summary["fallbacks"] == []
