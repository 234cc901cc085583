"""A signal, such as Ctrl-C, after an OpenVINO engine is gone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

# OpenVINO gives the thread that loads its plugin another stack for signals, and another thread may free it.
SCRIPT = """
import signal, threading, time
from suanli.engines.backends.openvino import import_openvino, openvino_core

openvino = import_openvino()
from openvino import opset13 as operations

given = operations.parameter([1, 4])
model = openvino.Model([operations.relu(given)], [given])
held = [openvino_core().compile_model(model, "CPU")]
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
signal.signal(signal.SIGALRM, lambda *_: print("handled"))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.1)
"""


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_a_signal_is_handled_after_another_thread_has_freed_an_engine() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "handled\n"
