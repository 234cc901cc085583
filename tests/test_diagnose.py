"""The clock of a training step and the diagnosis: real timed work, and the rules that hold for all shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from suanli.compute.step_clock import (
    CAUGHT_UP_S,
    REPORTED,
    SKIPPED,
    DeviceClock,
    HostClock,
    Shares,
    StepClock,
    attribute_time,
)
from suanli.training.diagnose import COMPUTING, OVERHEADS, Facts, Watch, diagnose

CPU = Facts(device_type="cpu", batch_size=64, cores=2, threads=1)
GPU = Facts(device_type="cuda", batch_size=64, cores=16)


def compute(milliseconds: float) -> None:
    """Keeps the calling thread busy for this much CPU time."""
    end = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < end:
        pass


def sleep(milliseconds: float) -> None:
    time.sleep(milliseconds / 1e3)


def timed_step(clock: StepClock, **phases: Callable[[], None]) -> None:
    clock.begin()
    for name, work in phases.items():
        work()
        clock.mark(name)
    clock.end()


def timed(steps: int, **phases: Callable[[], None]) -> Shares:
    clock = HostClock()
    for _ in range(SKIPPED + steps):
        timed_step(clock, **phases)
    window = clock.window()
    assert window is not None
    return window


def shares_with(**shares: float) -> Shares:
    """These shares of the step; all others are None."""
    known: dict[str, float | None] = dict.fromkeys(REPORTED)
    return Shares(shares={**known, "host": 0.0, "idle": 0.0, **shares}, step_s=0.1, steps=17)


# --- the clock, on a CPU ---


def test_waiting_for_input_counts_as_input() -> None:
    window = timed(8, input=lambda: sleep(12), forward=lambda: compute(0.5), backward=lambda: compute(0.5))
    share = window.shares["input"]
    assert share is not None
    assert share > 0.5
    assert diagnose(window, CPU).limited_by == "input"


def test_computing_counts_as_its_phase_and_sleeping_in_it_as_idle() -> None:
    busy = timed(8, forward=lambda: compute(2), backward=lambda: compute(6))
    assert diagnose(busy, CPU).limited_by in ("computing", "idle")  # idle: another program took the core
    forward, backward = busy.shares["forward"], busy.shares["backward"]
    assert forward is not None
    assert backward is not None
    assert 2 < backward / forward < 4
    asleep = timed(8, forward=lambda: sleep(4), backward=lambda: compute(1))
    idle = asleep.shares["idle"]
    assert idle is not None
    assert idle > 0.6
    assert diagnose(asleep, CPU).limited_by == "idle"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can't be bound to a core here")
def test_another_program_on_the_core_shows_as_idle() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    rival = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    try:
        with subprocess.Popen(rival, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it has started
            window = timed(25, forward=lambda: compute(8))
            process.kill()
    finally:
        os.sched_setaffinity(0, before)
    idle = window.shares["idle"]
    assert idle is not None
    assert idle > 0.2  # half, if the kernel shares evenly
    assert window.cores_used is not None
    assert window.cores_used < 0.9


def test_a_name_may_come_twice_and_what_is_left_is_host() -> None:
    clock = HostClock()
    for _ in range(SKIPPED + 6):
        clock.begin()
        for _ in range(2):
            compute(1)
            clock.mark("forward")
            compute(1)
            clock.mark("backward")
        compute(4)
        clock.end()
    window = clock.window()
    assert window is not None
    forward, host = window.shares["forward"], window.shares["host"]
    assert forward is not None
    assert host is not None
    assert 1.5 < host / forward < 2.5


def test_a_phase_that_was_never_marked_is_unknown_and_not_zero() -> None:
    window = timed(2, input=lambda: None, forward=lambda: compute(1))
    assert set(window.shares) == set(REPORTED)
    assert window.shares["copy"] is None
    assert window.shares["communication"] is None
    assert window.shares["optimizer"] is None
    graph = timed(2, input=lambda: None, graph=lambda: compute(1))
    assert graph.shares["forward"] is None
    assert graph.shares["graph"] is not None
    assert "the captured forward and backward pass" in diagnose(shares_with(graph=0.9, host=0.1), GPU).verdict


def test_first_steps_are_skipped_and_windows_are_separate() -> None:
    clock = HostClock()
    for _ in range(SKIPPED):
        timed_step(clock, forward=lambda: sleep(20))
    assert clock.window() is None
    for _ in range(4):
        timed_step(clock, forward=lambda: compute(2.5))
    window = clock.window()
    assert window is not None
    assert window.steps == 4
    assert window.step_s < 0.02
    assert clock.window() is None


def test_one_hiccup_does_not_spoil_a_window() -> None:
    clock = HostClock()
    for number in range(SKIPPED + 20):
        timed_step(clock, input=(lambda: sleep(200)) if number == 9 else (lambda: None), forward=lambda: compute(2))
    window = clock.window()
    assert window is not None
    assert window.steps == 19
    share = window.shares["input"]
    assert share is not None
    assert share < 0.4  # 0.8 with it


def test_short_steps_are_not_all_timed() -> None:
    clock = HostClock(every_s=0.02)
    for _ in range(SKIPPED + 1):
        timed_step(clock)
    assert clock.window() is not None
    started = time.perf_counter()
    for _ in range(30):
        timed_step(clock, forward=lambda: sleep(1))
    took = time.perf_counter() - started
    window = clock.window()
    assert window is not None
    assert window.steps <= took / 0.01 + 1  # half of the interval is the least


def test_a_step_that_was_not_ended_does_not_count() -> None:
    clock = HostClock()
    for _ in range(SKIPPED + 2):
        timed_step(clock, forward=lambda: compute(0.1))
    clock.begin()
    clock.mark("input")
    timed_step(clock, forward=lambda: compute(0.1))
    window = clock.window()
    assert window is not None
    assert window.steps == 3
    assert window.shares["input"] is None


def test_an_unknown_phase_is_refused() -> None:
    clock = HostClock()
    for _ in range(SKIPPED):
        timed_step(clock)
    clock.begin()
    with pytest.raises(ValueError, match=r"no phase 'foward'; there are backward"):
        clock.mark("foward")


def test_a_device_whose_phases_cannot_be_timed_has_a_clock_that_reports_nothing() -> None:
    assert isinstance(StepClock.of(torch.device("cpu")), HostClock)
    clock = StepClock.of(torch.device("meta"))
    for _ in range(30):
        timed_step(clock, forward=lambda: None)
    assert clock.window() is None
    assert Watch(clock, lambda: CPU, 1).after_step(1) is None


# --- the clock, on a device with a queue ---

times = st.floats(0, 1e-2)


@given(st.lists(st.tuples(st.sampled_from(("input", "forward", "backward", "host")), times, times, times), min_size=1))
def test_every_second_of_a_step_is_attributed(phases: list[tuple[str, float, float, float]]) -> None:
    issued, reached, cpu = [0.0], [1e-5], [0.0]
    for _, host_s, device_s, cpu_s in phases:
        issued.append(issued[-1] + host_s)
        reached.append(max(reached[-1] + device_s, issued[-1]))
        cpu.append(cpu[-1] + cpu_s)
    parts = attribute_time([name for name, *_ in phases], issued, reached, cpu)
    assert all(took >= 0 for _, took in parts)
    assert sum(took for _, took in parts) == pytest.approx(reached[-1] - reached[0], abs=1e-12)


def test_time_is_attributed_to_the_slower_of_host_and_device() -> None:
    behind = 100 * CAUGHT_UP_S
    ahead_of_host = attribute_time(["forward"], [0.0, 0.003], [0.0, 0.003], [0.0, 0.002])
    assert dict(ahead_of_host) == pytest.approx({"forward": 0.0, "host": 0.002, "idle": 0.001})
    at_work = attribute_time(["forward"], [0.0, 0.003], [0.0, 0.003 + behind], [0.0, 0.003])
    assert dict(at_work) == pytest.approx({"forward": 0.003 + behind})
    waits = attribute_time(["input"], [0.0, 0.003], [0.0, 0.003], [0.0, 0.0])
    assert dict(waits) == pytest.approx({"input": 0.003})


@dataclass
class Queue:
    """A device that takes its time: an event is reached when all work that was issued before it is done. Its clock
    shows another time than the host's, and runs a little faster."""

    free_at_s: float = 0.0

    def work(self, milliseconds: float) -> None:
        self.free_at_s = max(self.free_at_s, time.perf_counter()) + milliseconds / 1e3

    def record(self) -> float:
        return max(self.free_at_s, time.perf_counter())

    def wait(self, event: float) -> None:
        time.sleep(max(0.0, event - time.perf_counter()))

    def seconds(self, first: float, second: float) -> float:
        return (second - first) * 1.002


def queued(step: Callable[[Queue, StepClock], None]) -> Shares:
    queue = Queue()
    clock = DeviceClock(queue)
    for _ in range(SKIPPED + 12):
        clock.begin()
        step(queue, clock)
        clock.end()
    window = clock.window()
    assert window is not None
    return window


def test_a_slow_device_is_limited_by_computing() -> None:
    def step(queue: Queue, clock: StepClock) -> None:
        queue.work(0.5)
        clock.mark("input")
        queue.work(2)
        clock.mark("forward")
        queue.work(4)
        clock.mark("backward")

    window = queued(step)
    assert window.shares["forward"] == pytest.approx(2 / 6.5, abs=0.1)
    assert window.shares["backward"] == pytest.approx(4 / 6.5, abs=0.1)
    assert window.step_s == pytest.approx(0.0065, rel=0.1)
    assert diagnose(window, GPU).limited_by == "computing"


def test_a_slow_host_starves_the_device() -> None:
    def issue(work: Callable[[float], None]) -> Shares:
        def step(queue: Queue, clock: StepClock) -> None:
            for name in ("forward", "backward"):
                queue.work(0.1)
                work(3)
                clock.mark(name)

        return queued(step)

    assert diagnose(issue(compute), GPU).limited_by in ("host", "idle")  # idle: another program took the core
    assert diagnose(issue(sleep), GPU).limited_by == "idle"


# --- shares ---


@given(st.dictionaries(st.sampled_from(("input", "copy", "forward", "backward", "optimizer")), st.integers(0, 3)))
def test_shares_sum_to_one(work: dict[str, int]) -> None:
    window = timed(2, **{name: lambda n=n: compute(n / 10) for name, n in work.items()})
    known = [share for share in window.shares.values() if share is not None]
    assert sum(known) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in known)
    assert {name for name, share in window.shares.items() if share is not None} == {*work, "host", "idle"}


parts = st.dictionaries(st.sampled_from((*OVERHEADS, *COMPUTING)), st.floats(0, 1), min_size=1)


@given(parts, st.sampled_from((CPU, GPU)), st.none() | st.floats(0.01, 1.2))
def test_the_limit_is_a_large_share_and_the_gain_a_bound(
    amounts: dict[str, float], facts: Facts, ceiling: float | None
) -> None:
    total = sum(amounts.values())
    assume(total > 1e-6)
    shares = shares_with(**{name: value / total for name, value in amounts.items()})
    diagnosis = diagnose(shares, replace(facts, share_of_ceiling=ceiling))
    names = COMPUTING if diagnosis.limited_by == "computing" else (diagnosis.limited_by,)
    share = sum(shares.shares.get(name) or 0.0 for name in names)
    overheads = [shares.shares[name] or 0.0 for name in OVERHEADS]
    if diagnosis.limited_by == "computing":
        assert max(overheads) < 0.25
        assert (diagnosis.gain_at_most is None) == (ceiling is None)
    else:
        assert share == max(overheads)
    if diagnosis.gain_at_most is not None:
        assert diagnosis.gain_at_most >= 1
    assert f"{100 * share:.0f} % of the step" in diagnosis.verdict
    json.dumps(diagnosis.to_json(), allow_nan=False)


# --- the words ---


def test_a_limit_by_input_names_the_work_and_the_augmentations() -> None:
    shares = shares_with(input=0.61, forward=0.2, backward=0.19)
    diagnosis = diagnose(shares, replace(CPU, augment=("flip", "cutout(size=8)"), speedups=("bf16",)))
    assert diagnosis.verdict == "limited by input: 61 % of the step goes into reading and augmentation"
    assert "now flip, cutout(size=8)" in diagnosis.remedy
    assert diagnosis.gain_at_most == pytest.approx(1 / 0.39)
    assert diagnosis.applied == ()
    assert str(diagnosis).endswith("At most 2.56 times as fast.")
    resident = diagnose(shares, replace(CPU, resident=True, size_setting="preprocess.size"))
    assert resident.verdict == "limited by input: 61 % of the step goes into normalising the batch"
    assert "--set preprocess.size=…" in resident.remedy


def test_an_unused_speedup_is_offered_with_those_in_use() -> None:
    shares = shares_with(forward=0.3, backward=0.6, host=0.1)
    facts = replace(CPU, speedups=("bf16", "channels_last", "fused_optimizer"), offered=("compile", "read_ahead"))
    diagnosis = diagnose(shares, facts)
    assert diagnosis.verdict == "limited by computing: 90 % of the step is the forward and backward pass"
    expected = "bf16 and channels_last are in use. Try --speedups bf16,channels_last,fused_optimizer,compile."
    assert diagnosis.remedy == expected
    assert diagnosis.applied == ("bf16", "channels_last")
    assert diagnosis.gain_at_most is None
    dropped = replace(facts, offered=(), dropped={"compile": "0.98 times as fast"}, share_of_ceiling=0.31)
    diagnosis = diagnose(shares, dropped)
    assert "at 31 % of the measured ceiling" in diagnosis.verdict
    assert "The plan left out compile." in diagnosis.remedy
    assert "--batch-size 128" in diagnosis.remedy
    assert diagnosis.gain_at_most == pytest.approx(1 / 0.31)
    assert "--model" in diagnose(shares, replace(dropped, share_of_ceiling=0.8)).remedy


def test_with_several_processes_other_programs_are_not_blamed() -> None:
    diagnosis = diagnose(shares_with(forward=0.3, idle=0.7), replace(CPU, processes=2))
    assert diagnosis.limited_by == "idle"
    assert "for other processes" in diagnosis.verdict
    assert "--batch-size 128" in diagnosis.remedy
    assert "ther programs" not in diagnosis.remedy


def test_waiting_for_cores_distinguishes_this_program_from_others() -> None:
    shares = replace(shares_with(idle=0.5, forward=0.2, backward=0.3), cores_used=1.0)
    two = diagnose(shares, replace(CPU, threads=2))
    assert two.verdict.endswith("50 % of the step is waiting for a core (this process got 1.0 of 2 cores)")
    assert "Other programs use the cores: end them, or use --threads 1" in two.remedy
    assert two.gain_at_most is None  # two threads wait actively, too
    assert diagnose(shares, CPU).gain_at_most == pytest.approx(2)
    own = diagnose(replace(shares, cores_used=1.95), replace(CPU, threads=2))
    assert own.remedy == "This process fills all cores: use --threads 1."
    assert "use --threads 2" in diagnose(shares, replace(CPU, threads=8)).remedy
    bound = diagnose(shares, replace(CPU, threads=2, offered=("bind_threads",)))
    assert bound.remedy == "Try --speedups bind_threads."


@pytest.mark.parametrize("limit", ["copy", "optimizer", "communication", "host"])
@pytest.mark.parametrize("facts", [CPU, GPU])
def test_every_other_limit_has_a_remedy_that_states_its_price(limit: str, facts: Facts) -> None:
    diagnosis = diagnose(shares_with(forward=0.5, **{limit: 0.5}), facts)
    assert diagnosis.limited_by == limit
    assert "changes what is learned" in diagnosis.remedy
    assert diagnosis.gain_at_most == pytest.approx(2)


# --- when to report ---


class FixedWindows(StepClock):
    """Gives the windows that a test chooses."""

    def __init__(self, limits: Iterator[str]) -> None:
        self._limits = limits

    def window(self) -> Shares:
        return shares_with(**{next(self._limits): 1.0})


def watched(limits: str, *, step_s: float = 0.1, steps: int = 10_000) -> list[tuple[int, str]]:
    """(step, limit) of all reports; i input, f forward, h host."""
    words = {"i": "input", "f": "forward", "h": "host"}
    step = 0
    watch = Watch(FixedWindows(words[c] for c in limits), lambda: CPU, steps, now=lambda: step * step_s)
    reports = []
    for step in range(1, steps + 1):
        try:
            diagnosis = watch.after_step(step)
        except StopIteration:
            break
        if diagnosis is not None:
            reports.append((step, diagnosis.limited_by))
    return reports


def test_the_first_diagnosis_comes_within_thirty_steps() -> None:
    assert watched("i") == [(20, "input")]
    assert watched("i", steps=5) == [(5, "input")]  # a run of five steps
    assert watched("i", step_s=30) == [(8, "input")]  # of long steps


def test_it_reports_again_only_when_another_limit_lasts() -> None:
    assert [limit for _, limit in watched("iiiii")] == ["input"]
    assert [limit for _, limit in watched("ififififif")] == ["input"]
    assert [limit for _, limit in watched("ifhfhfh")] == ["input"]
    assert [limit for _, limit in watched("iiffffhhi")] == ["input", "computing", "host"]


def test_later_windows_are_long_enough() -> None:
    assert watched("iff", step_s=0.1) == [(20, "input"), (20 + 2 * 50, "computing")]
    assert watched("iff", step_s=10) == [(8, "input"), (8 + 2 * 20, "computing")]


def test_the_newest_diagnosis_of_the_reported_limit_is_kept() -> None:
    clock = HostClock()
    watch = Watch(clock, lambda: CPU, 40)
    reports = []
    for step in range(1, 25):
        timed_step(clock, input=lambda: sleep(2), forward=lambda: compute(0.1))
        reports.append(watch.after_step(step))
    assert [d.limited_by for d in reports if d] == ["input"]
    assert reports[19] is watch.current
    assert watch.current is not None
    assert watch.current.steps == 20 - SKIPPED - 1
