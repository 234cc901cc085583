"""Clients of gRPC in a closed loop, in a process of their own: they send a ready message and don't read the answer, so
that they cost as little as gRPC allows."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from suanli.loads import Load, Stretch
from suanli.offered_load import Generator


class GrpcGenerator(Generator):
    """As `Generator`, with this file as the process: JSON lines in and out."""

    def __init__(self, address: str, message: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._write({"message": base64.b64encode(message).decode()})


def infer_message(model: str, input_name: str, pixels: bytes, shape: Sequence[int]) -> bytes:
    """A ModelInferRequest with one UINT8 tensor, its bytes raw."""
    from suanli.serving.messages import message

    asked = message("ModelInferRequest")(model_name=model, raw_input_contents=[pixels])
    asked.inputs.add(name=input_name, datatype="UINT8", shape=shape)
    found: bytes = asked.SerializeToString()
    return found


async def stretch(address: str, message: bytes, load: Load) -> Stretch:
    import grpc.aio

    taken: list[int] = []
    errors: dict[str, int] = {}
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each client
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(load.connections)]
    computed, start = time.process_time(), time.perf_counter()
    answered_at, end = start, start + load.seconds

    async def client(channel: Any) -> None:
        nonlocal answered_at
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while (before := time.perf_counter()) < end:
            try:
                await ask(message)
            except grpc.aio.AioRpcError as error:
                errors[error.code().name] = errors.get(error.code().name, 0) + 1
                continue
            after = time.perf_counter()
            taken.append(round(1e6 * (after - before)))
            answered_at = after

    await asyncio.gather(*(client(channel) for channel in channels))
    share = (time.process_time() - computed) / (time.perf_counter() - start)
    for channel in channels:
        await channel.close()
    return Stretch(
        rate_per_s=None,
        seconds=load.seconds,
        offered=len(taken) + sum(errors.values()),
        answered_s=max(load.seconds, answered_at - start),
        accepted_us=taken,
        refused_us=[],
        refused_sent_us=[],
        without_retry_after=0,
        errors=errors,
        said="",
        waited=0,
        lag_ms_p99=0.0,
        lag_ms_max=0.0,
        cpu_share=share,
    )


def main() -> None:
    """Reads a message, then loads, one a line; answers each with a stretch."""
    address, message = sys.argv[1], base64.b64decode(json.loads(sys.stdin.readline())["message"])
    for line in sys.stdin:
        print(json.dumps(vars(asyncio.run(stretch(address, message, Load(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
