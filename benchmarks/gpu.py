"""Tests and benchmarks that need an NVIDIA card, in one command: `make gpu`.

It uses the Python that runs it and the installed packages; it installs nothing, needs no network and ends within ten
minutes. Each stage is a process of its own with a time limit; time that a stage doesn't use is left for the next ones.
It writes records/<date>_<device>_gpu/ with all output and the figures.

    PYTHONPATH=src python3 benchmarks/gpu.py [DATA] [--records records] [--limit 580] [--airbench FILE]
    PYTHONPATH=src python3 benchmarks/gpu.py --rehearse

DATA is a folder with cifar10.zip and imagenette5k.zip; where one is missing, generated pictures take its place.
`--rehearse` runs the same stages on the CPU with tiny sizes, to check that they work: it measures nothing and writes
nothing.

Exit codes: 0 every stage ran; 1 a stage or a test failed; 4 not possible on this machine. A missed figure is printed
and is no failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = (
    *("torch", "numpy", "PIL", "simplejpeg", "safetensors", "pydantic", "typer", "rich", "sklearn", "jinja2"),
    *("filelock", "pytest", "pytest_timeout", "hypothesis"),
)
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "pytest_timeout": "pytest-timeout"}  # of other names
IMPOSSIBLE = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    command: Sequence[str]
    limit_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    parser.add_argument("--records", type=Path, default=ROOT / "records")
    parser.add_argument("--limit", type=float, default=580, help="seconds for everything")
    parser.add_argument("--airbench", type=Path, help="a copy of airbench94_muon.py to run beside suanli")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, leaving nothing")
    args = parser.parse_args()
    if (reason := why_not(args.rehearse)) is not None:
        print(reason, file=sys.stderr)
        return IMPOSSIBLE
    with tempfile.TemporaryDirectory(prefix="suanli-gpu-") as folder:
        work = Path(folder)
        out = work / "records" if args.rehearse else record_folder(args.records)
        out.mkdir(parents=True, exist_ok=True)
        run = Run(out, args.limit, environment(work), rehearsal=args.rehearse)
        run.say(f"{'A REHEARSAL ON THE CPU, no measurement: ' if args.rehearse else ''}{device_name(args.rehearse)}")
        for stage in stages(args.data, work, out, airbench=args.airbench, tiny=args.rehearse):
            run.stage(stage)
        if (figures := work / "bench" / "bench.json").exists():
            shutil.copy(figures, out / "bench.json")
        run.summary()
    return 1 if run.failed else 0


def why_not(rehearse: bool) -> str | None:
    """Why it can't run here, and what to do; None: it can."""
    if missing := [PACKAGES.get(name, name) for name in NEEDED if importlib.util.find_spec(name) is None]:
        return (
            f"{sys.executable} lacks {', '.join(missing)}. Where there is a network: pip install --target packages "
            f"--only-binary :all: --python-version {sys.version_info[0]}.{sys.version_info[1]} {' '.join(missing)}; "
            "then name that folder in PYTHONPATH here."
        )
    sys.path.insert(0, str(ROOT / "src"))
    from suanli.core.errors import MachineError
    from suanli.machine.device import detect

    if rehearse:
        return None
    try:
        detect("cuda")
    except MachineError as error:
        fix = "Run this on a machine with an NVIDIA card, or rehearse it: python benchmarks/gpu.py --rehearse."
        return f"{error.message} {fix}"
    return None


def device_name(rehearse: bool) -> str:
    from suanli.machine.device import detect

    return detect("cpu" if rehearse else "cuda").name


def record_folder(records: Path) -> Path:
    """records/<date>_<device>_gpu, with a number if that exists."""
    device = re.sub(r"[^a-z0-9]+", "-", device_name(False).lower().replace("nvidia", "")).strip("-")
    name = f"{datetime.now(UTC):%Y-%m-%d}_{device}_gpu"
    numbered = (records / (name if n == 1 else f"{name}-{n}") for n in range(1, 1000))
    return next(path for path in numbered if not path.exists())


def environment(work: Path) -> dict[str, str]:
    """The environment of every stage: suanli from this tree, a cache that is empty at the start, no network."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    own = {"PYTHONPATH": path, "SUANLI_CACHE": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own}


def stages(data: Path, work: Path, out: Path, *, airbench: Path | None, tiny: bool) -> list[Stage]:
    pictures = work / "data"
    pictures.mkdir()
    for name in ("cifar10.zip", "imagenette5k.zip"):
        if (data / name).exists() and not tiny:
            (pictures / name).symlink_to((data / name).resolve())
    device = "cpu" if tiny else "cuda"
    small = pictures / ("cifar10.zip" if (pictures / "cifar10.zip").exists() else "made-up-small.npz")
    python, here = sys.executable, ROOT / "benchmarks"
    figures = [python, str(here / "gpu_figures.py"), str(pictures), "--device", device, "--out", str(out)]
    figures += ["--tiny", "--rounds", "1"] if tiny else []
    bench = [python, "-m", "suanli", "bench", str(small), "--device", device, "--out", str(work / "bench")]
    bench += ["--steps", "4", "--rounds", "1", "--set", "batch_size=50"] if tiny else ["--time-budget-s", "60"]
    lightning = [python, str(here / "bench_lightning.py"), str(small), "--subjects", "speednet", "--device", device]
    lightning += ["--out", str(out), *(["--rounds", "1", "--steps", "2"] if tiny else ["--rounds", "3"])]
    result = [
        Stage(name="device", command=[python, "-m", "suanli", "device", "--probe", "--device", device], limit_s=60),
        Stage(name="prepare", command=[*figures, "--what", "prepare"], limit_s=60),
        Stage(name="speednet", command=[*figures, "--what", "speednet"], limit_s=100),
        Stage(name="resnet50", command=[*figures, "--what", "resnet50"], limit_s=90),
        Stage(
            name="tests",
            command=[python, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider"],
            limit_s=150,
        ),
        Stage(name="bench", command=bench, limit_s=150),
    ]
    if (pictures / "cifar10.zip").exists():
        accuracy = [python, str(here / "bench_time_to_accuracy.py"), str(pictures), "--device", device]
        accuracy += ["--out", str(out), "--targets", "0.8,0.84", "--seeds", "2", "--peers", ""]
        accuracy += ["--airbench", str(airbench)] if airbench is not None else []
        # airbench compiles for some minutes before its first training: the stages after it may find no time.
        result.insert(4, Stage(name="accuracy", command=accuracy, limit_s=100 if airbench is None else 400))
    if importlib.util.find_spec("lightning") is not None:
        result.append(Stage(name="lightning", command=lightning, limit_s=90))
    return result


class Run:
    """The stages of one call, their output and their results."""

    def __init__(self, out: Path, limit_s: float, environment: Mapping[str, str], *, rehearsal: bool) -> None:
        self.out, self.environment, self.rehearsal = out, environment, rehearsal
        if rehearsal:
            self.environment = {**environment, "SUANLI_GPU_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
        self.ends: dict[str, str] = {}
        self._started = time.perf_counter()
        self._limit_s = limit_s
        self._output = (out / "output.txt").open("w", encoding="utf-8")

    @property
    def failed(self) -> bool:
        return any(not end.startswith("done") for end in self.ends.values())

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self._output, flush=True)

    def stage(self, stage: Stage) -> None:
        """Runs a stage and prints its output; ends it when its time is up."""
        left = self._limit_s - (time.perf_counter() - self._started)
        limit = min(stage.limit_s, left)
        self.say(f"\n=== {stage.name} (at most {max(limit, 0):.0f} s)\n$ {' '.join(map(str, stage.command))}")
        if limit < 5:
            self.ends[stage.name] = "not started: no time was left"
            return
        started = time.perf_counter()
        process = subprocess.Popen(
            stage.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=dict(self.environment),
            start_new_session=True,  # so that the processes that it starts end with it
        )
        reader = threading.Thread(target=self._copy, args=(process,), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            end = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            end = "stopped: its time was up"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(5)
        self.ends[stage.name] = f"{end} ({time.perf_counter() - started:.0f} s)"

    def _copy(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(line.rstrip("\n"))

    def summary(self) -> None:
        self.say(f"\n=== {'rehearsal, so no figure below means anything' if self.rehearsal else 'summary'}")
        for name, end in self.ends.items():
            self.say(f"{name:10} {end}")
        for path in sorted(self.out.glob("*.json")):
            for figure in json.loads(path.read_text()).get("figures", []):
                word = "reached" if figure["reached"] else "MISSED"
                self.say(f"{figure['value']:8.3f} of {figure['floor']:.2f} {word:8} {figure['what']}")
        took = time.perf_counter() - self._started
        place = "nothing is kept" if self.rehearsal else f"everything is in {self.out}"
        self.say(f"{took:.0f} s in all; {place}")
        self._output.close()


if __name__ == "__main__":
    sys.exit(main())
