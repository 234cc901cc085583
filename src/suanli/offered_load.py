"""The generator of load in a process of its own: JSON lines in, JSON lines out (`python -m suanli.offered_load`).

The first line is a target: its `url`, and `requests` in base64; each further line is a `Load`, answered by a `Stretch`
or by an error. `Generator` is the side that asks; `offer`, from `load_client.py`, does the same in this thread.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict

from suanli.errors import SuanliError
from suanli.load_client import CONNECT_S, Client, offer
from suanli.loads import Load, ServerGone, Stretch, Target

__all__ = ["Generator", "offer"]

SLACK_S = 30.0  # for the process to start and to write its answer


class Generator:
    """The generator in a process of its own, so that it and who asks don't slow each other down. A context manager."""

    def __init__(self, target: Target) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "suanli.offered_load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            text=True,
            start_new_session=True,  # Ctrl-C is for who asks, and this one ends with it
        )
        requests = [base64.b64encode(request).decode() for request in target.requests]
        self._write({"url": target.url, "requests": requests})

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offer(self, load: Load) -> Stretch:
        """As the function `offer`. Raises ServerGone, also where the process itself is gone or too slow."""
        assert self._process.stdout is not None
        limit = threading.Timer(load.seconds + load.timeout_s + CONNECT_S + SLACK_S, self._process.kill)
        limit.start()
        try:
            self._write(asdict(load))
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            raise ServerGone("The generator of load has ended.", fix="See what it wrote above.")
        reply = json.loads(line)
        if "error" in reply:
            raise ServerGone(reply["error"], fix=reply["fix"])
        return Stretch(**reply)

    def _write(self, values: dict[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(values), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise ServerGone("The generator of load has ended.", fix="See what it wrote above.") from error

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def main() -> None:
    """Reads a target, then loads, one a line, until its input ends; answers each with a stretch, or an error."""
    gc.disable()  # a collection is a stall; nothing here makes cycles
    given = json.loads(sys.stdin.readline() or "null")
    if given is None:
        return
    requests = tuple(base64.b64decode(request) for request in given["requests"])
    client = Client(Target(url=given["url"], requests=requests))
    for line in sys.stdin:
        try:
            reply = vars(client.offer(Load(**json.loads(line))))
        except SuanliError as error:
            reply = {"error": error.message, "fix": error.fix}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
