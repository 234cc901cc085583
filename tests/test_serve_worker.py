"""Engines in processes of their own, and models that keep them alive: crashes, hangs, leaks, and what is left."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hostile import (
    CHATTERS,
    CLASSES,
    DIES,
    EXITS,
    GOOD,
    HANGS,
    HOLDS,
    LEAKS,
    NAN,
    SHAPE,
    SLEEPS,
    THROWS,
    engines,
    pictures,
    register,
)
from suanli.data.preprocess.text import TextPreprocess
from suanli.machine import device
from suanli.serving import batching, describe, model, worker
from suanli.serving.log import Log
from suanli.serving.model import ModelOptions, ServedModel, load_model
from suanli.serving.protocol import InferRequest, Refusal, Tensor
from suanli.serving.worker import EngineDied, EngineError, Worker, start_worker

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with register() as results:
        yield results


@pytest.fixture
def run(environment: dict[str, str]) -> Iterator[Run]:  # noqa: ARG001
    """Runs on a loop of its own, as servers have it, in limited time."""
    factory = pytest.importorskip("uvloop").new_event_loop

    async def limited(work: Coroutine[Any, Any, Any]) -> Any:
        async with asyncio.timeout(90):
            return await work

    with asyncio.Runner(loop_factory=factory) as runner:
        yield lambda work: runner.run(limited(work))
    gc.collect()


async def start(subject: Path) -> Worker:
    return await start_worker(subject, engine="auto", device="auto", threads=None, trust_code=False, max_batch=4)


async def ask(engine: Worker, *orders: tuple[int, ...], slot: int = 0) -> list[int]:
    inputs, outputs = engine.slots[slot]
    inputs["image"][: len(orders)] = pictures(*orders)
    await engine.compute(slot, len(orders))
    results: list[int] = outputs["probabilities"][: len(orders)].argmax(1).tolist()
    return results


def is_there(pid: int) -> bool:
    """Whether a process runs: one that has ended and isn't fetched doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int, *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while is_there(pid):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- one process ---


def test_an_engine_reports_what_it_is_and_answers(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        engine = await start(engines(tmp_path / "odd"))
        info = engine.info
        assert (info.engine, info.precision, info.classes) == ("hostile", "float32", CLASSES)
        assert (info.task, info.measured) == ("classification", ())
        assert (engine.preprocess.inputs["image"].shape, engine.task.classes) == ((2, 2, 3), CLASSES)
        assert engine.seconds.keys() == {1, 2, 4}
        assert all(0 < s < 1 for s in engine.seconds.values())
        first = asyncio.ensure_future(ask(engine, (GOOD, 1), (GOOD, 2), slot=0))
        second = asyncio.ensure_future(ask(engine, (GOOD, 9), slot=1))
        assert (await first, await second) == ([1, 2], [9])
        assert engine.memory_bytes > 1 << 20
        pid = engine.pid
        engine.close()
        engine.close()
        assert not is_there(pid)
        with pytest.raises(EngineDied):
            await engine.compute(0, 1)

    run(work())


@pytest.mark.parametrize(
    ("what", "reason"),
    [(THROWS, "ValueError: a planted fault"), (SHAPE, r"answers of shape \(1, 1\)"), (NAN, "not a number")],
)
def test_an_engine_that_fails_goes_on(run: Run, tmp_path: Path, what: int, reason: str) -> None:
    async def work() -> None:
        engine = await start(engines(tmp_path / "odd"))
        pid = engine.pid
        for _ in range(2):
            with pytest.raises(EngineError, match=reason) as caught:
                await ask(engine, (what,))
            assert not isinstance(caught.value, EngineDied)
            assert await ask(engine, (GOOD, 5)) == [5]
        assert engine.pid == pid
        engine.close()

    run(work())


@pytest.mark.parametrize(("what", "reason"), [(DIES, r"crashed \(SIGSEGV\)"), (EXITS, "a planted end")])
def test_an_engine_that_dies_is_noticed_at_once(run: Run, tmp_path: Path, what: int, reason: str) -> None:
    async def work() -> None:
        engine = await start(engines(tmp_path / "odd"))
        pid = engine.pid
        both = asyncio.gather(ask(engine, (what,), slot=0), ask(engine, (GOOD,), slot=1), return_exceptions=True)
        before = time.monotonic()
        results = await both
        assert time.monotonic() - before < 10
        assert isinstance(results[0], EngineDied)
        assert isinstance(results[1], EngineDied)
        with pytest.raises(EngineDied, match=reason):
            raise results[0]
        assert not is_there(pid)
        with pytest.raises(EngineDied):
            await engine.compute(1, 1)

    run(work())


def test_what_an_engine_prints_does_not_stop_it(run: Run, tmp_path: Path) -> None:
    """A megabyte, which is more than a pipe holds."""

    async def work() -> None:
        engine = await start(engines(tmp_path / "odd"))
        assert await ask(engine, (CHATTERS, 3), (CHATTERS, 4)) == [3, 4]
        engine.close()

    run(work())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load": "raise ValueError('no luck')"}, "ValueError: no luck"),
        ({"load": "print('out of tune'); sys.stdout.flush(); os._exit(1)"}, "out of tune"),
        ({"load": "os.kill(os.getpid(), signal.SIGKILL)"}, "SIGKILL"),
        ({"load": "settings['classes'] = 3"}, "answers of shape"),
        ({"always": "os._exit(3)"}, "exit code 3"),
    ],
)
def test_an_engine_that_does_not_come_up_says_why(
    run: Run, tmp_path: Path, options: dict[str, str], reason: str
) -> None:
    async def work() -> None:
        with pytest.raises(EngineDied, match=reason):
            await start(engines(tmp_path / "odd", **options))  # type: ignore[arg-type]

    run(work())


def test_an_engine_that_hangs_while_it_comes_up_is_given_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "START_S", 1.5)

    async def work() -> None:
        before = children()
        with pytest.raises(EngineDied, match="did not come up"):
            await start(engines(tmp_path / "odd", load="time.sleep(3600)"))
        assert children() == before

    run(work())


@pytest.mark.parametrize("damage", ["cut", "missing", "altered", "no index"])
def test_damaged_files_are_refused_with_a_reason(run: Run, tmp_path: Path, damage: str) -> None:
    folder = engines(tmp_path / "odd")
    (file,) = folder.glob("hostile-*/settings.json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:10])
    elif damage == "missing":
        file.unlink()
    elif damage == "altered":
        file.write_bytes(file.read_bytes().replace(b"10", b"11"))
    else:
        (folder / "engines.json").write_text("{")

    async def work() -> None:
        with pytest.raises(EngineDied, match=r"checksum|has no settings\.json|engines\.json"):
            await start(folder)

    run(work())


def test_engines_that_ended_leave_nothing_behind(run: Run, tmp_path: Path) -> None:
    good, bad = engines(tmp_path / "good"), engines(tmp_path / "bad", load="raise ValueError('no')")

    async def work() -> None:
        for turn in range(2):
            engine = await start(good)
            assert await ask(engine, (GOOD, 3)) == [3]
            if turn % 2:
                with pytest.raises(EngineDied):
                    await ask(engine, (DIES,))
            engine.close()
            with pytest.raises(EngineDied):
                await start(bad)
            del engine
            gc.collect()
            if turn == 0:
                before.append(descriptors())
        assert descriptors() <= before[0]

    before: list[int] = []
    run(work())
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        assert state != "Z", "an engine that ended was not fetched"


ASKS = """
import asyncio, os, subprocess, sys
from pathlib import Path
from suanli.serving.worker import start_worker

async def work():
    engine = await start_worker(Path(sys.argv[1]), engine="auto", device="auto", threads=None, trust_code=False)
    if sys.argv[2] != "idle":
        engine.slots[0][0]["image"][0, 0, 0, 0] = int(sys.argv[2])
        engine.compute(0, 1)
    print(engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(work())
"""


@pytest.mark.parametrize("what", ["idle", str(HANGS), str(HOLDS)])
def test_an_engine_ends_with_a_server_that_is_killed(tmp_path: Path, environment: dict[str, str], what: str) -> None:
    """Whatever it is doing: also a library that keeps every other thread of the process from running."""
    folder = engines(tmp_path / "odd", load="__import__('subprocess').Popen(['sleep', '61'])")
    asking = subprocess.Popen(
        [sys.executable, "-c", ASKS, str(folder), what],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert asking.stdout is not None
        engine = int(asking.stdout.readline())
        time.sleep(0.5)
        assert is_there(engine)
    finally:
        asking.kill()
        asking.wait()
        asking.stdout.close()  # type: ignore[union-attr]
    assert ends(engine, within_s=3)


# --- a model that keeps its engine alive ---


class Kept:
    """A served model, once it is started, and the log it writes."""

    served: ServedModel

    def __init__(self, subject: Path, options: ModelOptions, pool: ThreadPoolExecutor) -> None:
        self._subject, self._options, self._pool, self._text = subject, options, pool, io.StringIO()

    async def start(self) -> None:
        log = Log("json", stream=self._text)
        self.served = await load_model("odd", "1", self._subject, self._options, pool=self._pool, log=log)

    def events(self, what: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._text.getvalue().splitlines()]
        return [line for line in lines if line["event"] == what]

    async def ask(self, *orders: tuple[int, ...], **parameters: Any) -> list[int] | int:
        """Classes, or the status of the refusal."""
        rows = pictures(*orders)
        tensor = Tensor(name="image", datatype="UINT8", shape=rows.shape, data=rows)
        try:
            response = await self.served.infer(InferRequest(inputs=(tensor,), parameters=parameters))
        except Refusal as error:
            return error.status
        named = {output.name: output for output in response.outputs}
        assert isinstance(named["probabilities"].data, np.ndarray)
        results: list[int] = named["probabilities"].data.argmax(1).tolist()
        assert named["label"].data == [CLASSES[i].encode() for i in results]
        return results

    async def ready(self, *, within_s: float = 30) -> None:
        async with asyncio.timeout(within_s):
            while not self.served.ready:
                await asyncio.sleep(0.01)


@pytest.fixture
def keep(run: Run) -> Iterator[Callable[..., Kept]]:
    """Makes a model; it is started by the test, and closed at the end."""
    models: list[Kept] = []
    with ThreadPoolExecutor(2) as pool:

        def make(subject: Path, **options: Any) -> Kept:
            kept = Kept(subject, ModelOptions(**options), pool)
            models.append(kept)
            return kept

        yield make

        async def close() -> None:
            for kept in models:
                if hasattr(kept, "served"):
                    kept.served.close()
            await asyncio.sleep(0)

        run(close())


def children() -> set[int]:
    """Engines that run: a server of other tests may be there, too."""
    text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    engines = (int(pid) for pid in text.split() if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return {pid for pid in engines if is_there(pid)}


def test_an_engine_that_ends_while_nobody_asks_is_replaced(run: Run, keep: Callable[..., Kept], tmp_path: Path) -> None:
    """As when the system is short of memory. Meanwhile the model is not ready, and who asks waits or is refused."""
    kept = keep(engines(tmp_path / "odd", load="time.sleep(0.3)"))

    async def work() -> None:
        await kept.start()
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while kept.served.ready:
                await asyncio.sleep(0.005)
            assert "SIGKILL" in kept.served.reason
            assert await kept.ask((GOOD, 4)) == 503
            await kept.ready()
        assert await kept.ask((GOOD, 4)) == [4]
        assert kept.served.figures.restarts == 1

    run(work())


def test_a_bad_input_harms_only_itself_and_a_crash_costs_only_time(
    run: Run, keep: Callable[..., Kept], tmp_path: Path
) -> None:
    kept = keep(engines(tmp_path / "odd", batch_ms=20))

    async def work() -> None:
        await kept.start()
        assert kept.served.ready
        orders = [(GOOD, 1), (THROWS,), (GOOD, 2), (SHAPE,), (NAN,), (GOOD, 3)]
        assert await asyncio.gather(*(kept.ask(order) for order in orders)) == [[1], 500, [2], 500, 500, [3]]
        assert kept.served.ready
        assert kept.served.figures.restarts == 0

        first = asyncio.ensure_future(kept.ask((SLEEPS, 4, 20)))
        await asyncio.sleep(0.05)  # the engine has it; the others come together
        orders = [(GOOD, 1), (DIES,), (GOOD, 2), (GOOD, 3)]
        results = await asyncio.gather(*(kept.ask(order) for order in orders))
        assert results == [[1], 500, [2], [3]], kept.events("engine lost")
        assert await first == [4]
        await kept.ready()
        assert kept.served.figures.restarts == 2
        assert await kept.ask((GOOD, 7)) == [7]
        status = describe.status(kept.served)
        assert (status["state"], status["reason"], status["restarts"], status["waiting"]) == ("ready", "", 2, 0)
        assert status["failed"] == 4

    run(work())


def test_a_model_without_an_engine_says_so_and_refuses(
    run: Run, keep: Callable[..., Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash loop: pauses, no busy restarts, a refusal at once, and all is well when it stops."""
    monkeypatch.setattr(model, "PAUSES_S", (0.0, 0.0, 0.7, 0.7))
    flag = tmp_path / "broken"
    always = f"if os.path.exists({str(flag)!r}): os._exit(5)"
    kept = keep(engines(tmp_path / "odd", always=always))

    async def work() -> None:
        await kept.start()
        flag.touch()
        assert await kept.ask((GOOD, 1)) in (500, 503)
        async with asyncio.timeout(30):
            while len(kept.events("engine did not start")) < 2:
                await asyncio.sleep(0.02)
        assert not kept.served.ready
        assert kept.served.state == "failed"
        assert "exit code 5" in kept.served.reason
        before = time.monotonic()
        for _ in range(20):
            assert await kept.ask((GOOD, 1)) == 503
        assert time.monotonic() - before < 1
        with pytest.raises(Refusal) as caught:
            kept.served.admit()
        assert caught.value.retry_after_s
        assert kept.served.figures.restarts < 8  # it isn't started all the time
        flag.unlink()
        await kept.ready()
        assert await kept.ask((GOOD, 1)) == [1]

    run(work())


def test_a_hanging_engine_is_replaced(
    run: Run, keep: Callable[..., Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "HANGS_S", 0.6)
    monkeypatch.setattr(batching, "HANGS_TIMES", 1)
    kept = keep(engines(tmp_path / "odd"))

    async def work() -> None:
        await kept.start()
        results = await asyncio.gather(*(kept.ask(order) for order in [(HANGS,), (GOOD, 2), (GOOD, 3)]))
        assert results == [500, [2], [3]]
        await kept.ready()
        assert "did not answer" in kept.events("engine lost")[0]["reason"]
        assert len(children()) == 1

    run(work())


def test_a_leaking_engine_is_replaced_without_a_lost_request(
    run: Run, keep: Callable[..., Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "GROWN_BYTES", 20 << 20)
    monkeypatch.setattr(model, "GROWN", 1.1)
    monkeypatch.setattr(model, "WATCH_S", 0.05)
    kept = keep(engines(tmp_path / "odd", batch_ms=2))
    before: set[int] = set()

    async def work() -> None:
        await kept.start()
        before.update(children())
        ended = False

        async def client(label: int) -> None:
            while not ended:
                assert await kept.ask((GOOD, label)) == [label]
                assert kept.served.ready

        clients = [asyncio.ensure_future(client(i)) for i in range(4)]
        assert await kept.ask((LEAKS, 1, 200)) == [1]
        async with asyncio.timeout(30):
            while not kept.served.figures.restarts or children() & before:
                await asyncio.sleep(0.02)
                for task in clients:
                    assert not task.done(), task.exception()
        ended = True
        await asyncio.gather(*clients)
        assert len(kept.events("engine leaks")) == 1
        assert not kept.events("engine lost")
        assert len(children()) == 1

    run(work())


def test_an_engine_that_dies_while_it_is_being_replaced_leaves_one(
    run: Run, keep: Callable[..., Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaks, its successor is on its way, and then it is killed: two successors, one of which must go."""
    monkeypatch.setattr(model, "GROWN_BYTES", 20 << 20)
    monkeypatch.setattr(model, "GROWN", 1.1)
    monkeypatch.setattr(model, "WATCH_S", 0.05)
    kept = keep(engines(tmp_path / "odd", load="time.sleep(0.3)"))

    async def work() -> None:
        await kept.start()
        (first,) = children()
        assert await kept.ask((LEAKS, 1, 200)) == [1]
        async with asyncio.timeout(30):
            while not kept.events("engine leaks"):
                await asyncio.sleep(0.01)
            os.kill(first, signal.SIGKILL)
            while kept.served.figures.restarts < 2 or not kept.served.ready:
                await asyncio.sleep(0.02)
            await asyncio.sleep(1.0)
            while len(children()) > 1:
                await asyncio.sleep(0.05)
        assert await kept.ask((GOOD, 4)) == [4]

    run(work())


def test_draining_waits_for_requests_and_for_a_crash_among_them(
    run: Run, keep: Callable[..., Kept], tmp_path: Path
) -> None:
    kept = keep(engines(tmp_path / "odd"))

    async def work() -> None:
        await kept.start()
        first = asyncio.ensure_future(kept.ask((SLEEPS, 1, 30)))
        await asyncio.sleep(0.1)
        rest = [asyncio.ensure_future(kept.ask(order)) for order in [(GOOD, 2), (EXITS,), (GOOD, 3)]]
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await kept.served.drain()
        assert not kept.served.ready
        assert await asyncio.gather(first, *rest) == [[1], [2], 500, [3]]
        kept.served.close()
        assert await kept.ask((GOOD, 1)) == 503
        assert not children()

    run(work())


def test_a_model_can_be_closed_while_it_comes_up(run: Run, keep: Callable[..., Kept], tmp_path: Path) -> None:
    kept = keep(engines(tmp_path / "odd", load="time.sleep(5)"))

    async def work() -> None:
        starting = asyncio.ensure_future(kept.start())
        await asyncio.sleep(0.3)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not children()

    run(work())


@pytest.mark.parametrize("change", ["classes", "side"])
def test_an_engine_is_not_replaced_by_another_model(
    run: Run, keep: Callable[..., Kept], tmp_path: Path, change: str
) -> None:
    """Who asked knows the classes and sizes of the model that was there."""
    kept = keep(engines(tmp_path / "odd"))

    async def work() -> None:
        await kept.start()
        options: dict[str, Any] = {"classes": CLASSES[:5]} if change == "classes" else {"side": 4}
        engines(tmp_path / "odd", **options)
        assert await kept.ask((EXITS,)) in (500, 503)
        async with asyncio.timeout(30):
            while not kept.events("engine did not start"):
                await asyncio.sleep(0.02)
        assert "another one" in kept.events("engine did not start")[0]["reason"]
        assert not kept.served.ready

    run(work())


def test_a_deadline_passes(run: Run, keep: Callable[..., Kept], tmp_path: Path) -> None:
    kept = keep(engines(tmp_path / "odd"))

    async def work() -> None:
        await kept.start()
        first = asyncio.ensure_future(kept.ask((SLEEPS, 1, 50)))
        await asyncio.sleep(0.05)
        before = time.monotonic()
        assert await kept.ask((GOOD, 2), timeout=100_000) == 504
        assert time.monotonic() - before < 0.4  # not when the engine is free again
        assert await first == [1]
        assert await kept.ask((GOOD, 2), timeout=30_000_000) == [2]
        assert kept.served.figures.refused == {504: 1}

    run(work())


def test_numbers_are_not_accepted_as_ids_of_words(run: Run, keep: Callable[..., Kept], tmp_path: Path) -> None:
    """Ids of words that aren't there would lead an engine to memory that isn't its own."""
    kept = keep(engines(tmp_path / "odd", preprocess=TextPreprocess(vocabulary=("a", "b", "c"), length=4)))

    async def ask(datatype: str, data: Any, shape: tuple[int, ...]) -> list[bytes] | int:
        tensor = Tensor(name="text", datatype=datatype, shape=shape, data=data)
        try:
            response = await kept.served.infer(InferRequest(inputs=(tensor,)))
        except Refusal as error:
            return error.status
        results = response.outputs[1].data
        assert isinstance(results, list)
        return results

    async def work() -> None:
        await kept.start()
        assert await ask("BYTES", [b"a b", b"a b c c"], (2,)) == [b"class3", b"class3"]
        assert await ask("INT32", np.array([[10**6, -5, 1, 0]], np.int32), (1, 4)) == 400
        assert await ask("INT32", np.zeros((1, 4), np.int32), (1, 4)) == 400
        assert await ask("UINT8", np.zeros((1, 4, 4, 3), np.uint8), (1, 4, 4, 3)) == 400
        assert await ask("BYTES", [b"\xff"], (1,)) == 400
        assert kept.served.ready

    run(work())


def test_pictures_that_take_long_to_decode_are_refused_when_they_pile_up(
    run: Run, keep: Callable[..., Kept], tmp_path: Path
) -> None:
    """A few kilobytes can be 25 million pixels, and the engine's own time says nothing of that."""
    kept = keep(engines(tmp_path / "odd"), p99_s=0.05)
    many = 4 * device.cores()
    stream = io.BytesIO()
    Image.new("1", (5_000, 5_000)).save(stream, "PNG")
    picture = stream.getvalue()

    async def ask(count: int) -> int:
        try:
            results = await kept.served.predict([""] * count, [picture] * count, top=1)
        except Refusal as error:
            return error.status if error.retry_after_s else 0
        assert [one.label for one in results] == ["class0"] * count
        return 200

    async def work() -> None:
        await kept.start()
        assert await ask(2) == 200
        first = asyncio.ensure_future(ask(many))
        await asyncio.sleep(0.01)
        before = time.monotonic()
        assert [await ask(many) for _ in range(20)] == [503] * 20
        assert time.monotonic() - before < 2
        assert await first == 200
        assert await ask(1) == 200

    run(work())


def test_a_full_server_refuses_at_once_and_says_when_to_retry(
    run: Run, keep: Callable[..., Kept], tmp_path: Path
) -> None:
    kept = keep(engines(tmp_path / "odd", input_ms=20), p99_s=0.3)

    async def work() -> None:
        await kept.start()
        tasks = [asyncio.ensure_future(kept.ask((GOOD, i % 10))) for i in range(200)]
        before = time.monotonic()
        await asyncio.sleep(0)
        refused = [task for task in tasks if task.done()]
        assert time.monotonic() - before < 0.2
        assert len(refused) > 150
        with pytest.raises(Refusal) as caught:
            kept.served.admit()
        assert caught.value.status == 503
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s < 10
        results = await asyncio.gather(*tasks)
        assert {answer for answer in results if isinstance(answer, int)} == {503}
        good = [i for i, answer in enumerate(results) if answer != 503]
        assert good
        assert all(results[i] == [i % 10] for i in good)
        assert kept.served.figures.refused == {503: 200 - len(good)}

    run(work())


def test_a_target_that_cannot_be_kept_is_logged_and_one_at_a_time_is_answered(
    run: Run, keep: Callable[..., Kept], tmp_path: Path
) -> None:
    kept = keep(engines(tmp_path / "odd", batch_ms=20), p99_s=0.001)

    async def work() -> None:
        await kept.start()
        assert kept.served.ready
        assert len(kept.events("the latency target can't be kept")) == 1
        results = await asyncio.gather(*(kept.ask((GOOD, i)) for i in range(5)))
        assert results == [[0], 503, 503, 503, 503]
        assert await kept.ask((GOOD, 6)) == [6]

    run(work())


def test_the_request_of_a_client_that_leaves_is_withdrawn(run: Run, keep: Callable[..., Kept], tmp_path: Path) -> None:
    kept = keep(engines(tmp_path / "odd"))

    async def work() -> None:
        await kept.start()
        first = asyncio.ensure_future(kept.ask((SLEEPS, 1, 50)))
        await asyncio.sleep(0.05)
        rest = [asyncio.ensure_future(kept.ask((GOOD, 2))) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert kept.served.batcher.waiting == 5
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        assert kept.served.batcher.waiting == 0
        assert await first == [1]
        assert kept.served.figures.inputs == 1

    run(work())
