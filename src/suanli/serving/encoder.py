"""Raw inputs (pictures, texts) to what an engine reads, in threads, while the engine computes.

Not here: how a kind of data is decoded, which is its `Preprocess`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from suanli.core.errors import BadInput
from suanli.core.types import EncodedInput, Preprocess, Raw
from suanli.engines.predictor import encode
from suanli.machine.device import cores
from suanli.serving.policy import NEWEST


class Encoder:
    """Encodes the inputs of one model."""

    def __init__(self, preprocess: Preprocess, *, pool: Executor, max_pixels: int) -> None:
        """`max_pixels`: of one picture."""
        self.preprocess = preprocess
        self.waiting = 0  # inputs that are being encoded or wait for a thread
        self._pool, self._max_pixels = pool, max_pixels
        self._mean_s = 0.0  # running mean of a thread's time for one input

    @property
    def delay_s(self) -> float:
        """Until a thread is free for one more input."""
        return self.waiting * self._mean_s / cores()

    async def encode(self, raws: Sequence[Raw]) -> list[EncodedInput | str]:
        """For each input what the engine reads, or why there is nothing."""
        loop = asyncio.get_running_loop()
        self.waiting += len(raws)
        try:
            return await asyncio.gather(*(loop.run_in_executor(self._pool, self._encode_timed, raw) for raw in raws))
        finally:
            self.waiting -= len(raws)

    def _encode_timed(self, raw: Raw) -> EncodedInput | str:
        start = time.perf_counter()
        try:
            self.preprocess.check_size(raw, self._max_pixels)
            return encode(self.preprocess, raw)
        except BadInput as error:
            return error.message
        finally:
            seconds = time.perf_counter() - start
            self._mean_s += (NEWEST if self._mean_s else 1.0) * (seconds - self._mean_s)
