"""An engine that does what its input says, good and bad, for tests of the code that runs engines.

    with register() as environment:
        folder = engines(place / "models" / "odd", input_ms=5)

Its pictures have 2 by 2 pixels and three channels, and the first pixel is (what to do, which class to answer, how
much). So each answer differs from every other, and a single request of a batch can be the one that kills.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from registered import register_files
from suanli.core.types import Preprocess
from suanli.data.preprocess.image import ImagePreprocess
from suanli.engines.store import StoredEngine, save
from suanli.machine import device

SIDE = 2  # px
CLASSES = tuple(f"class{i}" for i in range(10))
GOOD, THROWS, SHAPE, NAN, DIES, EXITS, HANGS, HOLDS, LEAKS, SLEEPS, CHATTERS = range(11)

ENGINE = """
import ctypes, json, os, signal, sys, time
import numpy as np
from pathlib import Path
from suanli.core.types import Engine, LoadedEngine

LEAKED = []
GOOD, THROWS, SHAPE, NAN, DIES, EXITS, HANGS, HOLDS, LEAKS, SLEEPS, CHATTERS = range(11)

def load(folder, precision, placement):
    settings = json.loads((Path(folder) / "settings.json").read_text())
    exec(settings["load"])
    classes, calls = settings["classes"], []

    def answer(inputs):
        (rows,) = inputs.values()
        calls.append(len(rows))
        exec(settings["always"])
        time.sleep((settings["batch_ms"] + settings["input_ms"] * len(rows)) / 1e3)
        probabilities = np.zeros((len(rows), classes), np.float32)
        orders = rows[:, 0, 0].tolist() if rows.ndim == 4 else [(GOOD, len(set(row)), 0) for row in rows.tolist()]
        for i, (what, label, much) in enumerate(orders):
            probabilities[i, (label + settings["offset"]) % classes] = 1
            if what == THROWS:
                raise ValueError("a planted fault \\udcff \\u00e9")
            if what == SHAPE:
                return {"probabilities": probabilities[:, :1]}
            if what == NAN:
                probabilities[i] = np.nan
            if what == DIES:
                os.kill(os.getpid(), signal.SIGSEGV)
            if what == EXITS:
                sys.exit("a planted end")
            if what == HANGS:
                time.sleep(3600)
            if what == HOLDS:
                ctypes.PyDLL(None).sleep(60)
            if what == LEAKS:
                LEAKED.append(np.ones(much << 20, np.uint8))
            if what == SLEEPS:
                time.sleep(much / 100)
            if what == CHATTERS:
                print("noise " * 200_000, flush=True)
        return {"probabilities": probabilities}

    return LoadedEngine(answer=answer, find_precision=lambda inputs: precision)

ENGINE = Engine(name="hostile", precisions=("float32",), packages=(), why_not=lambda d, p: None,
                build=lambda *a: None, load=load, needs="onnx")
"""


def register() -> contextlib.AbstractContextManager[dict[str, str]]:
    """Registers the engine in this process and in those that it starts. Gives the environment variables with which
    other processes find it, too."""
    return register_files({"engines": {"hostile": ENGINE}})


def engines(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    side: int = SIDE,
    offset: int = 0,
    batch_ms: float = 0,
    input_ms: float = 0,
    load: str = "",
    always: str = "",
    preprocess: Preprocess | None = None,
) -> Path:
    """Writes a folder of engines that can be served. `offset` is added to each class that is answered; a batch takes
    `batch_ms`, and `input_ms` for each input. `load` and `always` are Python code that runs when the engine is loaded,
    and before each answer, with `calls` (the sizes of the batches so far) and `rows`. `preprocess` is for inputs other
    than pictures: their class is the number of different values in a row."""
    settings = {
        "classes": len(classes),
        "offset": offset,
        "batch_ms": batch_ms,
        "input_ms": input_ms,
        "load": load,
        "always": always,
    }
    temporary = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent if folder.parent.is_dir() else None))
    try:
        (temporary / "files").mkdir()
        (temporary / "files" / "settings.json").write_text(json.dumps(settings))
        stored = StoredEngine(
            engine="hostile", precision="float32", folder=temporary / "files", threads=1, packages=(), portable=True
        )
        reads = preprocess or ImagePreprocess(height=side, width=side, channels=3)
        about = {"classes": list(classes), "preprocess": reads.to_json()}
        folder.mkdir(parents=True, exist_ok=True)
        save(folder, [stored], device=device.detect("cpu"), about=about)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def pictures(*orders: tuple[int, ...], side: int = SIDE) -> np.ndarray:
    """Rows (N, side, side, 3), one for each (what to do, class, how much); missing numbers are 0."""
    rows = np.zeros((len(orders), side, side, 3), np.uint8)
    for row, order in zip(rows, orders, strict=True):
        row[0, 0, : len(order)] = order
    return rows


def request(*orders: tuple[int, ...], side: int = SIDE, **parameters: object) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a binary request for these pictures."""
    rows = pictures(*orders, side=side)
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(rows.shape),
        "parameters": {"binary_data_size": rows.nbytes},
    }
    outputs = [{"name": "label"}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()
    return head + rows.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def labels(body: bytes) -> list[int]:
    """The classes in the answer to a `request`."""
    return [int(text.removeprefix("class")) for text in json.loads(body)["outputs"][0]["data"]]
