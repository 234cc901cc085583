"""serve: answers requests with the engine that `optimize` chose, over HTTP and gRPC, until it is told to stop."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from suanli.core.console import say, warn
from suanli.core.errors import DataError, MachineError, UsageError, pip_install, unknown
from suanli.core.types import AnyPath
from suanli.serving.log import Log, Style

KEY = "SUANLI_API_KEY"
NEEDED = ("uvicorn", "httptools", "starlette", "multipart", "prometheus_client")


def serve(
    subject: AnyPath,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    p99_ms: float | None = None,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    max_body_mb: float = 64,
    max_image_megapixels: float = 50,
    api_key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    shutdown_delay_s: float = 0,
    log: Style = "auto",
    log_requests: bool = False,
    trust_code: bool = False,
) -> None:
    """Returns when SIGTERM or Ctrl-C has ended it and what was accepted is answered.

    `subject` is a run, a model/ folder, a folder of engines, or a folder of models (NAME/ or NAME/1/). `p99_ms` is
    what a request may take: batches and the queue are made so that it holds, and who comes when it can't is refused.
    `grpc_port` None: no gRPC. An API key is read from `api_key_file`, or from $SUANLI_API_KEY; it is not an option,
    since options can be seen by other users of the machine.

    Raises UsageError, DataError where there is no model, MachineError where the port is in use or packages are missing.
    """
    _check(port, grpc_port, p99_ms, max_body_mb, max_image_megapixels, threads, log)
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("TLS needs a certificate and its key.", fix="Give --tls-cert and --tls-key.")
    path = Path(subject).expanduser()
    if not path.is_dir():
        raise DataError(f"There is no folder {path}.", fix="Name a run, a model/ folder, or a folder of them.")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MachineError(f"Serving needs {', '.join(missing)}.", fix=f"Install it: {pip_install('suanli[serve]')}")
    from suanli.serving.model import ModelOptions
    from suanli.serving.server import LOOPBACK, ServerOptions
    from suanli.serving.server import serve as work

    key = _key(api_key_file)
    if host not in LOOPBACK and key is None:
        warn(f"Whoever reaches {host} can use this server. Set a key: --api-key-file, or ${KEY}.")
    settings = ModelOptions(
        engine=engine,
        device=device,
        threads=threads,
        trust_code=trust_code,
        p99_s=None if p99_ms is None else p99_ms / 1e3,
        max_pixels=int(max_image_megapixels * 1e6),
    )
    listening = ServerOptions(
        host=host,
        port=port,
        grpc_port=grpc_port,
        max_body_bytes=int(max_body_mb * 1e6),
        api_key=key,
        tls_cert=tls_cert,
        tls_key=tls_key,
        shutdown_delay_s=shutdown_delay_s,
    )
    scheme = "http" if tls_cert is None else "https"

    def started(at: int, grpc_at: int | None) -> None:
        shown = f"[{host}]" if ":" in host else host
        say(f"Serving on {scheme}://{shown}:{at}" + (f" and gRPC on {shown}:{grpc_at}" if grpc_at else ""))
        say("Ctrl-C ends it.")

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(work(path, settings, listening, Log(log, requests=log_requests), on_start=started))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: twice the requests of asyncio's own."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    from uvloop import new_event_loop

    factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
    return factory


def _check(
    port: int,
    grpc_port: int | None,
    p99_ms: float | None,
    max_body_mb: float,
    max_image_megapixels: float,
    threads: int | None,
    log: str,
) -> None:
    for name, value in (("--port", port), ("--grpc-port", grpc_port)):
        if value is not None and not 0 <= value <= 65535:
            raise UsageError(f"{name} {value} is no port.", fix="Give 1 to 65535, or 0 for a free one.")
    for name, number in (
        ("--p99-ms", p99_ms),
        ("--max-body-mb", max_body_mb),
        ("--max-image-megapixels", max_image_megapixels),
        ("--threads", threads),
    ):
        if number is not None and not 0 < number < 1e9:
            raise UsageError(f"{name} {number} can't be.", fix="Give more than 0.")
    if log not in get_args(Style):
        raise unknown("way to log", log, get_args(Style))


def _key(file: Path | None) -> str | None:
    """The API key. Raises UsageError for one that is empty or has spaces."""
    if file is None:
        key = os.environ.get(KEY)
    else:
        try:
            key = file.expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The API key can't be read from {file} ({error}).", fix="Give a text file.") from error
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError("The API key is empty, or has spaces or odd characters.", fix="Use letters and digits.")
    return key
