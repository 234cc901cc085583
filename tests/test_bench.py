"""bench: variants that differ in how they compute and in nothing else, and the gate."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import suanli
import suanli.compute.speedups
from registered import forget
from suanli.cli import main
from suanli.core import registry
from suanli.core.types import Difference, Plan, Recipe
from suanli.machine import device
from suanli.machine.ceilings import Ceilings
from suanli.training.ablation_plan import cumulative_plans, divide_steps, shorten
from suanli.training.ablation_records import Ablation, Variant
from suanli.verbs.bench import check_options

SMALL = {"batch_size": 24, "device": "cpu", "settings": {"val_fraction": 0.3, "model_args.widths": [8, 16]}}


@pytest.fixture(autouse=True)
def known_ceilings(measured: tuple[Ceilings, Path], tmp_path: Path) -> None:
    shutil.copytree(measured[1], tmp_path / "cache")


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Puts a speedup with this body of `apply` into the room."""
    folder = tmp_path / "speedups"
    folder.mkdir()
    monkeypatch.setattr(suanli.compute.speedups, "__path__", [*suanli.compute.speedups.__path__, str(folder)])
    planted = []

    def add(name: str, body: str, **fields: object) -> str:
        more = "".join(f", {field}={value!r}" for field, value in fields.items())
        (folder / f"{name}.py").write_text(
            "from dataclasses import replace\nfrom suanli.core.types import Speedup\n"
            f"def apply(step, device):\n{indent(body, '    ')}\n"
            f"SPEEDUP = Speedup(name={name!r}, apply=apply, why_not=lambda device: None{more})\n"
        )
        planted.append(name)
        registry.names.cache_clear()
        return name

    yield add
    forget("speedups", planted)


NOTHING = "return step"
NO_LEARNING = """for group in step.optimizer.param_groups:
    group["initial_lr"] = 0.0
return step"""
FAILS_AT = """calls = []
def compute(inputs):
    calls.append(1)
    if len(calls) == {call}:
        raise RuntimeError("no kernel for this")
    return step.model(inputs)
return replace(step, compute=compute)"""


# --- whole ablations ------------------------------------------------------------------------


def test_every_figure_of_every_variant(picture_folder: Callable[..., Path]) -> None:
    """The file has what the schema says, and the figures agree with each other."""
    if "bfloat16" not in device.detect("cpu").fast_dtypes:
        pytest.skip("this processor has no fast bfloat16")
    names = "channels_last,bf16"
    result = suanli.bench(picture_folder(each=60), speedups=names, steps=20, rounds=3, price_per_hour=3.6, **SMALL)
    figures = json.loads((result.run.path / "bench.json").read_text())
    assert figures | {"run": str(result.run.path), "scores": result.to_json()["scores"]} == json.loads(
        json.dumps(result.to_json())
    )
    assert result.run.path.name == "pictures-bench-1"
    assert [one["name"] for one in figures["rungs"]] == ["plain PyTorch", "+ channels_last", "+ bf16"]
    assert (figures["steps"], figures["rounds"], figures["headline"], figures["tolerance"]) == (
        20,
        3,
        "accuracy",
        0.005,
    )
    ceilings = figures["ceiling_flops"]
    for variant in figures["rungs"]:
        assert set(variant["scores"]) >= {"accuracy", "log_loss"}
        for name, unit in (("train", "step"), ("evaluate", "batch")):
            phase = variant[name]
            rate = phase["examples_per_s"]["median"]
            assert rate > 0
            assert 0 < phase[f"{unit}_ms_p50"] <= phase[f"{unit}_ms_p95"]
            assert phase["examples_per_price"] == pytest.approx(1000 * rate)
            assert 0 < phase["share_of_ceiling"] < 2  # the ceilings were measured hastily
            if sys.platform.startswith("linux") and phase["peak_memory_bytes"] is not None:
                assert 50e6 < phase["peak_memory_bytes"] < 20e9
    plain, *others = figures["rungs"]
    assert plain["train"]["ratio"] == {"median": 1.0, "half_iqr": 0.0}
    assert plain["difference"] is None
    for variant in others:
        change = variant["difference"]
        assert change["low"] <= change["median"] <= change["high"]
        gained = variant["scores"]["accuracy"] - plain["scores"]["accuracy"]
        assert change["median"] == pytest.approx(gained)
    share = [one["train"]["share_of_ceiling"] / one["train"]["examples_per_s"]["median"] for one in figures["rungs"]]
    assert share[0] == pytest.approx(share[1])
    assert share[0] * ceilings["float32"] == pytest.approx(share[2] * ceilings["bfloat16"])
    lines = [json.loads(line) for line in (result.run.path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["metric"], line["variant"]) for line in lines[::2]] == [
        ("examples_per_s", "none"),
        ("examples_per_s", "channels_last"),
        ("examples_per_s", "channels_last+bf16"),
    ]
    assert lines[0]["scores"]["val_accuracy"] == plain["scores"]["accuracy"]
    assert (result.run.path / "report.html").exists()
    assert not (result.run.path / "model").exists()


def test_a_training_of_one_step_is_refused(picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(suanli.UsageError, match="The training has 1 step; bench needs at least 2. Raise --epochs"):
        suanli.bench(picture_folder(), **SMALL | {"epochs": 1, "batch_size": 4096})


def test_a_variant_trains_as_if_it_were_alone(picture_folder: Callable[..., Path], plant: Callable[..., str]) -> None:
    """In turn with others or in one go: same bits. And the steps are the first ones of a real training."""
    root = picture_folder(each=60)
    settings = SMALL["settings"] | {"augment": ["flip"], "ema_decay": 0.9, "warmup_epochs": 1.0}
    name = plant("nothing", NOTHING, stage=1)
    options = SMALL | {"settings": settings}
    result = suanli.bench(root, speedups=name, steps=15, epochs=4, rounds=4, **options)
    plain, same = result.ablation.variants
    assert plain.scores == same.scores
    assert same.difference is not None
    assert same.difference.median == 0
    trained = suanli.train(root, recipe=result.run.recipe, speedups="none", device="cpu")
    assert trained.metrics[-1]["step"] == 15
    assert trained.metrics[-1]["scores"] == plain.scores


def test_what_costs_accuracy_is_refused_and_not_used_again(
    picture_folder: Callable[..., Path], speedup_folder: Callable[..., str]
) -> None:
    """Its first step has plain PyTorch's numbers, and it says itself that any error is fine."""
    root = picture_folder(each=60)
    name = speedup_folder("stands_still", NO_LEARNING, tolerance=1e9)
    with pytest.raises(suanli.GateError, match=r"it loses too much: accuracy -\d.*with another seed") as stopped:
        suanli.bench(root, steps=30, epochs=4, rounds=2, **SMALL)
    assert name in stopped.value.fix
    figures = json.loads(Path("runs/pictures-bench-1/bench.json").read_text())
    refused = {one["name"]: one["refused"] for one in figures["rungs"]}
    assert refused["plain PyTorch"] is None
    assert "accuracy" in refused[f"+ {name}"]
    again = suanli.bench(root, steps=10, epochs=4, rounds=1, **SMALL)
    assert name not in again.ablation.plan.speedups
    assert "gate rejected" in again.ablation.plan.dropped[name]


@pytest.mark.long
def test_the_command_prints_a_refusal_with_its_figures(picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As another program sees it: exit code 5, one JSON object."""
    code = f"""
import sys, suanli.compute.speedups, suanli.cli
suanli.compute.speedups.__path__.append({str(tmp_path / "room")!r})
suanli.cli.main(sys.argv[1:])
"""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "harmful.py").write_text(
        f"from suanli.core.types import Speedup\ndef apply(step, device):\n{indent(NO_LEARNING, '    ')}\n"
        "SPEEDUP = Speedup(name='harmful', stage=1, apply=apply, why_not=lambda device: None)\n"
    )
    root = picture_folder(each=60)
    arguments = ["bench", root, "--speedups", "harmful", "--steps", 30, "--rounds", 2, "--batch-size", 24]
    arguments += ["--set", "val_fraction=0.3", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    figures = json.loads(done.stdout)
    assert figures["exit_code"] == 5
    assert "harmful" in figures["error"]
    assert figures["rungs"][1]["refused"] in figures["error"]
    assert figures["rungs"][1]["train"]["examples_per_s"]["median"] > 0
    assert figures["seconds"] > 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("call", [4, 15])
def test_what_fails_is_named_and_the_others_go_on(
    picture_folder: Callable[..., Path], plant: Callable[..., str], call: int
) -> None:
    """In the steps that warm up, or in a timed round."""
    root = picture_folder(each=60)
    name = plant("brittle", FAILS_AT.format(call=call), stage=1)
    with pytest.raises(suanli.MachineError, match="brittle doesn't run here: RuntimeError: no kernel for this"):
        suanli.bench(root, speedups=f"{name},channels_last", steps=20, rounds=2, **SMALL)
    _, failed, other = json.loads(Path("runs/pictures-bench-1/bench.json").read_text())["rungs"]
    assert (failed["failed"], failed["train"], failed["scores"]) == (True, None, {})
    if call == 4:  # it was left out before the next variant began
        assert other["speedups"] == ["channels_last"]
        assert other["refused"] is None
        assert other["train"]["ratio"]["median"] > 0
    else:
        assert other["failed"]


def test_auto_skips_what_fails(picture_folder: Callable[..., Path], speedup_folder: Callable[..., str]) -> None:
    speedup_folder("brittle", FAILS_AT.format(call=4))
    result = suanli.bench(picture_folder(each=60), steps=12, epochs=2, rounds=2, **SMALL)
    assert [variant.name for variant in result.ablation.variants if variant.failed] == ["+ brittle"]
    assert "brittle" not in result.ablation.full.speedups
    assert result.ablation.full.train is not None


def test_time_ends_it_between_rounds(picture_folder: Callable[..., Path]) -> None:
    result = suanli.bench(picture_folder(each=60), speedups="channels_last", rounds=6, time_budget_s=0.01, **SMALL)
    figures = result.to_json()
    assert figures["rounds"] == 1
    assert 2 <= figures["steps"] < figures["planned_steps"]
    assert [variant["train"]["examples_per_s"]["half_iqr"] for variant in figures["rungs"]] == [None, None]
    assert any("the learning rate had not come down" in remark for remark in result.ablation.remarks())


def test_a_narrow_terminal(
    picture_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = f"bench {picture_folder(each=60)} --speedups channels_last --steps 6 --rounds 1 --device cpu"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert not ended.value.code
    done = capsys.readouterr()
    assert max(map(len, done.out.splitlines())) <= 60
    for word in ("Training", "Evaluation", "plain PyTorch", "+ channels_last", "after 6 equal steps", "Report: "):
        assert word in done.out
    assert "price" not in done.out  # nobody gave one
    assert "can't show a loss" in done.err


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 1), ("rounds", 0), ("time_budget_s", 0.0), ("price_per_hour", -1.0)]
)
def test_values_that_cannot_be(option: str, value: float) -> None:
    with pytest.raises(suanli.UsageError, match=f"--{option.replace('_', '-')} can't be"):
        suanli.bench("digits", **{option: value})
    assert not Path("runs").exists()


def test_no_limit_is_a_value_that_can_be() -> None:
    check_options(None, 1, None, None)


# --- variants -------------------------------------------------------------------------------


@given(st.integers(2, 5000), st.integers(1, 40))
def test_blocks_add_up_to_the_steps(steps: int, rounds: int) -> None:
    warm_up, *timed = divide_steps(steps, rounds)
    assert warm_up + sum(timed) == steps
    assert warm_up >= 1
    assert 1 <= len(timed) <= rounds
    assert min(timed) >= 1
    assert max(timed) - min(timed) <= 1


@given(st.integers(1, 10_000), st.integers(1, 3000), st.floats(0.01, 300), st.floats(0, 20))
def test_a_shortened_recipe_has_these_steps(steps: int, per_epoch: int, epochs: float, warmup: float) -> None:
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup, unfreeze_epochs=2 * warmup, early_stop=2)
    short = shorten(recipe, steps, per_epoch)
    assert round(short.epochs * per_epoch) == steps
    assert short.warmup_epochs / short.epochs == pytest.approx(warmup / epochs)
    assert short.unfreeze_epochs == pytest.approx(2 * short.warmup_epochs)
    assert short.early_stop is None


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True), st.sampled_from([None, 3]))
def test_each_variant_adds_one_change(speedups: list[str], threads: int | None) -> None:
    plan = Plan(device="cpu", speedups=tuple(speedups), threads=threads)
    plans = cumulative_plans(plan)
    assert plans[0][1].speedups == ()
    assert plans[0][1].threads is None
    assert (plans[-1][1].speedups, plans[-1][1].threads) == (plan.speedups, plan.threads)
    assert [name for name, _ in plans[1:]] == [*(["+ threads=3"] if threads else []), *(f"+ {n}" for n in speedups)]
    for (_, below), (_, above) in itertools.pairwise(plans):
        assert (len(above.speedups) - len(below.speedups)) + (above.threads != below.threads) == 1


def test_torch_own_threads_are_no_variant() -> None:
    plan = Plan(device="cpu", speedups=("a",), threads=torch.get_num_threads())
    assert [name for name, _ in cumulative_plans(plan)] == ["plain PyTorch", "+ a"]


def variant(name: str, *speedups: str, refused: str | None = None, failed: bool = False) -> Variant:
    nothing = {"train": None, "evaluate": None, "scores": {}, "difference": None, "again": None}
    return Variant(name=name, speedups=speedups, threads=1, refused=refused, failed=failed, **nothing)  # type: ignore[arg-type]


def ablation(*more: Variant) -> Ablation:
    return Ablation(
        device="cpu",
        batch_size=1,
        rounds=1,
        steps=2,
        planned_steps=2,
        metric="accuracy",
        tolerance=0.005,
        validation_examples=100,
        price_per_hour=None,
        ceiling_flops=None,
        plan=Plan(device="cpu", speedups=()),
        variants=(variant("plain PyTorch"), *more),
    )


def test_the_harmful_one_is_the_first_after_which_nothing_is_accepted() -> None:
    a, b, c = variant("+ a", "a"), variant("+ b", "a", "b"), variant("+ c", "a", "b", "c")
    bad = "it loses"
    assert ablation(a, b, c).harmful_speedups() == ()
    assert ablation(a, replace(b, refused=bad), replace(c, refused=bad)).harmful_speedups() == ("b",)
    assert ablation(replace(a, refused=bad), b, replace(c, refused=bad)).harmful_speedups() == ("c",)
    assert ablation(a, replace(b, refused=bad), c).harmful_speedups() == ()
    assert ablation(replace(a, refused="no", failed=True), variant("+ b", "b", refused=bad)).harmful_speedups() == (
        "b",
    )


def test_bad_luck_of_one_seed_is_named_and_not_refused() -> None:
    lost, even = Difference(median=-0.1, low=-0.12, high=-0.08), Difference(median=0.0, low=-0.01, high=0.01)
    lucky = replace(variant("+ a", "a"), difference=lost, again=even)
    assert any("chance" in remark for remark in ablation(lucky).remarks())
    assert any("100 validation examples can't show a loss of 0.50%" in remark for remark in ablation(lucky).remarks())
    assert not list(ablation().remarks())
