"""A training goes over to another plan while it runs: decided on invented times, and switched on real networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import suanli
from suanli.compute.adaptation import FIRST_PAUSE_S, Adaptation, Change, Way
from suanli.compute.plan import plain_plan, plan_of_names, switch_plan
from suanli.compute.step_runner import AppliedSettings
from suanli.core.types import Plan, Step
from suanli.machine.device import detect

TWO, ONE = Way(speedups=("channels_last",)), Way(speedups=("channels_last",), threads=1)
PLAIN = Way(speedups=())
QUIET_S = {TWO: 0.1, ONE: 0.19, PLAIN: 0.2}
BUSY_S = {TWO: 0.35, ONE: 0.19, PLAIN: 0.7}  # beside one program that computes all the time


@dataclass
class Machine:
    """Runs an adaptation on invented times."""

    adaptation: Adaptation
    noise: random.Random = field(default_factory=lambda: random.Random(0))
    spread: float = 0.1
    now_s: float = 0.0
    steps: int = 0
    changes: list[Change] = field(default_factory=list)
    size: float = 1.0

    def train(self, seconds: float, times: dict[Way, float]) -> float:
        """For so long; gives the steps per second."""
        began, first = self.now_s, self.steps
        while self.now_s < began + seconds:
            took = times[self.adaptation.way] * math.exp(self.noise.gauss(0, self.spread))
            self.now_s += took
            self.steps += 1
            if (change := self.adaptation.record(took, self.size)) is not None:
                self.changes.append(change)
        return (self.steps - first) / (self.now_s - began)


def adaptation(
    entrants: Sequence[Way] = (),
    waiting: Callable[[], float] = lambda: 0.0,
    others: Callable[[], float | None] = lambda: None,
) -> Adaptation:
    made = Adaptation(
        TWO,
        entrants=entrants,
        beside_others=lambda way: [replace(way, threads=1)],
        waiting=waiting,
        others=others,
    )
    made.start(1.0)
    return made


@pytest.mark.parametrize(("tells", "share"), [(True, 0.48), (False, 0.38)])
def test_a_busy_machine_is_noticed_and_a_quiet_one_again(tells: bool, share: float) -> None:
    """Where the kernel tells what others use, no step is lost on trying too soon."""
    others = [0.0]
    asked = (lambda: 3 * others[0]) if tells else (lambda: None)
    machine = Machine(adaptation(waiting=lambda: others[0], others=asked))
    quiet = machine.train(20, QUIET_S)
    assert machine.changes == []
    others[0] = 0.3
    assert machine.train(20, BUSY_S) > share * quiet
    assert machine.adaptation.way == ONE
    assert [c.busy for c in machine.changes] == [True]
    others[0] = 0.0
    machine.train(30, QUIET_S)  # it looks again from time to time
    assert machine.adaptation.way == TWO
    assert [c.busy for c in machine.changes] == [True, False]


def test_one_that_was_busy_from_the_start_is_seen_by_waiting_threads() -> None:
    machine = Machine(adaptation(waiting=lambda: 0.3))
    machine.train(FIRST_PAUSE_S + 10, BUSY_S)
    assert machine.adaptation.way == ONE


@pytest.mark.parametrize("spread", [0.05, 0.15])
def test_noise_alone_changes_nothing_and_costs_little(spread: float) -> None:
    machine = Machine(adaptation(), spread=spread)
    assert machine.train(300, QUIET_S) > 0.96 / QUIET_S[TWO]
    assert machine.adaptation.planned == TWO


def test_a_plan_that_became_slower_than_plain_pytorch_is_given_up() -> None:
    machine = Machine(adaptation())
    machine.train(20, QUIET_S)
    machine.train(20, {TWO: 0.4, ONE: 0.6, PLAIN: 0.2})
    assert [change.way for change in machine.changes] == [PLAIN]


def test_where_nothing_else_is_faster_the_plan_stays() -> None:
    machine = Machine(adaptation())
    machine.train(20, QUIET_S)
    machine.train(60, {way: 3 * took for way, took in QUIET_S.items()})  # all are slow: a hot processor, say
    assert machine.changes == []


def test_plans_race_on_the_first_steps() -> None:
    machine = Machine(adaptation([PLAIN, TWO, PLAIN]))
    machine.train(10, QUIET_S)
    (change,) = machine.changes
    assert change.way == TWO
    assert change.gain is not None
    assert change.gain.ratio == pytest.approx(2, rel=0.3)


def test_a_plan_that_isnt_faster_than_plain_pytorch_loses_to_it() -> None:
    machine = Machine(adaptation([TWO, PLAIN]))
    machine.train(10, {TWO: 0.2, PLAIN: 0.2, ONE: 0.4})
    assert machine.changes[0].way == PLAIN


def test_a_race_starts_again_for_larger_pictures() -> None:
    other = Way(speedups=("allocator", "channels_last"))
    machine = Machine(Adaptation(TWO, entrants=[TWO, other, PLAIN]), size=0.5)
    machine.adaptation.start(0.5)
    machine.train(5, {TWO: 0.10, other: 0.105, PLAIN: 0.12})
    machine.size = 1.0
    machine.train(10, {TWO: 0.3, other: 0.2, PLAIN: 0.5})
    assert machine.adaptation.planned == other


def test_a_way_that_cant_be_used_leaves_the_race() -> None:
    made = Adaptation(TWO, entrants=[ONE, TWO, PLAIN])
    made.start(1.0)
    assert made.way == ONE
    made.withdraw()
    assert made.way == TWO


def test_the_last_way_that_is_left_is_the_plan() -> None:
    made = Adaptation(TWO, entrants=[ONE, TWO])
    made.start(1.0)
    while made.way == ONE:
        made.record(0.1, 1.0)
    change = made.withdraw()
    assert change is not None
    assert change.way == made.way == made.planned == ONE
    assert not made.is_racing


# --- on real networks -----------------------------------------------------------------------------


def test_switching_keeps_weights_and_optimizer() -> None:
    """A network that is switched to and fro has the bits of one that never was, where plans don't round."""
    device = detect("cpu")
    plans = [plain_plan(device), plan_of_names("channels_last,fused_optimizer", device), plain_plan(device, 1)]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    plain = Step(model=model, optimizer=optimizer)
    before = [t.clone() for t in (*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values()))]
    plan: Plan = plans[0]
    with AppliedSettings(plain) as settings:
        for new in (plans[1], plans[2], plans[1], plans[0]):
            step = switch_plan(plan, new, plain, device)
            settings.change(step)
            plan = new
            layout = torch.channels_last if "channels_last" in new.speedups else torch.contiguous_format
            assert model[0].weight.is_contiguous(memory_format=layout)
            assert optimizer.state[model[0].weight]["momentum_buffer"].is_contiguous(memory_format=layout)
            assert optimizer.param_groups[0]["fused"] is (True if "fused_optimizer" in new.speedups else None)
            assert torch.get_num_threads() == (new.threads or THREADS)
    after = [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.get_num_threads() == THREADS


THREADS = torch.get_num_threads()


def test_what_cant_be_turned_off_again_isnt_switched() -> None:
    device = detect("cpu")
    step = Step(model=torch.nn.Linear(2, 2), optimizer=None)
    with pytest.raises(ValueError, match="compile can't be turned on or off"):
        switch_plan(plain_plan(device), Plan(device="cpu", speedups=("compile",)), step, device)


def test_a_short_training_races_and_says_so(
    picture_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = picture_folder(each=120)
    options = {"model": "speednet", "batch_size": 8, "epochs": 3, "settings": {"progressive_resizing": []}}
    run = suanli.train(root, **options)  # type: ignore[arg-type]
    plan, steps = run.summary["plan"], run.summary["steps"]
    assert plan["origin"] == "raced"
    assert "raced in the first" in capsys.readouterr().err
    raced = [trial for trial in plan["trials"] if trial["ratio"]]
    assert len(raced) >= 2
    assert all(trial["error"] is not None for trial in raced)
    assert sum(trial["kept"] for trial in raced) == bool(plan["speedups"])
    first_steps = [first for first, _, _ in run.summary["plans"]]
    assert first_steps == sorted(first_steps)
    assert max(first_steps) < steps
    # The next training of this kind begins with that plan, whatever the sizes of its images.
    options["settings"] = {"progressive_resizing": [], "mixed_sizes": [0.5]}
    again = suanli.train(root, **options, seed=1)  # type: ignore[arg-type]
    assert (again.summary["plan"]["origin"], again.summary["plan"]["speedups"]) == ("cached", plan["speedups"])
    assert "raced" not in capsys.readouterr().err


def test_a_named_plan_never_changes(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=120)
    run = suanli.train(root, model="speednet", batch_size=8, epochs=3, speedups="channels_last", threads=1)
    assert "plans" not in run.summary
    assert run.summary["plan"]["speedups"] == ["channels_last"]
