"""Training: it learns, it stops well, it goes on exactly, it says what went wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import suanli
from interrupts import press_ctrl_c
from suanli.core import registry
from suanli.core.run import Run
from suanli.core.types import Recipe
from suanli.training import checkpoint
from suanli.training.schedule import lr_factor

# Every part that has a state or draws random numbers, in a small net.
EVERYTHING = {
    "augment": ["crop(padding=1)", "flip", "mixup"],
    "ema_decay": 0.9,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "accumulate": 2,
    "class_weights": "balanced",
    "schedule": "one_cycle",
    "preprocess.channels": 3,
    "final_epochs": 1,
    "final_augment": ["flip"],
}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model_path / "weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_other_augmentations_take_over_in_the_final_epochs(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=20)
    common = {"epochs": 2, "batch_size": 16, "augment": []}
    plain, never, half, always = (
        weights(suanli.train(root, settings=common | changes))
        for changes in (
            {},
            {"final_augment": ["flip"]},
            {"augment": ["flip"], "final_epochs": 1},
            {"augment": ["flip"], "final_epochs": 99},
        )
    )
    assert same(plain, never)
    assert same(plain, always)
    assert not same(plain, half)


def test_it_learns_from_a_folder(picture_folder: Callable[..., Path]) -> None:
    run = suanli.train(picture_folder(each=80), epochs=6, batch_size=32)
    assert run.summary["status"] == "finished"
    assert run.metrics[-1]["split"] == "val"
    assert run.metrics[-1]["scores"]["accuracy"] >= 0.9
    assert run.scores_split == "val"  # the test split was not touched
    assert run.scores == run.metrics[-1]["scores"]
    assert not list(run.path.glob("evaluation/*"))


def test_text_learns_through_the_same_verb(text_table: Path) -> None:
    run = suanli.train(text_table, epochs=6, batch_size=32)
    assert run.metrics[-1]["scores"]["accuracy"] >= 0.9
    assert suanli.evaluate(run).scores["accuracy"] >= 0.8


def test_same_seed_same_weights_other_seed_other_weights(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    one, two, three = (suanli.train(root, epochs=2, seed=s, settings=EVERYTHING) for s in (1, 1, 2))
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(three))


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_stopping_anywhere_changes_nothing(picture_folder: Callable[..., Path], optimizer: str) -> None:
    """Stops after a few steps, again in the middle of an epoch, and goes on: same bits."""
    root = picture_folder(each=60)
    options = {
        "epochs": 3,
        "batch_size": 16,
        "settings": EVERYTHING | {"optimizer": optimizer, "lr": 0.01},
        "speedups": "channels_last",  # by name: with "auto" the plan of a step depends on how long others took
    }
    whole = suanli.train(root, **options)
    out = Path("stopped")
    for number, stop_at in enumerate((2, 9)):
        with (
            stop_after(stop_at),
            pytest.raises(suanli.Interrupted, match=rf"Stopped by Ctrl-C at step {stop_at} .*checkpoint is saved"),
        ):
            suanli.train(out) if number else suanli.train(root, out=out, **options)
        assert Run(out).summary["seconds"]["train"] > 0
    spent = Run(out).summary["seconds"]["train"]
    resumed = suanli.train(out)
    assert resumed.summary["status"] == "finished"
    assert resumed.summary["seconds"]["train"] > spent  # all of it, not only since the last stop
    assert same(weights(whole), weights(resumed))
    steps = [m["step"] for m in resumed.metrics if "loss" in m and "split" not in m]
    assert max(steps) == resumed.summary["steps"]


@contextmanager
def stop_after(step: int) -> Iterator[None]:
    """Ctrl-C when that step is reached."""
    from suanli.training.loop import Loop

    original, sent = Loop._train_on, []

    def learn(self: Loop, batch: object) -> torch.Tensor:
        if self.progress.step + 1 == step and not sent:  # a second Ctrl-C would end the process
            sent.append(step)
            press_ctrl_c()
        return original(self, batch)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_train_on", learn)
        yield


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "suanli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_checkpoint(run: Path, process: subprocess.Popen[str], after: int = 0) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = [int(p.stem.removeprefix("step-")) for p in run.glob("checkpoints/step-*.safetensors")]
        if steps and max(steps) > after:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no checkpoint came")


@pytest.mark.slow
def test_killed_and_terminated_runs_go_on_exactly(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=80)
    # Named: a second run of "auto" may have time to measure more, and then computes otherwise. A small network: each
    # step is followed by a checkpoint. One thread: two wait for each other wherever something else uses a core.
    speedups, widths = "channels_last", [8, 8, 8]
    options = ["--epochs", "30", "--batch-size", "16", "--checkpoint-every-s", "0", "--threads", "1"]
    options += ["--model", "speednet", "--set", f"model_args.widths={widths}", "--speedups", speedups]
    small = {"model": "speednet", "settings": {"model_args.widths": widths}}
    whole = suanli.train(root, epochs=30, batch_size=16, threads=1, speedups=speedups, **small)
    run = Path("killed")
    process = start("train", root, "--out", run, *options)
    await_checkpoint(run, process, after=5)
    process.kill()
    process.communicate(timeout=60)
    process = start("train", run, "--checkpoint-every-s", "0")
    reached = checkpoint.read_newest(run / "checkpoints")
    assert reached is not None
    await_checkpoint(run, process, after=reached.step)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "suanli train killed" in errors
    process = start("train", run)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert same(weights(whole), weights(Run(run)))


@pytest.mark.parametrize(
    ("optimizer", "verb", "needed"),
    [*((name, "train", []) for name in registry.names("optimizers")), ("sgd", "run", ["sklearn", "scipy"])],
)  # evaluation fits a linear baseline
def test_imports_only_what_it_needs(
    picture_folder: Callable[..., Path], optimizer: str, verb: str, needed: list[str]
) -> None:
    """torch's compiler alone takes as long as torch."""
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas", "matplotlib", "timm"]
    heavy += ["torch.onnx", "onnx", "onnxruntime", "openvino", "tensorboard", "mlflow", "wandb", "grpc"]
    line = [verb, str(picture_folder()), "--epochs", "1", "--batch-size", "16", "--speedups", "none", "--out", "run"]
    line += ["--set", f"optimizer={optimizer}"]
    code = "import sys; from suanli.cli import main\n"
    code += f"try: main({line})\nfinally: print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == [str(needed)]


def test_a_damaged_newest_checkpoint_costs_only_its_steps(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=60)
    whole = suanli.train(root, out="whole", epochs=3, batch_size=16, checkpoint_every_s=0, speedups="none")
    newest = max((whole.path / "checkpoints").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:1000])
    before = weights(whole)
    whole.write("summary.json", {"status": "interrupted"})
    resumed = suanli.train("whole", speedups="none")
    assert same(before, weights(resumed))


def test_more_epochs_is_explicit(picture_folder: Callable[..., Path]) -> None:
    run = suanli.train(picture_folder(), epochs=2)
    first = run.summary["steps"]
    with pytest.raises(suanli.UsageError, match="is finished.*--more-epochs"):
        suanli.train(run)
    with pytest.raises(suanli.UsageError, match="lr can't be changed"):
        suanli.train(run, lr=0.5, more_epochs=1)
    suanli.train(run, more_epochs=1)
    assert run.summary["steps"] == first * 3 // 2
    assert run.summary["epochs"] == 3


def test_more_epochs_needs_a_finished_run(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    with pytest.raises(suanli.UsageError, match="Name the directory of a run"):
        suanli.train(root, more_epochs=2)
    with stop_after(2), pytest.raises(suanli.Interrupted):
        suanli.train(root, out="stopped", epochs=2)
    with pytest.raises(suanli.UsageError, match="First let it finish"):
        suanli.train("stopped", more_epochs=2)


def test_changed_data_stops_a_resume(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    with stop_after(2), pytest.raises(suanli.Interrupted):
        suanli.train(root, out="stopped", epochs=2)
    (root / "class0" / "000.png").unlink()
    with pytest.raises(suanli.DataError, match=r"has changed since .* it has \d+ (train|val|test) examples, not \d+"):
        suanli.train("stopped")
    with pytest.raises(suanli.DataError):
        suanli.evaluate("stopped")


def test_data_that_was_moved_is_found_again(picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = picture_folder()
    with stop_after(2), pytest.raises(suanli.Interrupted):
        suanli.train(root, out="stopped", epochs=2)
    moved = root.rename(tmp_path / "elsewhere")
    with pytest.raises(suanli.DataError, match=r"isn't at .*pictures any more.*suanli train .*stopped --data NEWPATH"):
        suanli.run("stopped")
    other = picture_folder("other_pictures")
    with pytest.raises(suanli.DataError, match=r"has changed since .*: as many examples of each class|it has \d+"):
        suanli.train("stopped", moved_to=other)
    run = suanli.train("stopped", moved_to=moved)
    assert run.data["options"]["subject"] == run.data["source"] == str(moved)
    again = moved.rename(tmp_path / "again")
    with pytest.raises(suanli.DataError, match=r"isn't at .*any more.*suanli evaluate .*stopped --data NEWPATH"):
        suanli.evaluate(run)
    suanli.evaluate(run, data=again, split="testing")  # its own data at a third place: it is scored on its test split
    assert run.scores["accuracy"] >= 0
    assert run.data["source"] == str(again)
    shutil.copytree(again, moved)
    suanli.run(run, moved_to=moved)
    assert run.data["source"] == str(moved)
    with pytest.raises(suanli.UsageError, match="Name the run first"):
        suanli.train(moved, moved_to=moved)


def test_divergence_names_the_step_and_keeps_a_good_checkpoint(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=60)
    diverging = {"optimizer": "sgd", "schedule": "constant", "warmup_epochs": 0, "clip_norm": None}
    with pytest.raises(suanli.Diverged, match=r"at step \d+.*(last good checkpoint is kept|No checkpoint was due)"):
        suanli.train(
            root, out="run", model="alexnet", lr=1e30, epochs=5, batch_size=16, checkpoint_every_s=0, settings=diverging
        )
    saved = checkpoint.read_newest(Path("run/checkpoints"))
    if saved is not None:
        assert all(torch.isfinite(t).all() for t in saved.tensors.values() if t.is_floating_point())
    assert not Path("run/model/model.json").exists()


def test_early_stop_keeps_the_best(picture_folder: Callable[..., Path]) -> None:
    run = suanli.train(picture_folder(each=60), epochs=40, batch_size=32, settings={"early_stop": 2})
    assert run.summary["status"] == "stopped early"
    assert run.summary["epochs"] < 40
    best = max(m["scores"]["accuracy"] for m in run.metrics if m.get("split") == "val")
    assert suanli.evaluate(run, split="val").scores["accuracy"] == pytest.approx(best, abs=0.1)


def test_a_batch_that_does_not_fit_says_which_would(
    picture_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from suanli.training import forecast

    root = picture_folder(each=200, size=(32, 32))
    monkeypatch.setattr(forecast, "available_memory_bytes", lambda *_: 90_000_000)
    with pytest.raises(suanli.MachineError, match=r"--batch-size \d+ would fit"):
        suanli.train(root, model="speednet", batch_size=320)


def test_new_head_for_other_classes(picture_folder: Callable[..., Path]) -> None:
    small = {"epochs": 1, "model": "speednet", "settings": {"model_args.widths": [8, 8, 8]}}
    first = suanli.train(picture_folder("few", classes=2), **small)
    second = suanli.train(picture_folder("more", classes=3), weights=first.model_path / "weights.safetensors", **small)
    assert weights(second)["head.weight"].shape[0] == 3


def test_new_head_for_classes_of_other_names(
    picture_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = suanli.train(picture_folder(), epochs=1)
    again = picture_folder("again")
    suanli.train(again, weights=first, epochs=1)
    assert "part of a head for other classes" not in capsys.readouterr().err
    (again / "class0").rename(again / "animal")
    suanli.train(again, weights=first, epochs=1)
    assert "part of a head for other classes" in capsys.readouterr().err


def test_weights_that_do_not_fit(picture_folder: Callable[..., Path]) -> None:
    save_file({"something.else": torch.zeros(2)}, "other.safetensors")
    with pytest.raises(suanli.DataError):
        suanli.train(picture_folder(), weights="other.safetensors", model="resnet18")


def test_a_user_model(picture_folder: Callable[..., Path]) -> None:
    Path("mynet.py").write_text(
        "from torch import nn\n"
        "def tiny(classes, in_channels, image_size):\n"
        "    h, w = image_size\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * h * w, classes))\n"
    )
    run = suanli.train(picture_folder(), model="mynet:tiny", epochs=2)
    with pytest.raises(suanli.UsageError, match=r"built by 'mynet:tiny'.*--trust-code"):
        suanli.predict(run, "pictures/class0/000.png")
    (answer,) = suanli.predict(run, "pictures/class0/000.png", trust_code=True)
    assert answer.label in ("class0", "class1")
    assert suanli.evaluate(run, trust_code=True).scores["accuracy"] >= 0
    with pytest.raises(suanli.UsageError, match="--trust-code"):
        suanli.run(run)
    assert suanli.run(run, trust_code=True).scores
    with pytest.raises(suanli.UsageError, match="epochs can't be changed"):
        suanli.run(run, epochs=3, trust_code=True)


@pytest.fixture
def run(trained_on_pictures: Path, tmp_path: Path) -> Run:
    """A copy of a run, beside its data, to be changed."""
    shutil.copytree(trained_on_pictures, tmp_path, dirs_exist_ok=True)
    return Run(tmp_path / "made")


def test_a_model_folder_runs_no_code_of_its_own(run: Run) -> None:
    card = json.loads((run.model_path / "model.json").read_text())
    for where in (card, card["recipe"]):
        where["model"] = "subprocess:Popen"
    card["recipe"]["model_args"] = {"args": "touch struck", "shell": True}
    (run.model_path / "model.json").write_text(json.dumps(card))
    attempts = (
        lambda: suanli.predict(run, "pictures"),
        lambda: suanli.evaluate(run),
        lambda: suanli.train("pictures", weights=run.model_path),
    )
    for attempt in attempts:
        with pytest.raises(suanli.SuanliError, match="subprocess:Popen"):
            attempt()
    card["model"] = "speednet"  # the recipe inside is what builds the network
    (run.model_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(suanli.SuanliError):
        suanli.predict(run, "pictures")
    assert not Path("struck").exists()


def test_a_better_model_does_not_wear_old_scores(picture_folder: Callable[..., Path]) -> None:
    run = suanli.run(picture_folder(), epochs=1, out="made")
    assert run.scores_split == "test"
    suanli.train(run, more_epochs=1)
    assert run.scores_split == "val"
    assert not (run.path / "evaluation").exists()


def test_run_finishes_what_training_left(run: Run) -> None:
    assert suanli.run("made").scores
    assert (run.path / "report.html").exists()


def test_weights_of_another_kind(run: Run, text_table: Path) -> None:
    with pytest.raises(suanli.DataError, match="learned from image data, and this is text"):
        suanli.train(text_table, weights=run)


def test_text_weights_bring_their_vocabulary(text_table: Path) -> None:
    first = suanli.train(text_table, epochs=6, batch_size=32)
    lines = text_table.read_text().splitlines()
    other = text_table.with_name("other.tsv")
    other.write_text("\n".join([lines[0], *(f"zebra {line}" for line in lines[1:])]) + "\n")
    second = suanli.train(other, weights=first.path, epochs=1)
    one, two = (
        json.loads((r.model_path / "model.json").read_text())["preprocess"]["settings"] for r in (first, second)
    )
    assert one == two
    assert suanli.evaluate(second).scores["accuracy"] > 0.8


def test_accumulation_with_class_weights_is_the_same_batch() -> None:
    from suanli.core.registry import load

    task = load("tasks", "classification")(weights=(0.3, 1.0, 4.0))
    logits, targets = torch.randn(30, 3), torch.randint(0, 3, (30,))
    whole = task.loss(logits, {"class": targets})["cross_entropy"]
    parts = [
        task.loss(x, {"class": y})["cross_entropy"]
        for x, y in zip(logits.tensor_split(4), targets.tensor_split(4), strict=True)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet19"}, "Did you mean 'resnet18'"),
        ({"recipe": "photo"}, "Did you mean 'photos'"),
        ({"settings": {"learning_rate": 1}}, "Unknown recipe field"),
        ({"settings": {"label_smoothin": 1}}, "Did you mean 'label_smoothing'"),
        ({"settings": {"optimizer": "adam"}}, "Did you mean 'adamw'"),
        ({"settings": {"augment": "flop"}}, "Did you mean 'flip'"),
        ({"settings": {"preprocess.sise": 3}}, "Did you mean 'size'"),
        ({"epochs": -1}, "'epochs' can't be -1"),
        ({"batch_size": 0}, "'batch_size' can't be 0"),
        ({"speedups": "warp"}, "Unknown speedup"),
        ({"device": "tpu"}, "tpu"),
        ({"track": ["tensorbord"]}, "Did you mean 'tensorboard'"),
    ],
)
def test_wrong_options(picture_folder: Callable[..., Path], options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(suanli.UsageError, match=message):
        suanli.train(picture_folder(), **options)
    assert not Path("runs").exists()


RECIPES = st.builds(
    Recipe,
    schedule=st.sampled_from(["constant", "linear", "cosine", "one_cycle"]),
    warmup_epochs=st.floats(0, 5),
)


@settings(max_examples=200)
@given(RECIPES, st.integers(1, 500), st.integers(1, 60))
def test_the_rate_stays_in_its_bounds(recipe: Recipe, steps: int, per_epoch: int) -> None:
    factors = np.array([lr_factor(recipe, s, steps, per_epoch) for s in range(steps)])
    assert (factors > 0).all()
    assert (factors <= 1).all()
    peak = int(factors.argmax())
    assert (np.diff(factors[: peak + 1]) >= 0).all()
    assert (np.diff(factors[peak:]) <= 1e-12).all()


def test_a_run_from_another_thread(picture_folder: Callable[..., Path]) -> None:
    """Signals belong to the main thread; training must work elsewhere, too."""
    root = picture_folder()
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(suanli.train(root, epochs=1).summary["status"]))
    thread.start()
    thread.join()
    assert done == ["finished"]


def test_the_run_directory_is_readable_json(run: Run) -> None:
    for name in ("recipe.json", "environment.json", "data.json", "check.json", "summary.json", "model/model.json"):
        assert json.loads((run.path / name).read_text())
    measured = json.loads((run.path / "ledger.jsonl").read_text().splitlines()[0])
    assert measured["metric"] == "examples_per_s"
    assert measured["value"] > 0
    assert measured["recipe"] == run.recipe.digest
