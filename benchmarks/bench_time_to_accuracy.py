"""Seconds to a target accuracy on CIFAR-10: `suanli train --target-accuracy` compared with other people's trainings.

Cold is a whole process, from the start of Python to the saved model, including planning, compiling and validation. Its
cache contains only the decoded images; the time of decoding is measured once and printed separately. Warm is from the
first step. Accuracy is that of the test split with a single view, evaluated afterwards; no choice depends on it. Each
seed is a process of its own.

    python benchmarks/bench_time_to_accuracy.py ../shared/data --out records/…  [--targets 0.7,0.8,0.9] [--seeds 5]

The peers (`--peers plain,resnet18`) are the two trainings of `peers.py`, also on decoded images, with `--peer-limit-s`
seconds each; for them every test score during training counts. With `--airbench FILE`, a copy of airbench94_muon.py of
https://github.com/KellerJordan/cifar10-airbench is run on the same images; it needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from processes import Processes
from record import Record, arguments, start
from splits import classes_of, inputs_of
from suanli.core.types import Json
from suanli.data.cache import PreparedData
from suanli.machine import device, precisions

LIMITS_S = {0.7: 12.0, 0.8: 30.0, 0.9: 720.0}  # on two cores whose convolutions reach 400 GFLOP/s


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--targets", type=numbers, default="0.7,0.8,0.9")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--peers", default="plain,resnet18")
    parser.add_argument("--peer-limit-s", type=float, default=600.0)
    parser.add_argument("--airbench", type=Path, help="airbench94_muon.py, on a GPU")
    args = parser.parse_args()
    record = Record("time_to_accuracy", args.out, start(args))
    values: dict[str, Json] = {"targets": {}, "peers": {}}
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder), args.threads)
        data = args.data / "cifar10.zip"
        started = time.perf_counter()
        prepared = processes.prepare(data)
        values["decoding_s"] = time.perf_counter() - started
        record.say(f"decoding, once: {values['decoding_s']:.1f} s")
        for target in args.targets:
            values["targets"][f"{target:g}"] = one_target(record, processes, data, target, args)
            record.write(values)
        arrays = Path(folder) / "arrays.npz"
        np.savez(arrays, **as_arrays(prepared))
        for peer in (p for p in args.peers.split(",") if p):
            values["peers"][peer] = one_peer(record, peer, arrays, args)
            record.write(values)
        if args.airbench is not None:
            values["peers"]["airbench"] = airbench(record, args.airbench, arrays, max(2, args.seeds))
    record.close(values)


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def one_target(
    record: Record, processes: Processes, data: Path, target: float, args: argparse.Namespace
) -> dict[str, Json]:
    runs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        options = ["--target-accuracy", f"{target:g}", "--seed", str(seed), "--device", args.device]
        cold_s, summary = processes.train(data, options)
        one = {
            "cold_s": cold_s,
            "warm_s": summary["seconds"]["train"],
            "accuracy": processes.evaluate(summary["run"])["accuracy"],
            "memory_bytes": summary["peak_memory_bytes"],
            **{key: summary[key] for key in ("score", "plan", "steps", "epochs")},
        }
        runs.append(one)
        record.say(
            f"{target:.0%} seed {seed}: {cold_s:6.1f} s cold, {one['warm_s']:6.1f} s warm, test {one['accuracy']:.4f}, "
            f"validation {one['score']:.4f}, {one['memory_bytes'] / 2**30:.2f} GiB, {'+'.join(one['plan']['speedups'])}"
        )
    cold, accuracy = [f["cold_s"] for f in runs], [f["accuracy"] for f in runs]
    memory = max(f["memory_bytes"] for f in runs)
    text = f"{target:.0%}: {format_mean(cold, '.1f')} s cold, {format_mean([f['warm_s'] for f in runs], '.1f')} s warm"
    text += f", test accuracy {format_mean([100 * a for a in accuracy], '.2f')} %"
    reached = statistics.mean(accuracy) >= target
    if (limit := LIMITS_S.get(target)) is not None:
        reached = reached and statistics.mean(cold) <= limit
        text += f"; to reach {target:.0%} in {limit:.0f} s: {'reached' if reached else 'MISSED'}"
    record.say(text)
    rates = precisions.measure(device.detect(args.device), processes.folder).convolutions
    name = max(rates, key=lambda precision: rates[precision])
    work = statistics.mean(cold) * rates[name]
    record.say(
        f"{target:.0%}: seconds times the convolutions of one thread, {rates[name] / 1e9:,.0f} GFLOP/s in {name}: "
        f"{work / 1e12:,.1f} TFLOP"
    )
    return {"runs": runs, "limit_s": limit, "reached": reached, "memory_bytes": memory}


def format_mean(values: list[float], form: str) -> str:
    """The mean with the standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{form}} (sd {spread:{form}}, {len(values)} seeds)"


def as_arrays(prepared: PreparedData) -> dict[str, np.ndarray]:
    """All but the test split, as the peers train on it, and the test split."""
    splits = {name: (inputs_of(split), classes_of(split)) for name, split in prepared.splits.items()}
    rest = [splits[name] for name in splits if name != "test"]
    return {
        "x_train": np.concatenate([inputs for inputs, _ in rest]),
        "y_train": np.concatenate([targets for _, targets in rest]),
        "x_test": splits["test"][0],
        "y_test": splits["test"][1],
    }


def one_peer(record: Record, peer: str, arrays: Path, args: argparse.Namespace) -> dict[str, Json]:
    command = [sys.executable, str(Path(__file__).parent / "peers.py"), peer, str(arrays)]
    command += ["--limit-s", str(args.peer_limit_s), "--started", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    course = [json.loads(line) for line in done.stdout.splitlines()]
    for at in course:
        record.say(f"{peer}: {at['seconds']:6.1f} s, {at['epochs']:.2f} epochs, test {at['accuracy']:.4f}")
    first = {}
    for target in args.targets:
        first[f"{target:g}"] = next((at["seconds"] for at in course if at["accuracy"] >= target), None)
        when = "not reached" if first[f"{target:g}"] is None else f"after {first[f'{target:g}']:.1f} s"
        record.say(f"{peer}: {target:.0%} {when}")
    return {"course": course, "reached_s": first}


def airbench(record: Record, script: Path, arrays: Path, seeds: int) -> dict[str, Json]:
    """Runs it and reads its output: it trains many times in one warm process and prints accuracy (with its views) and
    seconds of each run. A few of its 200 runs are enough."""
    if not torch.cuda.is_available():
        sys.exit("--airbench needs an NVIDIA GPU.")
    place = arrays.parent / "cifar10"  # where it looks before it downloads
    place.mkdir()
    with np.load(arrays) as loaded:
        for split in ("train", "test"):
            images, labels = torch.from_numpy(loaded[f"x_{split}"]), torch.from_numpy(loaded[f"y_{split}"]).long()
            values = {"images": images, "labels": labels, "classes": [str(c) for c in range(10)]}
            torch.save(values, place / f"{split}.pt")
    copy = arrays.parent / script.name
    copy.write_text(script.read_text(encoding="utf-8").replace("range(200)", f"range({seeds})"), encoding="utf-8")
    done = subprocess.run([sys.executable, str(copy)], capture_output=True, text=True, check=False, cwd=arrays.parent)
    record.say(done.stdout[-4000:])
    if done.returncode:
        sys.exit(f"{script} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    mean = re.search(r"Mean: ([0-9.]+)\s+Std: ([0-9.]+)", done.stdout)
    rows = [re.findall(r"\d+\.\d+", line) for line in done.stdout.splitlines() if line.startswith("|")]
    return {
        "accuracy": None if mean is None else {"mean": float(mean[1]), "sd": float(mean[2])},
        "rows": [[float(number) for number in row] for row in rows if row],
    }


if __name__ == "__main__":
    main()
