"""What weights that learned ImageNet give where data is few: whole processes of `suanli run`, from the start of Python
to the scored model, and images per second of the features.

    python benchmarks/bench_pretrained.py ../shared/data --out records/… [--parts features,pairs,photos,small]

`features`: the features of imagenette's photos, end to end as a training computes them, with the ways tried and the
start of each, against plain PyTorch (eager, float32, default layout), both on photos that are decoded and cached.
`pairs`: two of its classes, 122 training photos each, and 153 others to test. `photos`: all ten. `small`: 50 images a
class of CIFAR-10, enlarged, and the same from nothing. Nothing is chosen on a test split; imagenette's photos are part
of ImageNet, so the weights have seen them, and those scores are too high.

Every process has a cache of its own, in which only the weights are converted already (`--cold`: not even these).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from record import Record, arguments, start
from suanli.core.paths import cache_dir
from suanli.core.types import Json
from suanli.data.loader import Feed
from suanli.machine import timing
from suanli.models import weights
from suanli.models.backbone import backbone_of
from suanli.training.frozen_features import FrozenNetwork, compute_features
from suanli.training.prepare import DataOptions, resolve
from suanli.training.setup import Setup

EACH = 122  # training photos of a class, in a pair
TEST = (77, 76)  # of the two
PAIRS = 6
SMALL = 50  # training images of a class of CIFAR-10
SMALL_TEST = 1000  # of all classes
LIMITS = {"pairs": (0.94, 30.0), "photos": (0.98, 180.0)}  # accuracy and seconds to reach
MORE = 0.10  # that weights must gain on the small images
TIMES = 3.0  # times as fast as plain PyTorch the features must be
IMAGES = 512  # of plain PyTorch, and of the rates of the other ways


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="features,pairs,photos,small")
    parser.add_argument("--cold", action="store_true", help="convert the weights in each process")
    args = parser.parse_args()
    record = Record("pretrained", args.out, start(args))
    values: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in args.parts.split(","):
            values[part] = {"features": features, "pairs": pairs, "photos": photos, "small": small}[part](
                record, args, folder
            )
            record.write(values)
    record.close(values)


# --- whole processes ------------------------------------------------------------------------


def run(args: argparse.Namespace, data: Path, folder: Path, *options: str) -> dict[str, Json]:
    """Seconds of `suanli run`, its scores, and what it said of them."""
    cache = Path(tempfile.mkdtemp(dir=folder))
    if not args.cold and "none" not in options:
        weights.find("imagenet")  # converts it
        shutil.copytree(cache_dir() / "weights", cache / "weights")
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "SUANLI_CACHE": str(cache)}
    command = ["run", str(data), *options, "--out", str(cache / "run")]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "suanli", *command], capture_output=True, text=True, check=False, env=environment
    )
    took = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    test = json.loads((cache / "run" / "evaluation" / "test.json").read_text())
    summary = json.loads((cache / "run" / "summary.json").read_text())
    shutil.rmtree(cache)
    said = re.sub(r"/\S*/", "", done.stderr + done.stdout)
    return {
        "seconds": took,
        "test": test["scores"]["accuracy"],
        "interval": test["intervals"]["accuracy"],
        "count": test["count"],
        "phases": summary["seconds"],
        "frozen": summary["frozen"],
        "said": said,
    }


def describe(what: str, result: dict[str, Json]) -> str:
    low, high = result["interval"]
    frozen = result["frozen"] or {}
    text = f"{what}: test accuracy {result['test']:.2%} ({low:.2%} to {high:.2%}, {result['count']:,} images)"
    text += f" after {result['seconds']:.1f} s"
    if frozen:
        rate = frozen["images_per_s"]
        text += f"; head on frozen features: validation {frozen['scores']['accuracy']:.2%}, {frozen['seconds']:.1f} s, "
        text += f"{rate:.0f} images/s, {frozen['way']}, kept: {frozen['kept']}"
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["phases"].items())
    return f"{text} ({phases})"


def pairs(record: Record, args: argparse.Namespace, folder: Path) -> Json:
    with zipfile.ZipFile(args.data / "imagenette5k.zip") as archive:
        classes = sorted({name.split("/")[1] for name in archive.namelist() if name.count("/") == 2})
        chosen = [tuple(classes[i : i + 2]) for i in range(0, len(classes), 2)]
        chosen += list(itertools.combinations(classes, 2))[4 : 4 + max(0, PAIRS - len(chosen))]
        results = {}
        for pair in chosen[:PAIRS]:
            data = folder / f"{'-'.join(pair)}.zip"
            write_part(data, archive, [("train", "train", EACH, pair), ("val", "test", TEST, pair)])
            result = run(args, data, folder)
            results[" and ".join(pair)] = result
            record.say(describe(" and ".join(pair), result))
    record.say(f"what the last process said:\n{result['said']}")
    judge(record, "pairs", list(results.values()))
    return results


def photos(record: Record, args: argparse.Namespace, folder: Path) -> Json:
    result = run(args, args.data / "imagenette5k.zip", folder)
    record.say(describe("imagenette5k", result))
    record.say(f"what the process said:\n{result['said']}")
    judge(record, "photos", [result])
    return result


def small(record: Record, args: argparse.Namespace, folder: Path) -> Json:
    data = folder / "cifar10-50.zip"
    with zipfile.ZipFile(args.data / "cifar10.zip") as archive:
        classes = sorted({name.split("/")[1] for name in archive.namelist() if name.count("/") == 2})
        write_part(
            data,
            archive,
            [("train", "train", SMALL, classes), ("test", "test", SMALL_TEST // len(classes), classes)],
        )
    results = {}
    for what, options in (("from weights", ["--weights", "imagenet"]), ("from nothing", ["--weights", "none"])):
        results[what] = run(args, data, folder, *options)
        record.say(describe(f"CIFAR-10, {SMALL} images a class, {what}", results[what]))
    gain = results["from weights"]["test"] - results["from nothing"]["test"]
    reached = "reached" if gain >= MORE else "MISSED"
    record.say(f"weights gain {100 * gain:.1f} points; to reach {100 * MORE:.0f}: {reached}")
    record.say(f"what the process with weights said:\n{results['from weights']['said']}")
    return results


def write_part(
    path: Path,
    archive: zipfile.ZipFile,
    parts: Sequence[tuple[str, str, int | tuple[int, ...], Sequence[str]]],
) -> None:
    """Some images of each class: (split there, split here, how many, classes), the same ones every time."""
    names = sorted(archive.namelist())
    with zipfile.ZipFile(path, "w") as out:
        for there, here, count, classes in parts:
            counts = count if isinstance(count, tuple) else (count,) * len(classes)
            for one, many in zip(classes, counts, strict=True):
                own = [name for name in names if name.startswith(f"{there}/{one}/") and not name.endswith("/")]
                for place in np.sort(np.random.default_rng(0).permutation(len(own))[:many]):
                    file = Path(own[place]).name
                    out.writestr(f"{here}/{one}/{file}", archive.read(own[place]))


def judge(record: Record, part: str, results: Sequence[dict[str, Json]]) -> None:
    least, most_s = LIMITS[part]
    worst, slowest = min(r["test"] for r in results), max(r["seconds"] for r in results)
    reached = worst >= least and slowest <= most_s
    record.say(
        f"{part}: the worst {worst:.2%}, the slowest {slowest:.1f} s; to reach {least:.0%} within {most_s:.0f} s: "
        f"{'reached' if reached else 'MISSED'}"
    )


# --- images per second ----------------------------------------------------------------------


def features(record: Record, args: argparse.Namespace, folder: Path) -> Json:
    """End to end: everything between cached photos and features on disk."""
    device = start(args)
    cache = folder / "features-cache"
    options = DataOptions.of(args.data / "imagenette5k.zip", data_dir=None, cache_dir=cache)
    found = weights.find("imagenet")
    brought = {f"preprocess.{name}": value for name, value in found.preprocess.items()}
    brought |= {"weights": found.name, "model": found.model, "model_args": dict(found.model_args)}
    recipe, prepared = resolve(options, recipe="frozen", settings={}, brought=brought, announce=False)
    setup = Setup(recipe, prepared, device)
    backbone = backbone_of(setup.module.eval(), setup.head)
    plain = plain_rate(backbone, setup, IMAGES)
    record.say(f"plain PyTorch, eager, float32, default layout: {plain:.1f} images/s ({IMAGES} photos)")
    result: dict[str, Json] = {"plain": plain}
    for count in (len(prepared.splits["train"]), 256):
        positions = np.arange(count)
        network = FrozenNetwork(backbone=backbone, digest=f"bench-{count}", length=1280)
        one = compute_features(network, recipe, prepared, positions, device=device, cache=cache)
        rate = one.images_per_s or 0.0
        ways = ", ".join(f"{way} {images_per_s:.0f}" for way, images_per_s in one.tried.items())
        record.say(f"{one.computed:,} features end to end: {one.seconds:.1f} s, {one.way}; images/s by way: {ways}")
        floor = TIMES if count > 256 else None
        record.figure(f"features of {one.computed:,} photos against plain PyTorch", rate / plain, 0.0, 1, floor=floor)
        result[str(one.computed)] = {"rate": rate, "way": one.way, "tried": one.tried, "seconds": one.seconds}
    return result


def plain_rate(backbone: torch.nn.Module, setup: Setup, images: int) -> float:
    """As an ordinary script has it: batches of 64."""
    feed = Feed(setup.prepared.splits["train"], setup.device)

    def compute() -> None:
        with torch.no_grad():
            for inputs, _, _ in feed.in_order(64, range(images)):
                image = setup.prepared.preprocess.to_model(inputs)["image"].contiguous()
                backbone(image)

    with torch.no_grad():
        backbone(torch.zeros(64, 3, 224, 224))
    return images / timing.seconds(compute)


if __name__ == "__main__":
    main()
