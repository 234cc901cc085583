"""Planning: what helps is kept, what doesn't is dropped with the reason, and it costs little.

The network pauses in each step, so a planted speedup can make it as fast or slow as the test wants. The clock that
the planner reads goes on by these pauses alone, so a busy machine changes nothing.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import suanli
from suanli.compute import plan_cache, plan_search
from suanli.compute.plan import ORDER_OF_SUMS, check_threads, plain_plan
from suanli.compute.plan_cache import PlanCache
from suanli.compute.plan_trial import difference
from suanli.compute.speed_up import _OwnLoop
from suanli.compute.step_runner import Numbers
from suanli.core.types import Plan
from suanli.machine import device, timing

Put = Callable[..., str]

PAUSE_S = 0.01
PLENTY = 100_000  # steps: planning has time for everything


class Sleeper(nn.Module):
    """Counts the steps that any copy of it has computed, and the seconds that they took."""

    steps = 0
    now_s = 0.0

    def __init__(self, pause_s: float = PAUSE_S) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.pause_s = nn.Linear(6, 3), pause_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Sleeper.steps += 1
        Sleeper.pause(self.pause_s)
        return self.fc(x)

    @staticmethod
    def pause(seconds: float) -> None:
        Sleeper.now_s += seconds

    @staticmethod
    def perf_counter() -> float:
        Sleeper.now_s += 1e-6
        return Sleeper.now_s


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only measuring uses the clock of pauses; time limits use the real one."""
    pauses = SimpleNamespace(perf_counter=Sleeper.perf_counter)
    monkeypatch.setattr(plan_search, "time", pauses)
    monkeypatch.setattr(timing, "time", pauses)


INPUTS, TARGETS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def plan(*, pause_s: float = PAUSE_S, steps: int = PLENTY, speedups: str = "auto", cache: Path | None = None) -> Plan:
    Sleeper.steps = 0
    model = Sleeper(pause_s)
    step, result = suanli.speed_up(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        F.cross_entropy,
        (INPUTS, TARGETS),
        steps=steps,
        speedups=speedups,
        cache_dir=cache,
    )
    step.close()
    assert torch.equal(model.fc.weight, Sleeper().fc.weight)  # nothing is trained while planning
    return result


def key() -> str:
    model = Sleeper()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return _OwnLoop(model, optimizer, F.cross_entropy, (INPUTS, TARGETS), None).key


QUICK = "model.pause_s = 0.0"
DRAG = "model.pause_s *= 1.5"
SCALED = "step = replace(step, compute=lambda x: 2 * model(x))"
WRONG = {
    "scaled": SCALED,
    "swapped": "step = replace(step, compute=lambda x: model(x).roll(1, dims=0))",
    "not_a_number": "step = replace(step, compute=lambda x: model(x) * torch.nan)",
    "no_gradient": "model.fc.weight.register_hook(torch.zeros_like)",
    "half_gradient": "model.fc.bias.register_hook(lambda g: g / 2)",
    "infinite_gradient": "model.fc.weight.register_hook(lambda g: g / 0)",
    "other_shape": "step = replace(step, compute=lambda x: model(x)[:, :3].repeat(1, 2))",
}


def failing(error: str) -> str:
    return f"def compute(x):\n    raise {error}\nstep = replace(step, compute=compute)"


# --- what is kept ---------------------------------------------------------------------------------


def test_faster_is_kept_and_slower_dropped_with_its_ratio(speedup_folder: Put) -> None:
    speedup_folder("quick", QUICK)
    speedup_folder("drag", DRAG, usual=False)
    result = plan()
    assert result.origin == "measured"
    assert result.speedups == ("quick",)
    trial = next(t for t in result.trials if t.change == "+quick")
    assert trial.kept
    assert trial.ratio is not None
    assert trial.ratio > 5
    assert trial.error == 0
    assert trial.step_s is not None
    assert trial.step_s < PAUSE_S
    assert 2 <= trial.rounds <= plan_search.ROUNDS[1]


def test_slower_is_dropped_with_its_ratio(speedup_folder: Put) -> None:
    speedup_folder("drag", DRAG)
    result = plan()
    assert result.speedups == ()
    (trial,) = result.trials
    assert trial.ratio == pytest.approx(2 / 3, rel=0.1)
    assert result.dropped["drag"] == trial.reason
    assert "0.6" in trial.reason or "0.7" in trial.reason


def test_a_slow_speedup_in_the_short_list_is_removed(speedup_folder: Put) -> None:
    speedup_folder("half", "model.pause_s /= 4", stage=1)
    speedup_folder("drag", DRAG, stage=2)
    result = plan()
    assert [t.change for t in result.trials if t.kept] == ["+half +drag", "-drag"]
    assert result.speedups == ("half",)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_are_refused_with_the_error(speedup_folder: Put, name: str) -> None:
    speedup_folder(name, f"{QUICK}\n{WRONG[name]}")
    result = plan()
    assert result.speedups == ()
    (trial,) = result.trials
    assert not trial.kept
    assert trial.error is not None
    assert trial.error > ORDER_OF_SUMS
    assert trial.ratio is None  # not even timed
    assert f"differ by {trial.error:.2g}" in result.dropped[name]


def test_errors_within_the_speedups_tolerance_are_accepted(speedup_folder: Put) -> None:
    body = f"{QUICK}\nstep = replace(step, compute=lambda x: 1.01 * model(x))"
    speedup_folder("rounds", body, tolerance=0.05)
    assert plan().speedups == ("rounds",)
    speedup_folder("rounds", body, tolerance=1e-3)
    assert plan(cache=Path("another")).speedups == ()


@pytest.mark.parametrize(
    "error", ["RuntimeError('the kernel is broken.\\n  at line 7')", "KeyError('x')", "AssertionError"]
)
def test_a_speedup_that_raises_is_dropped_with_its_message(speedup_folder: Put, error: str) -> None:
    speedup_folder("broken", failing(error))
    speedup_folder("quick", QUICK)
    result = plan()
    assert result.speedups == ("quick",)  # though both were tried together at first
    assert result.dropped["broken"].startswith(f"failed: {error.partition('(')[0]}")
    assert "line 7" not in result.dropped["broken"]
    assert result.trials[0].change == "+broken +quick"
    assert not result.trials[0].kept


def test_a_speedup_that_raises_in_its_setup_or_later_is_dropped(speedup_folder: Put) -> None:
    speedup_folder("at_once", "raise OSError('no such library')", usual=False)
    late = (
        "left = [4]\ndef compute(x):\n    left[0] -= 1\n    if not left[0]:\n        raise RuntimeError('too late')\n"
    )
    speedup_folder("late", f"{late}    return model(x)\nstep = replace(step, compute=compute)", usual=False)
    result = plan()
    assert result.speedups == ()
    assert result.dropped == {"at_once": "failed: OSError: no such library", "late": "failed: RuntimeError: too late"}


@pytest.mark.parametrize(
    "error", ["torch.OutOfMemoryError('CUDA out of memory')", "MemoryError", "RuntimeError('not enough memory')"]
)
def test_running_out_of_memory_ends_only_the_trial(speedup_folder: Put, error: str) -> None:
    speedup_folder("hungry", failing(error))
    result = plan()
    assert result.speedups == ()
    assert result.dropped["hungry"].startswith("failed: ")


def test_a_first_step_that_hangs_is_ended(speedup_folder: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "FIRST_STEP_LIMIT_S", 0.2)
    speedup_folder("hangs", "step = replace(step, compute=lambda x: time.sleep(60))")
    alarms: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: alarms.append(number))
    own = signal.setitimer(signal.ITIMER_REAL, 50.0)
    try:
        started = time.perf_counter()
        result = plan()
        assert time.perf_counter() - started < 50  # not the minute that it sleeps
        assert "didn't end within" in result.dropped["hangs"]
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 50  # the caller's own alarm goes on
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *own)
    assert not alarms


def test_only_one_speedup_of_a_group_is_used(speedup_folder: Put) -> None:
    speedup_folder("first", "model.pause_s /= 2", group="g", stage=1)
    speedup_folder("second", "model.pause_s /= 8", group="g", stage=2)
    result = plan()
    assert result.speedups == ("second",)
    assert next(t for t in result.trials if t.change == "+second -first").kept
    with pytest.raises(suanli.UsageError, match="'first' and 'second' exclude each other"):
        plan(speedups="first,second")


def test_speedups_that_only_save_memory_arent_tried(speedup_folder: Put) -> None:
    speedup_folder("frugal", QUICK, saves_memory=True)
    result = plan()
    assert result.speedups == result.trials == ()
    assert "memory" in result.dropped["frugal"]


def test_speedups_between_processes_are_used_only_by_name(speedup_folder: Put) -> None:
    speedup_folder("quiet", QUICK, distributed_only=True)
    result = plan()
    assert result.speedups == result.trials == ()
    assert "only by name" in result.dropped["quiet"]
    assert plan(speedups="quiet").speedups == ("quiet",)


def test_compiling_comes_last_and_must_save_more_than_its_start_costs(
    speedup_folder: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan_search, "COMPILING_S", (0.3, 0.0))
    slow_start = (
        "seen = []\ndef compute(x):\n    model.pause(0 if seen else 0.3)\n    seen.append(1)\n    return model(x)\n"
    )
    speedup_folder(
        "compiled", f"{QUICK}\n{slow_start}step = replace(step, compute=compute)", slow_start=True, usual=False
    )
    speedup_folder("drag", DRAG)
    assert "would save" in plan(steps=70).dropped["compiled"]
    result = plan(cache=tmp_path / "c")
    assert [t.change for t in result.trials] == ["+drag", "+compiled"]
    assert result.speedups == ("compiled",)
    assert result.trials[-1].start_s == pytest.approx(0.3, abs=0.1)
    # A run too short to win the start back does without, though the plan is kept.
    short = plan(steps=10, cache=tmp_path / "c")
    assert (short.origin, short.speedups) == ("cached", ())
    assert "starting takes" in short.dropped["compiled"]
    assert plan(steps=PLENTY, cache=tmp_path / "c").speedups == ("compiled",)


# --- what planning costs --------------------------------------------------------------------------


def test_a_short_run_measures_nothing(speedup_folder: Put) -> None:
    speedup_folder("drag", DRAG, group="g")
    speedup_folder("quick", QUICK)
    speedup_folder("unusual", QUICK, usual=False)
    speedup_folder("other", QUICK, group="g", stage=60)
    result = plan(steps=plan_search.MIN_STEPS - 1)
    assert result.origin == "short list"
    assert result.speedups == ("drag", "quick")
    assert Sleeper.steps == 0


def test_planning_stops_at_its_share_of_time_and_continues_next_time(speedup_folder: Put, tmp_path: Path) -> None:
    for number in range(5):
        speedup_folder(f"drag{number}", DRAG, usual=False)
    pause_s, steps = 0.02, 500
    before, tried = 0, []
    for _ in range(8):
        result = plan(pause_s=pause_s, steps=steps, cache=tmp_path)
        if result.origin == "cached":
            break
        assert result.origin == "measured"
        assert Sleeper.steps <= 2 * plan_search.PLANNING_SHARE * steps
        assert result.seconds <= 2 * plan_search.PLANNING_SHARE * steps * pause_s
        assert len(result.trials) > before
        assert {n for n, r in result.dropped.items() if "not tried yet" in r} == {
            f"drag{n}" for n in range(len(result.trials), 5)
        }
        before = len(result.trials)
        tried.append(before)
    assert len(tried) > 1  # not all at once
    assert before == 5
    assert Sleeper.steps == 0  # what is known isn't measured
    assert set(result.dropped) == {f"drag{n}" for n in range(5)}


def test_a_search_starts_from_the_stored_plan(speedup_folder: Put, tmp_path: Path) -> None:
    speedup_folder("a_quick", "model.pause_s = 0.005")
    speedup_folder("drag", DRAG, usual=False)
    first = plan(pause_s=0.02, steps=200, cache=tmp_path)
    assert first.speedups == ("a_quick",)
    assert "not tried yet" in first.dropped["drag"]
    short = plan(pause_s=0.02, steps=10, cache=tmp_path)
    assert (short.speedups, Sleeper.steps) == (("a_quick",), 0)
    second = plan(pause_s=0.02, steps=PLENTY, cache=tmp_path)
    assert [t.change for t in second.trials] == ["+a_quick", "+drag"]
    assert second.speedups == ("a_quick",)
    assert plan(pause_s=0.02, cache=tmp_path).origin == "cached"


# --- what is kept on disk -------------------------------------------------------------------------


def test_the_stored_plan_is_the_measured_one(speedup_folder: Put, tmp_path: Path) -> None:
    speedup_folder("quick", QUICK)
    first = plan(cache=tmp_path)
    again = plan(cache=tmp_path)
    assert (again.origin, Sleeper.steps) == ("cached", 0)
    assert (again.speedups, again.trials, again.dropped) == (first.speedups, first.trials, first.dropped)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"plan": 3}',
        b'{"plan": {"speedups": [], "trials": [], "device": "cpu"}}',
        b'{"plan": {"speedups": ["of_another"], "trials": [], "device": "cpu"}, "complete": true, "refused": {}}',
        b'{"plan": {"speedups": [3], "trials": [], "device": "cpu"}, "complete": true, "refused": {}}',
        b'{"plan": {"speedups": [], "trials": [4], "device": "cpu"}, "complete": true, "refused": {}}',
        b'{"plan": {"speedups": [], "trials": [], "device": "cpu", "threads": 0}, "complete": true, "refused": {}}',
        b'{"plan": {"speedups": [], "trials": [], "device": "cpu", "new": 1}, "complete": true, "refused": {}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_plan_is_measured_again(speedup_folder: Put, tmp_path: Path, content: bytes) -> None:
    speedup_folder("quick", QUICK)
    path = PlanCache(tmp_path, key(), None).path
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert plan(cache=tmp_path).origin == "measured"
    assert json.loads(path.read_text())["plan"]["speedups"] == ["quick"]


def test_a_cache_that_cant_be_written_only_repeats_the_measuring(speedup_folder: Put, tmp_path: Path) -> None:
    speedup_folder("quick", QUICK)
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        result = plan(cache=tmp_path / "file" / "cache")
        assert (result.origin, result.speedups) == ("measured", ("quick",))


def test_a_speedup_that_the_gate_refused_isnt_used_again(speedup_folder: Put, tmp_path: Path) -> None:
    speedup_folder("quick", QUICK)
    speedup_folder("half", "model.pause_s /= 2", usual=False, stage=1)
    PlanCache(tmp_path, key(), None).refuse({"quick": "it cost 2 %"})
    result = plan(cache=tmp_path)
    assert result.speedups == ("half",)
    assert result.dropped["quick"] == "it cost 2 %"
    PlanCache(tmp_path, key(), None).refuse({"half": "this one too"})
    again = plan(cache=tmp_path)
    assert again.speedups == ()
    assert again.dropped == {"quick": "it cost 2 %", "half": "this one too"}
    assert plan(steps=10, cache=tmp_path).speedups == ()


def test_nothing_is_measured_while_another_process_measures(
    speedup_folder: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_cache, "LOCK_TIMEOUT_S", 0.1)
    speedup_folder("quick", QUICK)
    with PlanCache(tmp_path, "of another training", None).lock() as mine:
        assert mine
        result = plan(cache=tmp_path)
    assert (result.origin, result.speedups, Sleeper.steps) == ("short list", ("quick",), 0)
    assert "another process is planning" in capsys.readouterr().err
    assert plan(cache=tmp_path).origin == "measured"


def test_of_two_processes_one_measures_and_the_other_uses_its_plan(tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text(
        "from suanli.core.types import Speedup\n"
        "SPEEDUP = Speedup(name='nothing', stage=50, usual=True, apply=lambda step, _: step, why_not=lambda _: None)\n"
    )
    script = """
import sys, time, torch
from torch import nn
import suanli, suanli.compute.speedups
from suanli.core import registry as plugins
plugins.load_all("speedups")
suanli.compute.speedups.__path__ = [sys.argv[1]]  # nothing else is tried
plugins.names.cache_clear()
class Sleeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
    def forward(self, x):
        time.sleep(0.01)
        return self.fc(x)
model = Sleeper()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.randn(8, 6), torch.arange(8) % 3
from suanli.compute import plan_cache as plans
plans.LOCK_TIMEOUT_S = 60
_, plan = suanli.speed_up(model, optimizer, nn.functional.cross_entropy, batch, cache_dir=sys.argv[1], steps=9000)
print(plan.origin, len(plan.trials))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=120)[0].split() for process in both)
    assert [origin for origin, _ in outputs] == ["cached", "measured"]
    assert outputs[0][1] == outputs[1][1] != "0"


# --- named by the user ----------------------------------------------------------------------------


def test_a_named_plan_is_checked_not_measured(speedup_folder: Put) -> None:
    speedup_folder("drag", DRAG)
    result = plan(speedups="drag")
    assert (result.origin, result.speedups) == ("named", ("drag",))
    assert Sleeper.steps == 2  # a step of each
    assert result.trials[0].error == 0
    assert result.trials[0].ratio is None
    assert plan(speedups="none") == plain_plan(device.detect("cpu"))


@pytest.mark.parametrize(
    ("fields", "body", "error", "code", "says"),
    [
        ({"why_not": "there is no such unit"}, QUICK, suanli.MachineError, 4, "there is no such unit"),
        ({}, SCALED, suanli.GateError, 5, "outputs or gradients differ by 1"),
        ({}, WRONG["not_a_number"], suanli.GateError, 5, "outputs or gradients differ by inf"),
        (
            {},
            failing("RuntimeError('no kernel\\nhere')"),
            suanli.MachineError,
            4,
            "fail here: RuntimeError: no kernel.",
        ),
    ],
)
def test_a_named_speedup_that_cant_be_used(
    speedup_folder: Put, fields: dict[str, str], body: str, error: type[suanli.SuanliError], code: int, says: str
) -> None:
    speedup_folder("odd", body, **fields)
    with pytest.raises(error) as refused:
        plan(speedups="odd")
    assert refused.value.exit_code == code
    assert says in refused.value.message
    assert refused.value.fix


def test_unknown_and_needless_names_and_odd_threads() -> None:
    with pytest.raises(suanli.UsageError, match="Did you mean 'channels_last'"):
        plan(speedups="channel_last")
    with pytest.raises(suanli.UsageError, match="'compile' and 'compile_blocks' exclude each other"):
        plan(speedups="compile,compile_blocks")
    with pytest.raises(suanli.MachineError, match="no two-dimensional convolutions"):
        plan(speedups="channels_last")
    with pytest.raises(suanli.MachineError, match="NVIDIA"):
        plan(speedups="graphs")
    with pytest.raises(suanli.UsageError, match="--threads can't be 0"):
        check_threads(0)


# --- the difference between two ways of computing -------------------------------------------------

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def numbers(sizes: list[int], seed: int) -> Numbers:
    random = torch.Generator().manual_seed(seed)

    def some() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(2, n, generator=random) for n in sizes)

    return Numbers(outputs=some(), gradients=some())


@given(sizes=SIZES, seed=st.integers(0, 1000), error=st.floats(1e-4, 10))
def test_difference_is_the_relative_error(sizes: list[int], seed: int, error: float) -> None:
    right = numbers(sizes, seed)
    assert difference(right, right) == 0
    scaled = tuple(t * (1 + error) for t in right.outputs)
    off = replace(right, outputs=scaled)
    assert difference(right, off) == pytest.approx(error, rel=1e-2)
    steep = tuple(t * (1 + error) for t in right.gradients)
    off = replace(right, gradients=steep)
    assert difference(right, off) == pytest.approx(error / 4, rel=1e-2)


@given(sizes=SIZES, seed=st.integers(0, 1000), place=st.integers(0, 7), bad=st.sampled_from([math.nan, math.inf]))
def test_difference_is_infinite_where_a_number_isnt_finite(sizes: list[int], seed: int, place: int, bad: float) -> None:
    right, broken = numbers(sizes, seed), numbers(sizes, seed)
    tensors = [*broken.outputs, *broken.gradients]
    tensors[place % len(tensors)][-1, -1] = bad
    assert difference(right, broken) == math.inf


@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_other_shapes_differ_but_micro_batches_dont(sizes: list[int], seed: int) -> None:
    right = numbers(sizes, seed)
    longer = replace(right, outputs=(*right.outputs, torch.ones(2, 9)))
    assert difference(right, longer) == math.inf
    logits, values = torch.arange(12.0).view(4, 3), torch.arange(4.0)  # two outputs, of the batch and of two parts
    whole = replace(right, outputs=(logits, values))
    parts = replace(right, outputs=(logits[:2], values[:2], logits[2:], values[2:]))
    assert difference(whole, parts) == difference(parts, whole) == 0
    parts = replace(right, outputs=(logits[2:], values[2:], logits[:2], values[:2]))
    assert difference(whole, parts) > 0.1
