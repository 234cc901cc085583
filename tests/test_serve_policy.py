"""The rules by which requests become batches, as properties of all curves and all loads; then with a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import DIES, GOOD, NAN, SHAPE, SLEEPS, THROWS, engines, pictures, register
from suanli.serving import batching
from suanli.serving.batching import Batcher
from suanli.serving.figures import BUCKETS_S, LAST, Figures, Times
from suanli.serving.policy import AS_GOOD, Curve, Policy
from suanli.serving.protocol import Refusal
from suanli.serving.thread_choice import ThreadChoice
from suanli.serving.worker import Worker, start_worker

seconds = st.floats(1e-6, 10.0)
points = st.dictionaries(st.sampled_from((1, 2, 3, 4, 8, 16, 32, 64, 100)), seconds, min_size=1)
curves = points.map(Curve)
targets = st.none() | st.floats(1e-4, 10.0)
policies = st.builds(lambda c, t, m: Policy(c, p99_s=t, most=m), curves, targets, st.integers(1, 64))


# --- the curve ---


@given(points, st.integers(1, 200))
def test_a_larger_batch_never_takes_less_time(measured: dict[int, float], size: int) -> None:
    curve = Curve(measured)
    assert 0 < curve.seconds(size) <= curve.seconds(size + 1) * (1 + 1e-9)
    assert math.isfinite(curve.seconds(10**6))
    assert curve.rate(size) > 0


@given(points)
def test_measured_sizes_take_what_was_measured(measured: dict[int, float]) -> None:
    """But for a measurement that says a larger batch is quicker, which is noise."""
    curve, most = Curve(measured), 0.0
    for size in sorted(measured):
        most = max(most, measured[size])
        assert curve.seconds(size) == most


def test_sizes_between_and_beyond() -> None:
    curve = Curve({2: 2.0, 4: 3.0, 8: 7.0})
    assert [curve.seconds(size) for size in (1, 2, 3, 4, 6, 8, 10)] == [2.0, 2.0, 2.5, 3.0, 5.0, 7.0, 9.0]
    one = Curve({4: 1.0})
    assert [one.seconds(size) for size in (1, 4, 8)] == [1.0, 1.0, 2.0]


# --- batches ---


@given(curves, targets, st.integers(1, 64))
def test_a_batch_fits_and_leaves_time_for_the_one_before_it(curve: Curve, target: float | None, most: int) -> None:
    policy = Policy(curve, p99_s=target, most=most)
    assert 1 <= policy.batch <= most
    assert policy.target_s == target or target is None
    assert policy.batch == 1 or 2 * curve.seconds(policy.batch) <= policy.target_s
    assert policy.reachable == (2 * curve.seconds(1) <= policy.target_s)


@given(policies)
def test_no_batch_within_the_target_is_much_better(policy: Policy) -> None:
    for size in (1, 2, 4, 8, 16, 32, 64):
        if size <= policy.batch and 2 * policy.curve.seconds(size) <= policy.target_s:
            assert policy.curve.rate(policy.batch) >= AS_GOOD * policy.curve.rate(size) * (1 - 1e-9)


def test_an_engine_that_gains_nothing_by_batches_gets_single_inputs() -> None:
    policy = Policy(Curve({size: 0.004 * size for size in (1, 2, 4, 8, 16)}), p99_s=1.0, most=64)
    assert policy.batch == 1


def test_an_engine_for_which_batches_are_free_gets_large_ones() -> None:
    policy = Policy(Curve({1: 0.01, 64: 0.011}), p99_s=0.25, most=64)
    assert policy.batch == 64


# --- which requests are refused ---


@given(policies, st.integers(1, 5000))
def test_an_idle_server_accepts_any_request(policy: Policy, more: int) -> None:
    assert policy.retry_after_s(0, more) is None


@given(policies, st.integers(1, 500), st.integers(1, 64), st.integers(0, 100))
def test_a_request_that_is_refused_would_be_refused_behind_more_inputs_too(
    policy: Policy, rows: int, more: int, further: int
) -> None:
    again_s = policy.retry_after_s(rows, more)
    if again_s is None:
        assert policy.predicted_s(rows + more) <= policy.target_s
    else:
        assert 0 < again_s < math.inf
        assert policy.retry_after_s(rows + further, more) is not None


@given(policies, st.integers(0, 500))
def test_one_more_input_is_never_answered_sooner(policy: Policy, rows: int) -> None:
    assert policy.predicted_s(rows) <= policy.predicted_s(rows + 1) * (1 + 1e-9)


@given(policies, st.integers(1, 64), st.floats(0.1, 10.0))
def test_the_pace_follows_what_is_observed(policy: Policy, size: int, times: float) -> None:
    for _ in range(200):
        policy.add_batch_time(size, times * policy.curve.seconds(size))
    assert policy.pace == pytest.approx(times, rel=0.01)
    one = policy.curve.seconds(min(1, policy.batch))
    assert policy.predicted_s(1) == pytest.approx(one * times, rel=0.01)


@given(policies, st.lists(st.tuples(st.integers(1, 64), st.floats(0, 100.0)), max_size=20))
def test_no_observation_leads_to_invalid_values(policy: Policy, observed: list[tuple[int, float]]) -> None:
    for size, took in observed:
        policy.add_batch_time(size, took)
    assert 0 <= policy.pace < math.inf
    assert policy.retry_after_s(0, 1) is None


@given(policies, st.lists(st.floats(0, 100.0), max_size=20), st.integers(1, 500))
def test_time_outside_the_engine_refuses_more_and_never_accepts_what_the_curve_refuses(
    policy: Policy, outside: list[float], rows: int
) -> None:
    refused = policy.retry_after_s(rows, 1) is not None
    for seconds in outside:
        policy.add_outside_time(seconds)
    assert policy.retry_after_s(0, 1) is None
    assert policy.retry_after_s(rows, 1) is not None or not refused


def test_time_outside_the_engine_counts_and_counts_more_where_it_varies() -> None:
    """In a target of 100 ms, with a batch of 10 ms for each: 20 ms of decoding, or now 10 and now 30."""
    steady, varying = (Policy(Curve({1: 0.01}), p99_s=0.1, most=1) for _ in range(2))
    for number in range(100):
        steady.add_outside_time(0.02)
        varying.add_outside_time(0.03 if number % 2 else 0.01)
    assert [steady.retry_after_s(rows, 1) is None for rows in (6, 8)] == [True, False]
    assert [varying.retry_after_s(rows, 1) is None for rows in (3, 6)] == [True, False]


def test_one_hang_is_forgotten() -> None:
    policy = Policy(Curve({1: 0.01}), p99_s=0.1, most=1)
    policy.add_outside_time(10.0)
    assert policy.retry_after_s(1, 1) is not None
    for _ in range(100):
        policy.add_outside_time(0.0)
    assert policy.retry_after_s(8, 1) is None


# --- waiting for one more ---


@given(policies, st.integers(1, 64), st.lists(st.floats(0, 1.0), max_size=30), st.floats(0, 1.0))
def test_waiting_leaves_time_to_answer(policy: Policy, rows: int, gaps: list[float], waited: float) -> None:
    now = 1.0
    policy.add_arrival(now)
    for gap in gaps:
        policy.add_arrival(now := now + gap)
    pause = policy.pause_s(rows, waited)
    assert pause >= 0
    if pause:
        assert rows < policy.batch
        assert waited + pause + 2 * policy.curve.seconds(policy.batch) * policy.pace <= policy.target_s * (1 + 1e-9)


@given(policies, st.integers(1, 64))
def test_the_first_request_does_not_wait(policy: Policy, rows: int) -> None:
    assert policy.pause_s(rows, 0.0) == 0
    policy.add_arrival(5.0)
    assert policy.pause_s(rows, 0.0) == 0


def test_one_client_that_waits_for_its_answers_is_not_delayed() -> None:
    policy = Policy(Curve({1: 0.005, 2: 0.0055, 64: 0.03}), p99_s=0.25, most=64)
    for i in range(100):
        policy.add_arrival(1 + 0.0051 * i)
    assert policy.pause_s(1, 0.0) == 0


def test_under_load_a_batch_waits_for_one_more() -> None:
    policy = Policy(Curve({1: 0.005, 2: 0.0055, 64: 0.03}), p99_s=0.25, most=64)
    for i in range(100):
        policy.add_arrival(1 + 0.0005 * i)
    assert 0 < policy.pause_s(1, 0.0) < 0.001


def test_an_engine_that_gains_nothing_never_waits() -> None:
    policy = Policy(Curve({size: 0.004 * size for size in (1, 2, 4, 8, 16)}), p99_s=1.0, most=64)
    for i in range(100):
        policy.add_arrival(1 + 0.0001 * i)
    assert policy.pause_s(1, 0.0) == 0


# --- figures ---


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10)), max_size=50))
def test_times_add_up(added: list[tuple[float, int]]) -> None:
    times = Times()
    for value, count in added:
        times.add(value, count)
    assert times.count == sum(times.buckets) == sum(count for _, count in added)
    assert times.to_json()["count"] == times.count
    assert times.to_json()["ns"] == pytest.approx(1e9 * sum(v * c for v, c in added), abs=1)
    for i, bound in enumerate(BUCKETS_S):
        assert sum(times.buckets[: i + 1]) == sum(count for value, count in added if value <= bound)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=LAST + 50))
def test_percentiles_are_of_the_last_answers(took: list[float]) -> None:
    figures = Figures()
    assert figures.percentile_ms(0.99) is None
    for value in took:
        figures.count_answer(value, 3)
    for share in (0.5, 0.99):
        assert figures.percentile_ms(share) == pytest.approx(1e3 * np.percentile(took[-LAST:], 100 * share))
    assert figures.answered.count == len(took)
    assert figures.inputs == 3 * len(took)


def test_requests_without_an_answer_are_counted_by_status() -> None:
    figures = Figures()
    for status in (503, 503, 400):
        figures.count_failure(0.1, status)
    assert figures.refused == {503: 2, 400: 1}
    assert figures.failed.count == 3
    assert figures.answered.count == 0


# --- batching, with an engine in its process ---


async def drained(batcher: Batcher) -> None:
    """Returns when nothing waits and nothing is computed."""
    while batcher.rows:
        await asyncio.sleep(0.001)


class House:
    """A batcher and a real engine, whose process is replaced when it is gone."""

    def __init__(self, runner: asyncio.Runner, subject: Any) -> None:
        self.runner, self.subject = runner, subject
        self.worker: Worker | None = None
        self.died: list[str] = []

    def run(self, work: Callable[[Batcher], Coroutine[Any, Any, Any]], *, most: int = 8, **curve: Any) -> Any:
        """Runs `work` with a batcher of its own; nothing may be left in it afterwards."""

        async def whole() -> Any:
            if self.worker is None:
                await self.start()
            measured = curve.get("measured") or {1: 0.001, most: 0.0011}
            policy = Policy(Curve(measured), p99_s=curve.get("p99_s", 60.0), most=most)
            batcher = Batcher(policy, Figures(), on_death=lambda _, reason: self.lost(batcher, reason))
            batcher.use(self.worker)
            async with asyncio.timeout(60):
                try:
                    return await work(batcher)
                finally:
                    await asyncio.sleep(0)  # those that were withdrawn
                    await drained(batcher)
                    assert (batcher.waiting, batcher.in_flight, batcher.rows) == (0, 0, 0)
                    batcher.use(None)

        return self.runner.run(whole())

    async def start(self) -> Worker:
        self.worker = await start_worker(self.subject, engine="auto", device="auto", threads=None, trust_code=False)
        return self.worker

    def lost(self, batcher: Batcher, reason: str) -> None:
        self.died.append(reason)
        self.worker = None
        asyncio.get_running_loop().create_task(self.again(batcher))

    async def again(self, batcher: Batcher) -> None:
        batcher.use(await self.start())

    def close(self) -> None:
        async def work() -> None:
            if self.worker is not None:
                self.worker.close()

        self.runner.run(work())


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    factory = pytest.importorskip("uvloop").new_event_loop
    with register(), asyncio.Runner(loop_factory=factory) as runner:
        made = House(runner, engines(tmp_path_factory.mktemp("batching") / "odd"))
        yield made
        made.close()
        gc.collect()


async def answered(batcher: Batcher, orders: list[tuple[int, ...]], deadline: float | None = None) -> list[int] | int:
    """Classes of the answer, or the status of the refusal."""
    try:
        results = (await batcher.submit({"image": pictures(*orders)}, deadline))["probabilities"]
    except Refusal as error:
        return error.status
    assert results.dtype == np.float32
    assert (results.sum(1) == 1).all()
    classes: list[int] = results.argmax(1).tolist()
    return classes


requests = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=25)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(wanted=requests, most=st.sampled_from((1, 3, 8, 64)))
def test_every_request_gets_its_own_answer(house: House, wanted: list[list[int]], most: int) -> None:
    async def work(batcher: Batcher) -> None:
        tasks = [answered(batcher, [(GOOD, label) for label in one]) for one in wanted]
        assert await asyncio.gather(*tasks) == wanted
        sizes = batcher.figures.batches
        assert max(sizes) <= batcher.policy.batch
        assert sum(size * times.count for size, times in sizes.items()) == sum(map(len, wanted))

    house.run(work, most=most)


bad_ones = st.lists(
    st.tuples(st.sampled_from((GOOD, GOOD, GOOD, THROWS, SHAPE, NAN)), st.integers(0, 9)), min_size=1, max_size=20
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(wanted=bad_ones, most=st.sampled_from((1, 4, 64)))
def test_a_bad_request_harms_only_itself(house: House, wanted: list[tuple[int, int]], most: int) -> None:
    async def work(batcher: Batcher) -> None:
        results = await asyncio.gather(*(answered(batcher, [order]) for order in wanted))
        assert results == [[label] if what == GOOD else 500 for what, label in wanted]

    house.run(work, most=most)
    assert not house.died


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    wanted=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=12), st.sampled_from(("stay", "stay", "leave", "late"))
        ),
        min_size=1,
        max_size=20,
    ),
    leave_s=st.sampled_from((0.0, 0.0, 0.002, 0.01)),
)
def test_a_client_that_leaves_or_is_late_is_withdrawn_and_harms_nobody(
    house: House, wanted: list[tuple[list[int], str]], leave_s: float
) -> None:
    async def work(batcher: Batcher) -> None:
        loop = asyncio.get_running_loop()
        tasks = []
        for one, how in wanted:
            deadline = loop.time() - 1 if how == "late" else None
            tasks.append(loop.create_task(answered(batcher, [(GOOD, label) for label in one], deadline)))
        await asyncio.sleep(leave_s)
        for task, (_, how) in zip(tasks, wanted, strict=True):
            if how == "leave":
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result, (one, how) in zip(results, wanted, strict=True):
            if how == "stay":
                assert result == one
            elif how == "late":
                assert result in (504, one)  # it was answered before its time was looked at
            else:
                assert isinstance(result, asyncio.CancelledError) or result == one

    house.run(work)


def test_a_request_that_kills_the_engine_fails_and_the_others_are_answered(house: House) -> None:
    async def work(batcher: Batcher) -> None:
        orders = [(GOOD, 1), (DIES, 2), (GOOD, 3), (GOOD, 4)]
        results = await asyncio.gather(*(answered(batcher, [order]) for order in orders))
        assert results == [[1], 500, [3], [4]]

    house.died.clear()
    house.run(work)
    assert len(house.died) == 2  # in the batch, then alone
    assert all("SIGSEGV" in reason for reason in house.died)
    house.died.clear()


def test_an_engine_that_is_lost_while_batches_are_full_loses_no_request(house: House) -> None:
    """Batches come back as lost while others are already being sent."""

    async def work(batcher: Batcher) -> None:
        tasks = [asyncio.ensure_future(answered(batcher, [(SLEEPS, i % 10, 1)] * 2)) for i in range(40)]
        await asyncio.sleep(0.03)
        assert house.worker is not None
        house.worker.close("a test took it away")
        for i in range(10):  # in the same turn of the loop
            tasks.append(asyncio.ensure_future(answered(batcher, [(GOOD, i)])))
        results = await asyncio.gather(*tasks)
        assert results == [[i % 10] * 2 for i in range(40)] + [[i] for i in range(10)]

    house.run(work, most=2)
    house.died.clear()


def test_an_engine_that_hangs_is_ended(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "HANGS_S", 0.5)

    async def work(batcher: Batcher) -> None:
        results = await asyncio.gather(
            *(answered(batcher, [order]) for order in [(GOOD, 1), (SLEEPS, 2, 250), (GOOD, 3)])
        )
        assert results == [[1], 500, [3]]

    house.died.clear()
    house.run(work)
    assert len(house.died) == 2
    assert all("did not answer" in reason for reason in house.died)
    house.died.clear()


def test_requests_that_were_withdrawn_hold_no_memory(house: House) -> None:
    """While the engine is busy: who asks and leaves, again and again, must not fill the queue."""

    async def work(batcher: Batcher) -> None:
        slow = [asyncio.ensure_future(answered(batcher, [(SLEEPS, 1, 20)] * 8)) for _ in range(2)]
        await asyncio.sleep(0.05)
        rows_of_all = []
        for _ in range(50):
            rows = pictures((GOOD, 1))
            task = asyncio.ensure_future(batcher.submit({"image": rows}, None))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            rows_of_all.append(weakref.ref(rows))
            del rows, task
        assert batcher.waiting == 0
        gc.collect()
        assert sum(rows() is not None for rows in rows_of_all) <= 1  # the last one may be in a traceback
        assert await asyncio.gather(*slow) == [[1] * 8] * 2

    house.run(work)


def test_the_last_of_a_burst_does_not_wait_for_more_that_never_come(house: House) -> None:
    """An engine that likes large batches, and requests that came quickly, then no more."""

    async def work(batcher: Batcher) -> float:
        for i in range(50):
            batcher.policy.add_arrival(time.monotonic() - 0.05 + i * 0.001)
        before = time.monotonic()
        assert await answered(batcher, [(GOOD, 7)]) == [7]
        return time.monotonic() - before

    took_s = min(house.run(work, measured={1: 0.02, 2: 0.021, 64: 0.1}, p99_s=5.0, most=64) for _ in range(3))
    assert took_s < 1.0  # the target would allow 4.8 s of waiting


def test_a_large_request_does_not_hold_up_others(house: House) -> None:
    async def work(batcher: Batcher) -> None:
        large = asyncio.ensure_future(answered(batcher, [(SLEEPS, i % 10, 1) for i in range(60)]))
        await asyncio.sleep(0)
        while not batcher.in_flight:
            await asyncio.sleep(0.001)
        assert batcher.rows <= 3 * batcher.policy.batch  # all that decides who else is let in
        assert await answered(batcher, [(GOOD, 7)]) == [7]
        assert not large.done()
        assert await large == [i % 10 for i in range(60)]

    house.run(work, most=2)


def test_when_a_part_of_a_large_request_fails_the_rest_is_withdrawn(house: House) -> None:
    async def work(batcher: Batcher) -> None:
        orders = [(THROWS, 0)] + [(SLEEPS, 1, 10)] * 40  # 100 ms each
        before = time.monotonic()
        assert await answered(batcher, orders) == 500
        await drained(batcher)
        assert time.monotonic() - before < 3.0

    house.run(work, most=2)


def test_waiting_requests_can_be_refused_together(house: House) -> None:
    async def work(batcher: Batcher) -> None:
        worker = batcher.use(None)
        tasks = [asyncio.ensure_future(answered(batcher, [(GOOD, i)])) for i in range(5)]
        await asyncio.sleep(0.01)
        assert batcher.waiting == 5
        batcher.fail_waiting(Refusal(503, "no"))
        assert batcher.waiting == 0
        assert await asyncio.gather(*tasks) == [503] * 5
        batcher.use(worker)
        assert await answered(batcher, [(GOOD, 3)]) == [3]

    house.run(work)


def test_an_engine_is_replaced_without_a_lost_request(house: House) -> None:
    async def work(batcher: Batcher) -> None:
        tasks = [asyncio.ensure_future(answered(batcher, [(SLEEPS, i % 10, 1)])) for i in range(60)]
        before = house.worker
        await house.start()
        assert batcher.use(house.worker) is before
        tasks += [asyncio.ensure_future(answered(batcher, [(GOOD, i % 10)])) for i in range(60)]
        assert before is not None
        await before.idle()
        before.close()
        assert await asyncio.gather(*tasks) == [[i % 10] for i in range(60)] * 2

    house.run(work, most=4)
    assert not house.died


# --- one thread while other programs use the cores -----------------------------------------------


def serve_batches(
    choice: ThreadChoice, delays: list[float], pace: dict[bool, float], now: float, until: float
) -> float:
    """Batches of one example, 10 ms on a quiet machine; `pace` by whether one thread computes. Returns the time."""
    while now < until:
        delays[0] = 0.3 if not choice.single and pace[False] > 1.1 else 0.0
        seconds = 0.01 * pace[choice.single]
        now += seconds
        choice.add(1, seconds, now)
    return now


def test_one_thread_computes_only_while_that_is_faster():
    delays = [0.0]
    choice = ThreadChoice(lambda size: 0.01 * size, lambda: delays[0])
    now = serve_batches(choice, delays, {False: 1.0, True: 1.3}, 0.0, 60.0)
    assert not choice.single
    now = serve_batches(choice, delays, {False: 3.0, True: 1.3}, now, now + 2.0)
    assert choice.single
    now = serve_batches(choice, delays, {False: 1.0, True: 1.3}, now, now + 40.0)
    assert not choice.single


def test_all_threads_stay_where_one_is_slower_even_beside_other_programs():
    delays = [0.0]
    choice = ThreadChoice(lambda size: 0.01 * size, lambda: delays[0])
    tried = 0
    now = 0.0
    while now < 120.0:
        now = serve_batches(choice, delays, {False: 1.5, True: 1.9}, now, now + 0.02)
        tried += choice.single
    assert not choice.single
    assert 0 < tried < 120.0 / 0.02 / 10, "trials become rarer"
