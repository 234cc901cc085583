"""Whole runs of every shipped recipe: the time of `suanli train` with its plan compared with `--speedups none`.

A side is a whole process, from the start of Python to the saved model, including planning and validations. Each process
has a cache of its own that contains only the prepared data, so the plan is measured anew every time. The number of
epochs is chosen for each recipe so that `none` trains a bit over a minute. Sides alternate.

    python benchmarks/bench_recipes.py ../shared/data --out records/…  [--recipes text,photos] [--seconds 65]

Scores are printed but not compared closely; `bench_plan.py` does that over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from processes import Processes
from record import Record, arguments, start
from splits import classes_of, inputs_of
from suanli.core.console import hide_progress
from suanli.core.registry import names
from suanli.core.types import Json
from suanli.machine import timing
from suanli.verbs.prepare import prepare

CEILING = 1.0  # times the seconds of `--speedups none`
FEW = 5_000  # images of the recipes for few
CALIBRATED_S = 12.0  # of training, from which the epochs follow


@dataclass(frozen=True, kw_only=True)
class Case:
    data: str  # a file below the folder of data, or one that `write_variants` makes
    weights_of: str | None = None  # a recipe whose short run gives the weights


CASES = {
    "small_images": Case(data="cifar10.zip"),
    "small_images_few": Case(data="few.npz"),
    "small_images_grey": Case(data="grey.npz"),
    "small_images_grey_few": Case(data="grey_few.npz"),
    "small_images_grey_any": Case(data="grey.npz"),
    "photos": Case(data="imagenette5k.zip"),
    "photos_any": Case(data="imagenette5k.zip"),
    "photos_normless": Case(data="imagenette5k.zip"),
    "fine_tune": Case(data="imagenette5k.zip", weights_of="photos"),
    "fine_tune_grey": Case(data="grey_few.npz", weights_of="small_images_grey_any"),
    "text": Case(data="sentiment_en"),
    "text_small": Case(data="sentiment_zh/ChnSentiCorp_htl_all.csv"),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipes", default="all", help=f"of {', '.join(names('recipes'))}")
    parser.add_argument("--seconds", type=float, default=65.0, help="that `none` trains")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    wanted = list(CASES) if args.recipes == "all" else args.recipes.split(",")
    if unknown := set(wanted) - set(CASES):
        parser.error(f"no data is known for {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    for missing in set(names("recipes")) - set(CASES):
        parser.error(f"the shipped recipe {missing} has no case here")
    record = Record("recipes", args.out, start(args))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for name in wanted:
            results[name] = bench.compare(record, name)
    record.say(f"\n{'recipe':24} {'none':>8} {'auto':>8} {'auto/none':>9}")
    for name, one in results.items():
        record.say(f"{name:24} {one['none_s']:7.1f}s {one['auto_s']:7.1f}s {one['ratio']:9.3f} {one['verdict']}")
    record.close({"ceiling": CEILING, "recipes": results})


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.processes = Processes(folder, args.threads)
        self._weights: dict[str, Path] = {}

    def compare(self, record: Record, name: str) -> dict[str, Json]:
        case = CASES[name]
        data = self.data(case.data)
        options = ["--recipe", name, "--device", self.args.device]
        if case.weights_of is not None:
            options += ["--weights", str(self.weights(case.weights_of, data))]
        epochs = self.epochs(data, options)
        seconds: dict[str, list[float]] = {"none": [], "auto": []}
        last: dict[str, Json] = {}
        for number in range(self.args.rounds):
            for side in ("none", "auto") if number % 2 == 0 else ("auto", "none"):
                took, last[side] = self.processes.train(
                    data, [*options, "--epochs", f"{epochs:.6g}", "--speedups", side]
                )
                seconds[side].append(took)
                plan = last[side]["plan"]
                how = ", ".join(plan["speedups"]) or "plain"
                planning_s = plan.get("seconds") or 0.0
                record.say(
                    f"{name:24} {side}: {took:6.1f} s, planning {planning_s:4.1f} s, {how}, {plan['threads']} threads, "
                    f"validation {last[side]['score']:.4f}"
                )
        ratios = [a / n for a, n in zip(seconds["auto"], seconds["none"], strict=True)]
        ratio = timing.spread(ratios)
        return {
            "epochs": epochs,
            "seconds": seconds,
            "none_s": timing.spread(seconds["none"]).median,
            "auto_s": timing.spread(seconds["auto"]).median,
            "ratio": ratio.median,
            "ratio_spread": ratio.half_iqr,
            "verdict": "reached" if ratio.median <= CEILING else "MISSED",
            "last": {side: {key: value for key, value in one.items() if key != "run"} for side, one in last.items()},
        }

    def epochs(self, data: Path, options: Sequence[str]) -> float:
        """The number with which `none` trains for the requested seconds, from the rate of a short training."""
        epochs = 0.02
        while True:
            _, summary = self.processes.train(data, [*options, "--epochs", f"{epochs:.6g}", "--speedups", "none"])
            took = summary["seconds"]["train"]
            if took >= min(CALIBRATED_S, self.args.seconds / 3):
                return epochs * self.args.seconds / took
            epochs *= min(10.0, 1.3 * min(CALIBRATED_S, self.args.seconds / 3) / took)

    def weights(self, recipe: str, data: Path) -> Path:
        if recipe not in self._weights:
            short = ["--recipe", recipe, "--epochs", "0.1", "--speedups", "none", "--device", self.args.device]
            _, summary = self.processes.train(data, short)
            self._weights[recipe] = Path(summary["run"]) / "model" / "weights.safetensors"
        return self._weights[recipe]

    def data(self, file: str) -> Path:
        """The data, prepared in the cache that all runs share."""
        path = self.args.data / file
        if file.endswith(".npz"):
            path = self.folder / file
            if not path.exists():
                write_variants(self.args.data / "cifar10.zip", self.folder)
        self.processes.prepare(path)
        return path


def write_variants(cifar10: Path, folder: Path) -> None:
    """From CIFAR-10, as .npz: a few colour images, all images in grey, and a few images in grey."""
    with hide_progress():
        whole = prepare(cifar10, cache_dir=folder)
    train, test = whole.splits["train"], whole.splits["test"]
    order = np.random.default_rng(0).permutation(len(train))
    arrays = {"x_test": inputs_of(test), "y_test": classes_of(test)}
    for name, chosen in (("", order), ("few", order[:FEW])):
        colour = arrays | {"x_train": inputs_of(train)[chosen], "y_train": classes_of(train)[chosen]}
        if name:
            np.savez(folder / f"{name}.npz", **colour)
        grey = {key: to_grey(value) if key.startswith("x") else value for key, value in colour.items()}
        np.savez(folder / f"grey_{name}.npz" if name else folder / "grey.npz", **grey)


def to_grey(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 to (N, H, W), by the weights of ITU-R BT.601."""
    return np.clip(np.rint(images @ np.array([0.299, 0.587, 0.114], np.float32)), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
