"""The sandbox: engines that print, raise, crash, hang, or outlive their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from suanli.core.types import Placement
from suanli.engines.examples import StackedExamples, load_examples
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine import device

PLACEMENT = asdict(Placement(device=device.detect("cpu"), threads=1))


@pytest.fixture
def ask(engine_folder: Callable[..., str], tmp_path: Path) -> Iterator[Callable[..., object]]:
    """Loads an engine whose `answer` has this body, and asks it for answers to ten examples."""
    StackedExamples(arrays={"x": np.zeros((10, 4), np.uint8)}).save(tmp_path / "examples")
    sandboxes = []

    def work(body: str, *, limit_s: float = 30, loading: str = "pass") -> np.ndarray:
        name = engine_folder(
            "strange",
            f"""
import ctypes, os, signal, sys, time
import numpy as np
from suanli.core.types import Engine, LoadedEngine
def answer(arrays):
    (rows,) = arrays.values()
    {body}
def load(folder, precision, placement):
    {loading}
    return LoadedEngine(answer=answer, find_precision=lambda arrays: precision)
ENGINE = Engine(name="strange", precisions=("float32",), packages=(), why_not=lambda d, p: None,
                build=lambda *a: None, load=load, needs="onnx")
""",
        )
        sandbox = Sandbox()
        sandboxes.append(sandbox)
        sandbox.ask(30, "load", engine=name, precision="float32", folder=str(tmp_path), placement=PLACEMENT)
        where = {"examples": str(tmp_path / "examples"), "out": str(tmp_path / "out")}
        sandbox.ask(limit_s, "answer", threads=1, outputs=["y"], count=10, batch=4, **where)
        (answers,) = load_examples(tmp_path / "out").blocks()
        return answers["y"]

    yield work
    for sandbox in sandboxes:
        sandbox.close()


def test_answers_come_in_batches_and_in_order(ask: Callable[..., np.ndarray]) -> None:
    answers = ask("return {'y': np.full((len(rows), 2), len(rows), np.float64)}")
    assert answers.dtype == np.float32
    assert answers[:, 0].tolist() == [4] * 8 + [2] * 2


def test_what_a_library_prints_does_not_disturb_the_replies(ask: Callable[..., np.ndarray]) -> None:
    body = "print('{\"error\": 1}'); os.write(1, b'noise\\n'); ctypes.CDLL(None).puts(b'more'); "
    answers = ask(body + "return {'any name': np.ones((len(rows), 2), np.float32)}")
    assert answers.shape == (10, 2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\)"),
        ("ctypes.string_at(0)", r"crashed \(SIG(SEGV|BUS)\)"),
        ("os._exit(7)", "exit code 7"),
        ("sys.stderr.write('first\\nout of luck\\n'); sys.stderr.flush(); os._exit(1)", "out of luck"),
        ("raise ValueError('no such thing\\nand more')", "ValueError: no such thing$"),
        ("raise MemoryError", "MemoryError$"),
        ("return {'y': np.ones((1, 2))}", r"10 inputs got 3 answers \(y\)"),
        ("return {'y': np.float32(1)}", "zero-dimensional"),
        ("return {'a': np.ones(len(rows)), 'b': np.ones(len(rows))}", "there is no y among a, b"),
    ],
)
def test_a_failure_is_reported_with_its_reason(ask: Callable[..., object], body: str, reason: str) -> None:
    with pytest.raises(SandboxError, match=reason):
        ask(body)


def test_a_sandbox_that_hangs_is_killed_with_its_children(ask: Callable[..., object], tmp_path: Path) -> None:
    body = (
        f"import subprocess; child = subprocess.Popen(['sleep', '60']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(SandboxError, match="not done after 2 s"):
        ask(body, limit_s=2)
    assert time.monotonic() - started < 30
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the child of a process that was ended is still there")


def test_a_sandbox_works_on_after_an_error() -> None:
    with Sandbox() as sandbox:
        with pytest.raises(SandboxError, match="FileNotFoundError"):
            sandbox.ask(30, "find_precision", threads=5, examples="nowhere")
        with pytest.raises(SandboxError, match="Unknown engine"):
            sandbox.ask(30, "load", engine="nothing", precision="float32", folder=".", placement=PLACEMENT)
        assert sandbox.ask(30, "memory", placement=PLACEMENT)["bytes"] > 0


def test_a_sandbox_ends_with_its_parent() -> None:
    """Even where the parent is killed while the sandbox computes."""
    code = (
        "import os, sys, threading, time\n"
        "from suanli.engines.sandbox import Sandbox\n"
        "sandbox = Sandbox()\n"
        "print(sandbox._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    sandbox = int(asking.stdout.readline())
    time.sleep(1)
    asking.kill()
    asking.wait()
    asking.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{sandbox}").exists() or Path(f"/proc/{sandbox}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(sandbox, 9)
    pytest.fail("a sandbox outlives the process that started it")
