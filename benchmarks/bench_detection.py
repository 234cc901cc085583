"""Detectors on few images: how good they get in which time, compared with LibreYOLO, and what int8 costs.

    python benchmarks/bench_detection.py ../shared/data --parts scratch,lite0,budget,int8 --runs runs --out records/…
    python benchmarks/bench_detection.py ../shared/data --parts peer --peer-python PYTHON --runs runs --out records/…

`scratch`, `lite0` and `budget` train on bccd_voc.zip with whole processes of `suanli train`: from nothing, from the
weights of EfficientNet-Lite0, and from nothing within `--time-budget`. `int8` optimises the first run from nothing; and
it builds the engines of `--engines` once more, and compares their answers for test and validation images with those in
float32. `peer` trains on each of `--sets` with suanli, from nothing (as `scratch`, or with `--against budget` as
`budget`), and then each of `--peers` with LibreYOLO, from random weights, on the same training images and for as long
as suanli's process took. Both are scored on the same test images by the same code, that of suanli's task.

Seconds are those of a process from its start to its end, with decoding, planning and validation; memory is the peak of
what it has resident. Test images are answered afterwards, and no choice depends on them. A run that is in `--runs`
already isn't repeated, so the parts may run one after the other; its own record is in it, bench.json.

LibreYOLO is in an environment of its own, whose Python `--peer-python` names: libreyolo 1.6, torch, torchvision (both
without CUDA: see `detect_libreyolo.py`), opencv-python-headless, pycocotools. It has its defaults but for the size of
images, what that file says, and `--peer-set`. How many epochs fit the time is measured before, with two ways of
loading images, of which it gets the faster one; that takes none of its time. A training may take a tenth more time than
suanli's, then it is cut.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detection_sets import BoxSet
from measured import Measured, run_measured
from record import Record, arguments, start
from suanli.core import registry
from suanli.core.compare import difference
from suanli.core.console import size
from suanli.core.types import Engine, EngineInputs, Json, Placement, Split
from suanli.engines.examples import StackedExamples, calibration_batches
from suanli.engines.inference_module import write_onnx
from suanli.machine.device import detect

SETS = {"bccd": "bccd_voc.zip", "cards": "playing_cards_voc.zip"}
LIMITS = {"scratch": (0.90, 2700.0), "lite0": (0.91, None), "budget": (0.75, None)}  # mAP@0.5 and seconds to reach
INT8_LOSS = 0.005  # of mAP
LOADING = ({"workers": 0, "cache": "ram"}, {"workers": 2, "cache": "disk"})
FEW_IMAGES = 200  # LibreYOLO's epochs are at least so long, else saving after each costs it most of the time
MARGIN = 0.97  # of its time that its epochs are planned for


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="scratch,lite0,budget,int8")
    parser.add_argument("--runs", type=Path, required=True, help="keeps the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--time-budget", default="8m", help="of the part budget")
    parser.add_argument("--set", action="append", default=[], help="of suanli's recipe, as FIELD=VALUE; repeatable")
    parser.add_argument("--engines", default="openvino,onnxruntime", help="of the part int8")
    parser.add_argument("--sets", default="bccd,cards", help="of the part peer")
    parser.add_argument("--against", choices=("scratch", "budget"), default="scratch", help="suanli's side of it")
    parser.add_argument("--peers", default="yolox:t,yolox:s,yolo9:t", help="families and sizes")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--peer-set", default="{}", help="settings of LibreYOLO's training, as JSON")
    args = parser.parse_args()
    record = Record(f"detection_{args.parts.replace(',', '_')}", args.out, start(args))
    args.runs = args.runs.absolute()
    args.runs.mkdir(parents=True, exist_ok=True)
    kinds = {kind: partial(train_seeds, kind=kind) for kind in LIMITS}
    parts = {**kinds, "int8": compare_int8, "peer": compare_peers}
    values: dict[str, Json] = {}
    for part in args.parts.split(","):
        values[part] = parts[part](record, args)
        record.write(values)
        record.say()
    record.close(values)


# --- suanli's trainings ---------------------------------------------------------------------


def train_seeds(record: Record, args: argparse.Namespace, *, kind: str) -> Json:
    runs = [train(record, args, "bccd", kind, seed) for seed in seeds_of(args)]
    least, limit_s = LIMITS[kind]
    scores, seconds = [run["scores"]["map_50"] for run in runs], [run["seconds"] for run in runs]
    spread = f", sd {100 * statistics.stdev(scores):.2f}" if len(runs) > 1 else ""
    text = f"{kind}: mAP@0.5 {statistics.mean(scores):.2%} ({min(scores):.2%} to {max(scores):.2%}{spread}), "
    text += f"{statistics.mean(seconds):.0f} s (at most {max(seconds):.0f}), {len(runs)} seeds; to reach {least:.0%}"
    text += "" if limit_s is None else f" within {limit_s:.0f} s each"
    reached = statistics.mean(scores) >= least and (limit_s is None or max(seconds) <= limit_s)
    record.say(f"{text}: {'reached' if reached else 'MISSED'}")
    return {"runs": runs, "least": least, "limit_s": limit_s, "reached": reached}


def seeds_of(args: argparse.Namespace) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def options_of(kind: str, args: argparse.Namespace) -> list[str]:
    changes = [part for change in args.set for part in ("--set", change)]
    given = {"scratch": [], "lite0": ["--weights", "imagenet"], "budget": ["--time-budget", args.time_budget]}
    return [*given[kind], *changes]


def name_of(data: str, kind: str, seed: int, args: argparse.Namespace) -> str:
    return f"{data}-{kind}{args.time_budget if kind == 'budget' else ''}-{seed}"


def train(record: Record, args: argparse.Namespace, data: str, kind: str, seed: int) -> dict[str, Json]:
    """The figures of a run, which is trained and evaluated where it isn't in `--runs` yet."""
    folder = args.runs / name_of(data, kind, seed, args)
    kept = folder / "bench.json"
    if not kept.exists():
        options = options_of(kind, args)
        shutil.rmtree(folder, ignore_errors=True)
        with empty_cache(args) as cache:
            call = partial(suanli, args, cache)
            trained = call("train", str(args.data / SETS[data]), "--seed", str(seed), *options, "--out", str(folder))
            call("evaluate", str(folder))
            images = BoxSet.of(folder, cache).write_yolo(cache / "yolo").parent / "images" / "test"
            predicted = call("predict", str(folder), str(images), "--engine", "reference")
        figures = figures_of(folder) | {"data": data, "kind": kind, "seed": seed, "options": options}
        figures |= {"seconds": trained.seconds, "train_memory_bytes": trained.memory_bytes, "said": trained.errors}
        figures |= {"predict_seconds": predicted.seconds, "predict_memory_bytes": predicted.memory_bytes}
        kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    found: dict[str, Json] = json.loads(kept.read_text(encoding="utf-8"))
    record.say(describe(found))
    return found


@contextmanager
def empty_cache(args: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=args.runs, prefix=".cache-") as folder:
        yield Path(folder)


def suanli(args: argparse.Namespace, cache: Path, *command: str) -> Measured:
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "SUANLI_CACHE": str(cache)}
    return run_measured([sys.executable, "-m", "suanli", *command, "--device", args.device, "--json"], environment)


def figures_of(folder: Path) -> dict[str, Json]:
    evaluation = json.loads((folder / "evaluation" / "test.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    recipe = json.loads((folder / "recipe.json").read_text())
    return {
        "scores": evaluation["scores"],
        "intervals": evaluation["intervals"],
        "count": evaluation["count"],
        "model": recipe["model"],
        **{key: summary[key] for key in ("epochs", "steps", "plan")},
        "train_phases": summary["seconds"],
    }


def describe(run: Mapping[str, Any]) -> str:
    score, (low, high) = run["scores"]["map_50"], run["intervals"]["map_50"]
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run["train_phases"].items())
    return (
        f"{run['data']}, {run['kind']}, seed {run['seed']}: mAP@0.5 {score:.2%} ({low:.2%} to {high:.2%}), "
        f"mAP {run['scores']['map']:.2%}, {run['count']} test images; {run['seconds']:.0f} s ({phases}), "
        f"{run['model']}, {run['epochs']:.0f} epochs, {'+'.join(run['plan']['speedups']) or 'no speedups'}; "
        f"memory: training {size(run['train_memory_bytes'])}, predicting {size(run['predict_memory_bytes'])}"
    )


# --- int8 -----------------------------------------------------------------------------------


def compare_int8(record: Record, args: argparse.Namespace) -> Json:
    train(record, args, "bccd", "scratch", args.first_seed)
    folder = args.runs / name_of("bccd", "scratch", args.first_seed, args)
    with empty_cache(args) as cache:
        found = suanli(args, cache, "optimize", str(folder), "--engines", args.engines, "--time-budget", "10m")
        boxes = BoxSet.of(folder, cache)
        result: dict[str, Json] = {"optimize": json.loads(found.output), "engines": {}}
        for one in result["optimize"]["candidates"]:
            if one["score"] is not None:
                gain = one["difference"]
                how = "" if gain is None else f", {describe_gain((gain['median'], gain['low'], gain['high']))}"
                record.say(f"optimize: {one['engine']} {one['precision']}: {one['state']}, mAP {one['score']:.2%}{how}")
        for engine in args.engines.split(","):
            result["engines"][engine] = {}
            answers = EngineAnswers(boxes, engine, cache / engine, args)
            for split in ("test", "val"):
                result["engines"][engine][split] = answers.compare(record, split)
    return result


class EngineAnswers:
    """One engine in float32 and int8, calibrated as `optimize` does it, but for the choice of images."""

    def __init__(self, boxes: BoxSet, engine: str, work: Path, args: argparse.Namespace) -> None:
        self.boxes, self.engine, self.loaded = boxes, engine, {}
        work.mkdir()
        write_onnx(boxes.saved, work / "model.onnx")
        training = StackedExamples(arrays=rows_of(boxes.prepared.splits["train"])).first(300)
        inputs = EngineInputs(
            model=boxes.run.model_path, onnx=work / "model.onnx", calibration=calibration_batches(training)
        )
        placement = Placement(device=detect(args.device), threads=args.threads)
        kind: Engine = registry.load("engines", engine)
        for precision in ("float32", "int8"):
            (work / precision).mkdir()
            kind.build(inputs, precision, work / precision, placement)
            self.loaded[precision] = kind.load(work / precision, precision, placement)

    def compare(self, record: Record, name: str) -> dict[str, Json]:
        task, split = self.boxes.saved.task, self.boxes.prepared.splits[name]
        rows = rows_of(split)
        records = {}
        for precision, loaded in self.loaded.items():
            parts = [loaded.answer({key: column[i : i + 1] for key, column in rows.items()}) for i in range(len(split))]
            answers = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            records[precision] = task.records(answers, split.targets)
        scores = {precision: task.scores(one)["map"] for precision, one in records.items()}
        gain = difference(task, records["float32"], records["int8"])
        reached = gain.median >= -INT8_LOSS
        record.say(
            f"{self.engine}, {len(split)} images ({name}): mAP {scores['float32']:.2%} in float32, "
            f"{scores['int8']:.2%} in int8, {describe_gain((gain.median, gain.low, gain.high))}; to lose at most "
            f"{100 * INT8_LOSS:.1f} points: {'reached' if reached else 'MISSED'}"
        )
        return {"scores": scores, "gain": [gain.median, gain.low, gain.high], "reached": reached}


def rows_of(split: Split) -> dict[str, np.ndarray]:
    return {name: np.asarray(column[split.index]) for name, column in split.inputs.items()}


def describe_gain(gain: Sequence[float]) -> str:
    median, low, high = (100 * value for value in gain)
    return f"{median:+.2f} points ({low:+.2f} to {high:+.2f})"


# --- LibreYOLO ------------------------------------------------------------------------------


def compare_peers(record: Record, args: argparse.Namespace) -> Json:
    result: dict[str, Json] = {}
    for data in args.sets.split(","):
        for seed in seeds_of(args):
            own = train(record, args, data, args.against, seed)
            folder = args.runs / name_of(data, args.against, seed, args)
            with empty_cache(args) as cache:
                boxes = BoxSet.of(folder, cache)
                described = boxes.write_yolo(cache / "yolo")
                for peer in args.peers.split(","):
                    one = compare_peer(record, args, boxes, described, peer, own, seed)
                    result[f"{data} {peer} {seed}"] = one
                    record.write({"peer": result})
    return result


def compare_peer(
    record: Record,
    args: argparse.Namespace,
    boxes: BoxSet,
    described: Path,
    peer: str,
    own: Mapping[str, Any],
    seed: int,
) -> dict[str, Json]:
    started = time.perf_counter()
    few = {"min_samples": FEW_IMAGES} if len(boxes.prepared.splits["train"]) < FEW_IMAGES else {}
    given = few | json.loads(args.peer_set)
    settings, epochs, speeds = plan_peer(args, described, peer, given, own["seconds"])
    planned_s = time.perf_counter() - started
    work = described.parent / f"{peer.replace(':', '-')}-work"
    lines, measured, answers = run_peer(args, described, peer, settings, work, epochs, own["seconds"], seed)
    other = boxes.score(answers)
    scores = boxes.compare(other)
    end = lines[-1]
    course = [line for line in lines if "epoch" in line]
    what = f"{own['data']}, LibreYOLO {peer}, seed {seed}"
    for line in course:
        if line["validated"]:
            record.say(
                f"{what}: {line['seconds']:6.0f} s, epoch {line['epoch']}, loss {line['loss']:.3f}, "
                f"validation by its own code: mAP@0.5 {line['map_50']:.2%}"
            )
    cut = any("cut" in line for line in lines)
    record.say(
        f"{what}: {end['parameters'] / 1e6:.1f} M parameters, {len(course)} of {epochs} epochs in "
        f"{end['seconds']:.0f} s {'(cut) ' if cut else ''}({own['seconds']:.0f} s of suanli), "
        f"{json.dumps(settings)}, at most {size(measured.memory_bytes)} in one process; "
        f"measuring its speed took {planned_s:.0f} s"
    )
    for name, title in (("map_50", "mAP@0.5"), ("map", "mAP")):
        sides = [scores[side][name] for side in ("suanli", "other")]
        ours, theirs = (f"{score:.2%} ({low:.2%} to {high:.2%})" for score, low, high in sides)
        better = "better" if scores["gain"][name][1] > 0 else "not shown to be better"
        record.say(f"{what}: {title} {theirs}; suanli {ours}: {describe_gain(scores['gain'][name])}, {better}")
    return {
        "suanli_s": own["seconds"],
        "peer_s": end["seconds"],
        "cut": cut,
        "epochs": epochs,
        "settings": settings,
        "speeds": speeds,
        "lines": lines,
        "scores": scores,
        "memory_bytes": measured.memory_bytes,
    }


def plan_peer(
    args: argparse.Namespace, described: Path, peer: str, given: Mapping[str, Json], limit_s: float
) -> tuple[dict[str, Json], int, list[Json]]:
    """The settings with the faster way of loading images, and the epochs that fit the time with it."""
    speeds = []
    for number, loading in enumerate(LOADING):
        settings = dict(loading) | dict(given)
        work = described.parent / f"{peer.replace(':', '-')}-calibration{number}"
        lines, _, _ = run_peer(args, described, peer, settings, work, None, limit_s, 0)
        shutil.rmtree(work)
        _, epoch, last = [line["epoch_s"] for line in lines if "epoch" in line]
        first = next(line["seconds"] for line in lines if line.get("ready"))
        validation_s = max(0.0, last - epoch)
        rest_s = lines[-1]["seconds"] - sum(line["epoch_s"] for line in lines if "epoch" in line)
        # The last epoch validates, and each tenth.
        epochs = int((MARGIN * limit_s - rest_s - validation_s) / (epoch + validation_s / 10))
        speeds.append(
            {"settings": settings, "ready_s": first, "epoch_s": epoch, "validation_s": validation_s, "epochs": epochs}
        )
    best = max(speeds, key=lambda speed: speed["epochs"])
    if best["epochs"] < 2:
        sys.exit(f"LibreYOLO's {peer} needs {best['epoch_s']:.0f} s for an epoch, and {limit_s:.0f} s are too few.")
    return best["settings"], best["epochs"], speeds


def run_peer(
    args: argparse.Namespace,
    described: Path,
    peer: str,
    settings: Mapping[str, Json],
    work: Path,
    epochs: int | None,
    limit_s: float,
    seed: int,
) -> tuple[list[dict[str, Any]], Measured, dict[str, np.ndarray]]:
    """What it printed, and its answers; without `epochs` it only measures."""
    work.mkdir()
    out, (family, model_size) = work / "answers.npz", peer.split(":")
    command = [str(args.peer_python), str(Path(__file__).parent / "detect_libreyolo.py"), str(described)]
    command += ["--images", str(described.parent / "images" / "test"), "--out", str(out), "--work", str(work)]
    command += ["--family", family, "--size", model_size, "--seed", str(seed), "--set", json.dumps(settings)]
    command += ["--calibrate"] if epochs is None else ["--epochs", str(epochs), "--limit-s", str(limit_s)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    environment.pop("PYTHONPATH", None)
    measured = run_measured([*command, "--started", str(time.time())], environment)
    lines = [json.loads(line) for line in measured.output.splitlines() if line.startswith("{")]
    answers = {} if epochs is None else {name: np.asarray(array) for name, array in np.load(out).items()}
    return lines, measured, answers


if __name__ == "__main__":
    main()
