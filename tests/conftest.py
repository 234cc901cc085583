"""Shared by the tests: small real data sets on disk, and the real data beside the repository."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One thread for each operation: in tests many processes share the machine, and the threads of an operation would wait
# for each other. Tests that need two threads set them. This must come before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# huggingface_hub reads these when it is imported: no test uses the user's cache, or a hub that isn't its own.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": os.path.join(tempfile.gettempdir(), "suanli-tests", "hub")}

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from pictures import make_pictures

if TYPE_CHECKING:
    from suanli.machine.ceilings import Ceilings

# A slow machine is no failure, and a property that touches the disk doesn't need a hundred examples.
settings.register_profile("suanli", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suanli")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _freeze_imported_modules() -> None:
    """Training and planning collect garbage: with all modules of the tests in memory, that took half of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, downloads or runs, or starts from weights that happen to be here."""
    monkeypatch.setenv("SUANLI_WEIGHTS", "none")
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SUANLI_DATA", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ceilings, Path]:
    """Ceilings of this machine from a quick measurement, and the cache directory that has them."""
    from small_workloads import measure

    cache = tmp_path_factory.mktemp("measured")
    return measure(cache), cache


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data (../shared/data) is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def digits_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `Served` that serves a run of handwritten digits over HTTP and gRPC, for all tests of this process. A test must
    not change it. The time limit is so long that no request is refused on a busy machine."""
    from served import digits_run, serving

    with serving(digits_run(tmp_path_factory), "--grpc-port", "0", "--p99-ms", "60000") as server:
        yield server


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "pictures", **how: Any) -> Path:
        return make_pictures(tmp_path / name, **how)

    return make


@pytest.fixture(scope="session")
def trained_on_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pictures` and a run on them, `made`, whose data stays cached. To write into it, copy it."""
    import suanli

    folder = tmp_path_factory.mktemp("trained")
    options = {"speedups": "none", "out": folder / "made", "cache_dir": folder / "cache"}
    suanli.train(make_pictures(folder / "pictures"), epochs=2, **options)
    return folder


@pytest.fixture
def text_table(tmp_path: Path) -> Path:
    """A table of invented reviews whose words determine the label."""
    random = np.random.default_rng(1)
    words = {"good": ["great", "lovely", "fine", "bright"], "bad": ["dull", "awful", "poor", "grey"]}
    lines = ["text\tlabel"]
    for i in range(240):
        label = "good" if i % 2 else "bad"
        clues = random.choice(words[label], 3)
        filler = random.choice(["film", "story", "plot", "scene", "actor", "music"], 4)
        lines.append(" ".join([*clues, *filler, f"no{i}"]) + f"\t{label}")
    path = tmp_path / "reviews.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def speedup_folder(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Replaces the folder of speedups by one that contains only what the test puts in: a name, the body of `apply`,
    and fields of the record."""
    import suanli.compute.speedups
    from registered import forget
    from suanli.core import registry

    folder = tmp_path / "speedup_folder"
    folder.mkdir()
    shipped = {name: registry.load("speedups", name) for name in registry.names("speedups")}
    assert shipped  # imported now: the modules that they share can't be found below
    real = suanli.compute.speedups.__path__
    suanli.compute.speedups.__path__ = [str(folder)]
    registry.names.cache_clear()
    added = []

    def put(name: str, body: str, **fields: object) -> str:
        record = {"stage": 50, "usual": True} | fields
        arguments = "".join(f", {field}={value!r}" for field, value in record.items() if field != "why_not")
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (folder / f"{name}.py").write_text(
            "import time, torch\nfrom dataclasses import replace\nfrom suanli.core.types import Speedup\n"
            f"def apply(step, device):\n    model = step.model\n{lines}    return step\n"
            f"def why_not(device):\n    return {record.get('why_not')!r}\n"
            f"SPEEDUP = Speedup(name={name!r}, apply=apply, why_not=why_not{arguments})\n"
        )
        added.append(name)
        sys.modules.pop(f"suanli.compute.speedups.{name}", None)
        importlib.invalidate_caches()  # or files newer than the last look aren't seen
        registry.names.cache_clear()
        return name

    yield put
    suanli.compute.speedups.__path__ = real
    forget("speedups", added)


@pytest.fixture
def engine_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    """Adds engines to the shipped ones, in this process and those that it starts: a name, and the text of the file."""
    import suanli.engines.backends
    from registered import forget
    from suanli.core import registry

    folder = tmp_path / "engine_folder"
    folder.mkdir()
    path = [*suanli.engines.backends.__path__, str(folder)]
    # Every Python process that has this folder on its path reads this file when it starts.
    (folder / "sitecustomize.py").write_text(
        f"import suanli.engines.backends\nsuanli.engines.backends.__path__ = {path!r}\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(suanli.engines.backends, "__path__", path)
    added = []

    def put(name: str, text: str) -> str:
        (folder / f"{name}.py").write_text(text)
        added.append(name)
        sys.modules.pop(f"suanli.engines.backends.{name}", None)
        importlib.invalidate_caches()
        registry.names.cache_clear()
        return name

    yield put
    forget("engines", added)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of which each takes long come first, so that of several processes none works through one in the end while
    the others wait. A slow test counts as fifty."""
    length: Counter[Path] = Counter()
    for item in items:
        if item.get_closest_marker("long") is None:
            length[item.path] += 50 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -length[item.path])  # stable
