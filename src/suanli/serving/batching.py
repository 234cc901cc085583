"""Puts requests into batches for one engine, and gives each request its own answers.

A batch starts as soon as the engine is free, unless the policy says that it pays to wait for one more request. The next
batch collects while one is computed; it is sent before the first is back only if it is full, so that the engine never
waits. The inputs of a request stay together. A batch that fails is tried again one request at a time, so that a bad
request harms only itself.

Not here: decoding (`encoder`), starting and replacing engines (`model`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from suanli.core.schema import Arrays
from suanli.serving.figures import Figures
from suanli.serving.policy import Policy
from suanli.serving.protocol import Refusal
from suanli.serving.worker import EngineDied, EngineError, Worker

IN_FLIGHT = 2  # batches that the engine has at most: one that it computes, and the next one
HANGS_S = 10.0  # the engine hangs if a batch takes longer than this,
HANGS_TIMES = 30  # and longer than this multiple of its expected time


class _Entry:
    """The inputs of a request, or a part of them: at most a batch."""

    __slots__ = ("alone", "arrived", "count", "future", "inputs", "queued", "timer")

    def __init__(self, inputs: Arrays, count: int, future: asyncio.Future[Arrays], now: float) -> None:
        self.inputs, self.count, self.future, self.arrived = inputs, count, future, now
        self.alone = False  # computed alone, since it was in a batch that failed
        self.queued = True  # not sent to an engine yet
        self.timer: asyncio.TimerHandle | None = None


class Batcher:
    """The queue of one model. `use` sets its engine; requests call `submit`."""

    def __init__(self, policy: Policy, figures: Figures, *, on_death: Callable[[Worker, str], None]) -> None:
        """`on_death` is called with the reason when the engine's process has ended."""
        self.policy, self.figures = policy, figures
        self.waiting = 0  # inputs that were not sent to the engine yet
        self.in_flight = 0  # inputs that the engine has
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Entry] = deque()
        self._worker: Worker | None = None
        self._free: list[int] = []
        self._batches = 0  # in flight
        self._alone = False  # the batch in flight is a single request, whose batch failed before
        self.last_answer_s = 0.0  # when the last batch came back, by the monotonic clock
        self.overhead_s = 0.0  # its time beyond computing: the way there and back, and until this loop noticed
        self._next_dispatch: asyncio.Handle | None = None
        self._is_immediate = False  # whether that is the next turn of the loop, and not after a pause

    @property
    def rows(self) -> int:
        return self.waiting + self.in_flight

    def use(self, worker: Worker | None) -> Worker | None:
        """The next batches go to `worker`. Returns the previous one, which still computes what it has."""
        previous, self._worker = self._worker, worker
        if worker is not None:
            worker.on_exit = self._handle_exit
        self._free = [] if worker is None else list(range(len(worker.slots)))
        self._batches, self._alone = 0, False
        self._dispatch_soon()
        return previous

    def _handle_exit(self, worker: Worker, reason: str) -> None:
        if worker is self._worker and not self._batches:  # else its batches come back with EngineDied
            self._worker, self._free = None, []
            self._on_death(worker, reason)

    async def submit(self, inputs: Arrays, deadline: float | None) -> Arrays:
        """Outputs (B, …) for encoded inputs (B, …). Raises Refusal. Cancelling withdraws the inputs.

        A request that is larger than a batch enters the queue in parts, just enough to keep the engine busy, so that
        others don't wait for all of it.
        """
        count, size = len(next(iter(inputs.values()))), self.policy.batch
        if count <= size:
            return await self._submit(inputs, count, deadline)
        room = asyncio.Semaphore(IN_FLIGHT + 1)

        async def in_turn(start: int) -> Arrays:
            async with room:
                part = {name: array[start : start + size] for name, array in inputs.items()}
                return await self._submit(part, min(size, count - start), deadline)

        parts = [asyncio.ensure_future(in_turn(start)) for start in range(0, count, size)]
        try:
            outputs = await asyncio.gather(*parts)
            return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}
        finally:
            for part in parts:  # if one failed, the others are useless
                part.cancel()

    async def _submit(self, inputs: Arrays, count: int, deadline: float | None) -> Arrays:
        now = time.monotonic()  # since the loop's own clock may count only milliseconds
        entry = _Entry(inputs, count, self._loop.create_future(), now)
        if deadline is not None:
            entry.timer = self._loop.call_at(deadline, self._expire, entry)
        self.policy.add_arrival(now)
        self._queue.append(entry)
        self.waiting += count
        self._dispatch_soon()
        try:
            return await entry.future
        finally:
            if entry.timer is not None:
                entry.timer.cancel()
            self._withdraw(entry)

    def _withdraw(self, entry: _Entry) -> None:
        """Removes a request that nobody waits for any more from the queue, which frees its memory."""
        if entry.queued:
            entry.queued = False
            self.waiting -= entry.count
            with contextlib.suppress(ValueError):
                self._queue.remove(entry)

    def _expire(self, entry: _Entry) -> None:
        if not entry.future.done():
            entry.future.set_exception(Refusal(504, "The deadline of the request has passed."))

    def fail_waiting(self, error: Refusal) -> None:
        """Refuses all requests that were not sent to the engine yet."""
        queue, self._queue = self._queue, deque()
        for entry in queue:
            self._withdraw(entry)
            if not entry.future.done():
                entry.future.set_exception(error)

    def _dispatch_soon(self, delay_s: float = 0.0) -> None:
        """Dispatches in the next turn of the loop, so that requests that have arrived together go together."""
        if self._next_dispatch is not None:
            if self._is_immediate:
                return
            self._next_dispatch.cancel()
        self._is_immediate = not delay_s
        if delay_s:
            self._next_dispatch = self._loop.call_later(delay_s, self._dispatch, True)
        else:
            self._next_dispatch = self._loop.call_soon(self._dispatch)

    def _dispatch(self, has_waited: bool = False) -> None:
        """`has_waited`: it has already waited for one more request."""
        self._next_dispatch = None
        while self._worker is not None and self._free and self._batches < IN_FLIGHT:
            while self._queue and self._queue[0].future.done():  # withdrawn, or too late
                self._withdraw(self._queue.popleft())
            if not self._queue:
                return
            size = min(self.waiting, self.policy.batch)
            suspect = (
                self._alone or self._queue[0].alone
            )  # nothing else may be in flight, since it could end the engine
            if self._batches and (suspect or size < self.policy.batch):
                return  # the next batch collects while the engine computes
            if not self._batches and not suspect and not has_waited:
                pause_s = self.policy.pause_s(size, time.monotonic() - self._queue[0].arrived)
                if pause_s:
                    self._dispatch_soon(pause_s)
                    return
            self._send(self._worker, self._take())

    def _take(self) -> list[_Entry]:
        """The next batch: whole requests, in the order of their arrival."""
        entries: list[_Entry] = []
        room = self.policy.batch
        while self._queue and self._queue[0].count <= room:
            entry = self._queue[0]
            if entry.alone and entries:
                break
            self._queue.popleft()
            if entry.future.done():
                self._withdraw(entry)
                continue
            entry.queued = False
            self.waiting -= entry.count
            self.in_flight += entry.count
            entries.append(entry)
            room -= entry.count
            if entry.alone:
                break
        return entries

    def _send(self, worker: Worker, entries: list[_Entry]) -> None:
        if not entries:
            return
        slot = self._free.pop()
        inputs, _ = worker.slots[slot]
        count, now = 0, time.monotonic()
        for entry in entries:
            for name, array in inputs.items():
                array[count : count + entry.count] = entry.inputs[name]
            count += entry.count
            self.figures.add_queue_time(now - entry.arrived)
        self._batches += 1
        self._alone = entries[0].alone
        limit_s = max(HANGS_S, HANGS_TIMES * self.policy.curve.seconds(count) * max(1.0, self.policy.pace))
        watchdog = self._loop.call_later(limit_s, worker.close, f"the engine did not answer in {limit_s:.0f} s")
        answer = worker.compute(slot, count)
        answer.add_done_callback(lambda done: self._receive(worker, slot, entries, count, now, watchdog, done))

    def _receive(
        self,
        worker: Worker,
        slot: int,
        entries: list[_Entry],
        count: int,
        sent: float,
        watchdog: asyncio.TimerHandle,
        answer: asyncio.Future[float],
    ) -> None:
        watchdog.cancel()
        self.in_flight -= count
        is_current = worker is self._worker
        if is_current:
            self._batches -= 1
            self._alone = False
        error = answer.exception()
        if error is None:
            now = time.monotonic()
            batch_s, computing_s = now - max(sent, self.last_answer_s), answer.result()
            self.policy.add_batch_time(count, batch_s)
            self.overhead_s = max(0.0, batch_s - computing_s)
            self.last_answer_s = now
            self.figures.count_batch(count, computing_s)
            _, outputs = worker.slots[slot]
            start = 0
            for entry in entries:
                stop = start + entry.count
                if not entry.future.done():
                    entry.future.set_result({name: array[start:stop].copy() for name, array in outputs.items()})
                start = stop
        else:
            assert isinstance(error, EngineError)
            self._retry(entries, error)
        if is_current and isinstance(error, EngineDied):
            self._worker, self._free, self._batches, self._alone = None, [], 0, False
            self._on_death(worker, str(error))
        elif is_current:
            self._free.append(slot)
        if self._queue:
            self._dispatch()

    def _retry(self, entries: list[_Entry], error: EngineError) -> None:
        """Queues each request alone. One that was alone already has caused the error, and gets it."""
        for entry in reversed(entries):
            if entry.future.done():
                continue
            if entry.alone or (len(entries) == 1 and not isinstance(error, EngineDied)):
                entry.future.set_exception(Refusal(500, f"The engine failed: {error}."))
                continue
            entry.alone = entry.queued = True
            self._queue.appendleft(entry)
            self.waiting += entry.count
