"""The output of a benchmark: text in <out>/<name>.txt and figures in <out>/<name>.json, both with the command, the
machine and the versions. Without `--out` the text is only printed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from suanli.core.types import Device, Json
from suanli.machine.device import cores, detect, environment
from suanli.machine.timing import Gain


class Record:
    """Raises OSError where `out` can't be written: before the first measurement, not after the last."""

    def __init__(self, name: str, out: Path | None, device: Device) -> None:
        self.name, self.out = name, out
        self.figures: list[dict[str, Json]] = []
        self._lines: list[str] = []
        self._started = time.perf_counter()
        self.environment = environment(device)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{package} {version}" for package, version in self.environment["versions"].items())
        self.say(f"$ {' '.join(self.environment['command'])}")
        self.say(f"{device.name}, {self.environment['cores']} cores, {torch.get_num_threads()} threads; {versions}")

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self._lines.append(text)
        if self.out is not None:
            (self.out / f"{self.name}.txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def compare(self, what: str, gain: Gain, *, floor: float | None = None) -> dict[str, Json]:
        """Prints how many times as fast one side was, and whether it reached `floor`; returns the figure as JSON."""
        return self.figure(what, gain.ratio, gain.spread, gain.rounds, floor=floor)

    def figure(
        self, what: str, value: float, spread: float, rounds: int, *, floor: float | None = None
    ) -> dict[str, Json]:
        """Prints a ratio with its spread. With a `floor` to reach, it counts as a figure of this benchmark."""
        result: dict[str, Json] = {"what": what, "value": value, "spread": spread, "rounds": rounds}
        text = f"{what}: {value:.3f} (spread {spread:.3f}, {rounds} rounds)"
        if floor is not None:
            result |= {"floor": floor, "reached": value >= floor}
            text += f", to reach {floor:.2f}: {'reached' if value >= floor else 'MISSED'}"
            self.figures.append(result)
        self.say(text)
        return result

    def write(self, values: Mapping[str, object]) -> None:
        """Writes the figures so far; to be called again with more."""
        took = time.perf_counter() - self._started
        if self.out is not None:
            about = {"benchmark": self.name, "environment": self.environment, "seconds": took, "figures": self.figures}
            (self.out / f"{self.name}.json").write_text(
                json.dumps(about | dict(values), indent=1) + "\n", encoding="utf-8"
            )

    def close(self, values: Mapping[str, object]) -> None:
        self.write(values)
        self.say(f"took {time.perf_counter() - self._started:.0f} s")


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
