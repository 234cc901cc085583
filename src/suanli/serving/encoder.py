"""Raw inputs (pictures, texts) to the rows that an engine reads, in threads, while the engine computes.

Not here: how a kind of data is decoded, which is its `Preprocess`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from suanli.core.errors import BadInput
from suanli.core.types import Preprocess
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

    async def encode(self, raws: Sequence[object]) -> list[np.ndarray | str]:
        """For each input its row, or why there is none."""
        loop = asyncio.get_running_loop()
        self.waiting += len(raws)
        try:
            return await asyncio.gather(*(loop.run_in_executor(self._pool, self._encode_timed, raw) for raw in raws))
        finally:
            self.waiting -= len(raws)

    def _encode_timed(self, raw: object) -> np.ndarray | str:
        start = time.perf_counter()
        try:
            return self._encode_one(raw)
        finally:
            seconds = time.perf_counter() - start
            self._mean_s += (NEWEST if self._mean_s else 1.0) * (seconds - self._mean_s)

    def _encode_one(self, raw: object) -> np.ndarray | str:
        if self.preprocess.kind == "image" and isinstance(raw, bytes):
            from suanli.data.decode import read_header

            try:
                header = read_header(raw)
            except BadInput as error:
                return error.message
            if header.height * header.width > self._max_pixels:
                return (
                    f"The picture has {header.width}x{header.height} pixels; "
                    f"at most {self._max_pixels / 1e6:g} million are allowed."
                )
        return encode(self.preprocess, raw)
