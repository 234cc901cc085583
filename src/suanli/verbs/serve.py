"""serve: answers requests over HTTP and gRPC, with the engine that `suanli optimize` chose, until it is stopped."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable
from functools import partial
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
    """Serves until SIGTERM or Ctrl-C, then answers the accepted requests and returns.

    `subject` is a run, a model/ folder, a folder of engines, or a folder of models (NAME/ or NAME/1/). `p99_ms` is the
    time that a request may take: it decides the size of batches, and a request that can't be answered in time is
    refused. `grpc_port` None: no gRPC. The API key is read from `api_key_file` or $SUANLI_API_KEY; it is not an option,
    since other users of the machine can see options.

    Raises UsageError, DataError where there is no model, MachineError where the port is in use or packages are missing.
    """
    _check_options(port, grpc_port, p99_ms, max_body_mb, max_image_megapixels, threads, log)
    scheme = _find_scheme(tls_cert, tls_key)
    path = _find_folder(subject)
    from suanli.serving.model import ModelOptions
    from suanli.serving.server import LOOPBACK, ServerOptions, serve_models

    api_key = _read_key(api_key_file)
    if host not in LOOPBACK and api_key is None:
        warn(f"Anyone who can reach {host} can use this server. Set a key: --api-key-file, or ${KEY}.")
    model_options = ModelOptions(
        engine=engine,
        device=device,
        threads=threads,
        trust_code=trust_code,
        p99_s=None if p99_ms is None else p99_ms / 1e3,
        max_pixels=int(max_image_megapixels * 1e6),
    )
    options = ServerOptions(
        host=host,
        port=port,
        grpc_port=grpc_port,
        max_body_bytes=int(max_body_mb * 1e6),
        api_key=api_key,
        tls_cert=tls_cert,
        tls_key=tls_key,
        shutdown_delay_s=shutdown_delay_s,
    )
    announce = partial(_announce, scheme, host)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve_models(path, model_options, options, Log(log, requests=log_requests), on_start=announce))


def _find_scheme(tls_cert: Path | None, tls_key: Path | None) -> str:
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("TLS needs a certificate and its key.", fix="Give --tls-cert and --tls-key.")
    return "http" if tls_cert is None else "https"


def _find_folder(subject: AnyPath) -> Path:
    path = Path(subject).expanduser()
    if not path.is_dir():
        raise DataError(f"There is no folder {path}.", fix="Name a run, a model/ folder, or a folder of them.")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MachineError(f"Serving needs {', '.join(missing)}.", fix=f"Install it: {pip_install('suanli[serve]')}")
    return path


def _announce(scheme: str, host: str, port: int, grpc_port: int | None) -> None:
    name = f"[{host}]" if ":" in host else host
    say(f"Serving on {scheme}://{name}:{port}" + (f" and gRPC on {name}:{grpc_port}" if grpc_port else ""))
    say("Ctrl-C ends it.")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, which answers twice as many requests as asyncio's."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    from uvloop import new_event_loop

    factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
    return factory


def _check_options(
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
            raise UsageError(f"{name} {value} is not a port.", fix="Give 1 to 65535, or 0 for a free one.")
    for name, number in (
        ("--p99-ms", p99_ms),
        ("--max-body-mb", max_body_mb),
        ("--max-image-megapixels", max_image_megapixels),
        ("--threads", threads),
    ):
        if number is not None and not 0 < number < 1e9:
            raise UsageError(f"{name} {number} is out of range.", fix="Give a number above 0.")
    if log not in get_args(Style):
        raise unknown("way to log", log, get_args(Style))


def _read_key(file: Path | None) -> str | None:
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
