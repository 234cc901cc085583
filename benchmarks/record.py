"""The output of a benchmark: text in <out>/<name>.txt and figures in <out>/<name>.json, both with the command, the
machine and the versions. Without `--out` the text is only printed."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from suanli.core.types import Device, Json
from suanli.machine.device import cores, detect, environment
from suanli.machine.process_environment import INSTRUCTION_LIMITS
from suanli.machine.timing import Gain

# Of the environment: what limits the processor's instruction sets, so that it stands for an older one, and what else
# decides how fast torch computes.
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "LD_PRELOAD")


class Record:
    """Raises OSError where `out` can't be written: before the first measurement, not after the last."""

    def __init__(self, name: str, out: Path | None, device: Device) -> None:
        self.name, self.out = name, out
        self.figures: list[dict[str, Json]] = []
        self._lines: list[str] = []
        self._started, self._others = time.perf_counter(), Others()
        self.environment = environment(device)
        self.limits = {name: os.environ[name] for name in INSTRUCTION_LIMITS if name in os.environ}
        self.settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{package} {version}" for package, version in self.environment["versions"].items())
        self.say(f"$ {' '.join(self.environment['command'])}")
        self.say(f"{device.name}, {self.environment['cores']} cores, {torch.get_num_threads()} threads; {versions}")
        self.say(f"{self.environment['cpu']} has {' '.join(self.environment['instruction_sets'])}")
        for what, variables in (("limited to", self.limits), ("settings", self.settings)):
            if variables:
                self.say(f"{what} {' '.join(f'{name}={value}' for name, value in variables.items())}")

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self._lines.append(text)
        if self.out is not None:
            (self.out / f"{self.name}.txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def compare(
        self, what: str, gain: Gain, *, floor: float | None = None, within_spread: bool = False
    ) -> dict[str, Json]:
        """Prints how many times as fast one side was, and whether it reached `floor`; returns the figure as JSON."""
        return self.figure(what, gain.ratio, gain.spread, gain.rounds, floor=floor, within_spread=within_spread)

    def figure(
        self,
        what: str,
        value: float,
        spread: float,
        rounds: int,
        *,
        floor: float | None = None,
        within_spread: bool = False,
    ) -> dict[str, Json]:
        """Prints a ratio with its spread. With a `floor` to reach, it counts as a figure of this benchmark. With
        `within_spread`, only a ratio that is below it by more than its spread misses it."""
        result: dict[str, Json] = {"what": what, "value": value, "spread": spread, "rounds": rounds}
        text = f"{what}: {value:.3f} (spread {spread:.3f}, {rounds} rounds)"
        if floor is not None:
            reached = value + (spread if within_spread else 0.0) >= floor
            result |= {"floor": floor, "within_spread": within_spread, "reached": reached}
            text += f", to reach {floor:.2f}{' within the spread' if within_spread else ''}: "
            text += "reached" if reached else "MISSED"
            self.figures.append(result)
        self.say(text)
        return result

    def write(self, values: Mapping[str, object]) -> None:
        """Writes the figures so far; to be called again with more."""
        took = time.perf_counter() - self._started
        if self.out is not None:
            about = {"benchmark": self.name, "environment": self.environment, "limited_to": self.limits}
            about |= {"settings": self.settings, "seconds": took, "others_cores": self._others.cores()}
            about |= {"figures": self.figures}
            (self.out / f"{self.name}.json").write_text(
                json.dumps(about | dict(values), indent=1) + "\n", encoding="utf-8"
            )

    def close(self, values: Mapping[str, object]) -> None:
        self.write(values)
        took = time.perf_counter() - self._started
        self.say(f"took {took:.0f} s; other processes kept {self._others.cores():.2f} cores busy")


class Others:
    """The other processes, and those of other virtual machines, from now on."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), _core_seconds()

    def cores(self) -> float:
        """How many cores they have kept busy, on average; 0.0 where the kernel doesn't tell."""
        all_s, own_s = (now - then for now, then in zip(_core_seconds(), self._before, strict=True))
        return max(0.0, all_s - own_s) / (time.perf_counter() - self._started)


def _core_seconds() -> tuple[float, float]:
    """Seconds that the machine's cores weren't idle, and that this process and its ended children took."""
    try:
        ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0
    _, _, _, idle, waiting_for_disk, *_ = ticks
    return (sum(ticks) - idle - waiting_for_disk) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def arguments(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with cifar10.zip, imagenette5k.zip, …")
    parser.add_argument("--out", type=Path, help="the folder that gets the text and the figures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=cores(), help="of operations on the CPU")
    parser.add_argument("--cache", type=Path, help="where prepared data is kept; default: suanli's own cache")
    return parser


def start(args: argparse.Namespace) -> Device:
    torch.set_num_threads(args.threads)
    return detect(args.device)
