"""The servers that `bench_serve.py` compares with suanli, each as its documentation describes it, with a trivial
engine.

    python benchmarks/serve_peers.py echo PORT              # uvicorn that sends a body back: the upper bound
    PEERS/python benchmarks/serve_peers.py mlserver PORT    # and gRPC on the next port
    PEERS/python benchmarks/serve_litserve.py PORT

It doesn't use suanli, since peers have a Python of their own. The trivial engine looks at ten pixels, like that of
suanli, and returns ten probabilities.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

SHAPE = (1, 224, 224, 3)
CLASSES = 10

Message = dict[str, Any]


def probabilities(pixels: Any) -> list[float]:
    """Of ten pixels of one image: a softmax."""
    powers = [math.exp(int(pixel) / 255) for pixel in pixels[:CLASSES]]
    return [power / sum(powers) for power in powers]


# --- uvicorn ---


async def echo(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Any]) -> None:
    """An ASGI application: the body of a request is its answer."""
    if scope["type"] != "http":
        return
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    head = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


def serve_echo(port: int) -> None:
    import uvicorn

    uvicorn.run(
        echo, host="127.0.0.1", port=port, log_level="error", access_log=False, lifespan="off", http="httptools"
    )


# --- MLServer. Source: "Serving a custom model" and "Settings" in its documentation. ---


def serve_mlserver(port: int) -> None:
    """HTTP on `port`, gRPC on the next. $MLSERVER_PARALLEL_WORKERS is its number of processes for models; 0: only its
    own."""
    from mlserver.cli import main as start

    here = Path(__file__).resolve().parent
    ports = {"HTTP_PORT": port, "GRPC_PORT": port + 1, "METRICS_PORT": port + 2}
    os.environ |= {f"MLSERVER_{name}": str(number) for name, number in ports.items()}
    os.environ |= {"MLSERVER_HOST": "127.0.0.1", "MLSERVER_DEBUG": "false", "PYTHONPATH": str(here)}
    sys.path.insert(0, str(here))
    with tempfile.TemporaryDirectory() as folder:
        about = {"name": "trivial", "implementation": "serve_mlserver.Trivial"}
        (Path(folder) / "model-settings.json").write_text(json.dumps(about))
        sys.argv = ["mlserver", "start", folder]
        start()


def main() -> None:
    which, port = sys.argv[1], int(sys.argv[2])
    {"echo": serve_echo, "mlserver": serve_mlserver}[which](port)


if __name__ == "__main__":
    main()
