"""Requests into batches for one engine, answers back to requests.

A batch begins as soon as the engine is free, unless the policy says that one more is worth waiting for; while it is
computed, the next one collects. A second batch is handed over before the first is back only when it is full, so that
the engine never waits. Inputs of one request stay together. A batch that fails is tried again one request at a time,
so that a bad one harms only itself.

What this doesn't do: decode, start or replace engines (see `model`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from suanli.serving.figures import Figures
from suanli.serving.policy import Policy
from suanli.serving.protocol import Refusal
from suanli.serving.worker import EngineDied, EngineError, Worker

IN_FLIGHT = 2  # batches that the engine has: one that it computes, one that it finds next
HANGS_S = 10.0  # without an answer, and
HANGS_TIMES = 30  # times what the batch should take: the engine hangs


class _Entry:
    """Inputs of one request, at most a batch of them."""

    __slots__ = ("alone", "arrived", "future", "queued", "rows", "timer")

    def __init__(self, rows: np.ndarray, future: asyncio.Future[np.ndarray], now: float) -> None:
        self.rows, self.future, self.arrived = rows, future, now
        self.alone = False  # it was in a batch that failed
        self.queued = True  # no engine has it yet
        self.timer: asyncio.TimerHandle | None = None


class Batcher:
    """The queue of one model. `use` gives it an engine; `submit` is what requests call."""

    def __init__(self, policy: Policy, figures: Figures, *, on_death: Callable[[Worker, str], None]) -> None:
        """`on_death` is called when the engine's process is gone."""
        self.policy, self.figures = policy, figures
        self.waiting = 0  # inputs that no engine has yet
        self.in_flight = 0  # inputs that it has
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Entry] = deque()
        self._worker: Worker | None = None
        self._free: list[int] = []
        self._batches = 0  # in flight
        self._alone = False  # what is in flight is a suspect, tried alone
        self.last_answer_s = 0.0  # when the last batch came back
        self.overhead_s = 0.0  # that it took beyond computing: there and back, and until this loop looked
        self._next_dispatch: asyncio.Handle | None = None
        self._is_immediate = False  # that is when it is, and not after a pause

    @property
    def rows(self) -> int:
        return self.waiting + self.in_flight

    def use(self, worker: Worker | None) -> Worker | None:
        """From now on batches go to `worker`; the one before is returned, and ends what it has."""
        before, self._worker = self._worker, worker
        if worker is not None:
            worker.on_exit = self._handle_exit
        self._free = [] if worker is None else list(range(len(worker.slots)))
        self._batches, self._alone = 0, False
        self._dispatch_soon()
        return before

    def _handle_exit(self, worker: Worker, reason: str) -> None:
        if worker is self._worker and not self._batches:  # else what it had comes back as lost
            self._worker, self._free = None, []
            self._on_death(worker, reason)

    async def submit(self, rows: np.ndarray, deadline: float | None) -> np.ndarray:
        """Probabilities (B, K) of rows (B, *row_shape). Raises Refusal. Cancelling withdraws the rows.

        Of a request that is larger than a batch the queue has as much as keeps the engine busy, so that others don't
        wait for all of it.
        """
        size = self.policy.batch
        if len(rows) <= size:
            return await self._submit(rows, deadline)
        room = asyncio.Semaphore(IN_FLIGHT + 1)

        async def in_turn(rows: np.ndarray) -> np.ndarray:
            async with room:
                return await self._submit(rows, deadline)

        parts = [asyncio.ensure_future(in_turn(rows[i : i + size])) for i in range(0, len(rows), size)]
        try:
            return np.concatenate(await asyncio.gather(*parts))
        finally:
            for part in parts:  # of no use where one of them failed
                part.cancel()

    async def _submit(self, rows: np.ndarray, deadline: float | None) -> np.ndarray:
        now = time.monotonic()  # the loop's own clock may count whole milliseconds
        entry = _Entry(rows, self._loop.create_future(), now)
        if deadline is not None:
            entry.timer = self._loop.call_at(deadline, self._expire, entry)
        self.policy.add_arrival(now)
        self._queue.append(entry)
        self.waiting += len(rows)
        self._dispatch_soon()
        try:
            return await entry.future
        finally:
            if entry.timer is not None:
                entry.timer.cancel()
            self._withdraw(entry)

    def _withdraw(self, entry: _Entry) -> None:
        """Gives back the room and the memory of a request that nobody waits for any more."""
        if entry.queued:
            entry.queued = False
            self.waiting -= len(entry.rows)
            with contextlib.suppress(ValueError):
                self._queue.remove(entry)

    def _expire(self, entry: _Entry) -> None:
        if not entry.future.done():
            entry.future.set_exception(Refusal(504, "The deadline of the request has passed."))

    def fail_waiting(self, error: Refusal) -> None:
        """All that no engine has yet is refused."""
        queue, self._queue = self._queue, deque()
        for entry in queue:
            self._withdraw(entry)
            if not entry.future.done():
                entry.future.set_exception(error)

    def _dispatch_soon(self, delay_s: float = 0.0) -> None:
        """After whatever else has arrived by now: requests that come together go together."""
        if self._next_dispatch is not None:
            if self._is_immediate:
                return
            self._next_dispatch.cancel()
        self._is_immediate = not delay_s
        if delay_s:
            self._next_dispatch = self._loop.call_later(delay_s, self._dispatch, True)
        else:
            self._next_dispatch = self._loop.call_soon(self._dispatch)

    def _dispatch(self, nobody_came: bool = False) -> None:
        """`nobody_came`: it has waited for one more already, in vain."""
        self._next_dispatch = None
        while self._worker is not None and self._free and self._batches < IN_FLIGHT:
            while self._queue and self._queue[0].future.done():  # withdrawn, or too late
                self._withdraw(self._queue.popleft())
            if not self._queue:
                return
            size = min(self.waiting, self.policy.batch)
            suspect = self._alone or self._queue[0].alone  # computed with nothing beside it that it could take along
            if self._batches and (suspect or size < self.policy.batch):
                return  # it collects while the engine computes
            if not self._batches and not suspect and not nobody_came:
                pause_s = self.policy.pause_s(size, time.monotonic() - self._queue[0].arrived)
                if pause_s:
                    self._dispatch_soon(pause_s)
                    return
            self._send(self._worker, self._take())

    def _take(self) -> list[_Entry]:
        """The next batch: whole requests, in their order."""
        entries: list[_Entry] = []
        room = self.policy.batch
        while self._queue and len(self._queue[0].rows) <= room:
            entry = self._queue[0]
            if entry.alone and entries:
                break
            self._queue.popleft()
            if entry.future.done():
                self._withdraw(entry)
                continue
            entry.queued = False
            self.waiting -= len(entry.rows)
            self.in_flight += len(entry.rows)
            entries.append(entry)
            room -= len(entry.rows)
            if entry.alone:
                break
        return entries

    def _send(self, worker: Worker, entries: list[_Entry]) -> None:
        if not entries:
            return
        slot = self._free.pop()
        rows, _ = worker.slots[slot]
        count, now = 0, time.monotonic()
        for entry in entries:
            rows[count : count + len(entry.rows)] = entry.rows
            count += len(entry.rows)
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
        ours = worker is self._worker
        if ours:
            self._batches -= 1
            self._alone = False
        error = answer.exception()
        if error is None:
            now = time.monotonic()
            took, computing_s = now - max(sent, self.last_answer_s), answer.result()
            self.policy.add_batch_time(count, took)
            self.overhead_s = max(0.0, took - computing_s)
            self.last_answer_s = now
            self.figures.count_batch(count, computing_s)
            _, found = worker.slots[slot]
            at = 0
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_result(found[at : at + len(entry.rows)].copy())
                at += len(entry.rows)
        else:
            assert isinstance(error, EngineError)
            self._retry(entries, error)
        if ours and isinstance(error, EngineDied):
            self._worker, self._free, self._batches, self._alone = None, [], 0, False
            self._on_death(worker, str(error))
        elif ours:
            self._free.append(slot)
        if self._queue:
            self._dispatch()

    def _retry(self, entries: list[_Entry], error: EngineError) -> None:
        """Each alone; one that was alone already is the reason."""
        for entry in reversed(entries):
            if entry.future.done():
                continue
            if entry.alone or (len(entries) == 1 and not isinstance(error, EngineDied)):
                entry.future.set_exception(Refusal(500, f"The engine failed: {error}."))
                continue
            entry.alone = entry.queued = True
            self._queue.appendleft(entry)
            self.waiting += len(entry.rows)
