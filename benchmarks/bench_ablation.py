"""What each idea of the fast recipe brings: the same training with one of them switched off, over several seeds.

All trainings have equal epochs and are scored on validation. Each is a process with one thread; as many run side by
side as there are cores, so seconds are for comparing within this table only.

    python benchmarks/bench_ablation.py ../shared/data --out records/…  [--epochs 1.5] [--seeds 5] [--ideas size,muon]
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import Processes
from record import Record, arguments, start
from suanli import hardware
from suanli.types import Json

# What switches each idea off. Rates of the other optimizers are usual ones; they were not searched.
IDEAS: dict[str, dict[str, Json]] = {
    "nothing": {},
    "progressive image size": {"progressive_resizing": []},
    "data-dependent whitening": {"model_args.whitening": False},
    "identity-like start": {"model_args.identity": False},
    "alternating flip (random instead)": {"augment": ["crop(padding=2)", "flip"]},
    "flip (none instead)": {"augment": ["crop(padding=2)"]},
    "crop": {"augment": ["flip(mode='alternate')"]},
    "Muon (SGD instead)": {"optimizer": "sgd", "lr": 0.1, "optimizer_args": {}, "weight_decay": 5e-4},
    "Muon (AdamW instead)": {"optimizer": "adamw", "lr": 3e-3, "optimizer_args": {}},
    "normalised filters": {"optimizer_args.normalize_filters": False},
    "quick batch-norm statistics": {"model_args.norm_momentum": 0.1},
    "quick biases": {"optimizer_args.bias_lr_scale": 1.0},
    "label smoothing": {"label_smoothing": 0.0},
    "the schedule (cosine instead)": {"schedule": "cosine"},
    "the schedule (constant instead)": {"schedule": "constant"},
    "no bias after whitening (one instead)": {"model_args.whitening_bias": True},
    "one convolution in the first group (two instead)": {"model_args.depths": [2, 2, 2]},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--file", default="cifar10.zip", help="of the data")
    parser.add_argument("--recipe", default="small_images")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ideas", help="parts of their names; default: all")
    given = parser.parse_args()
    wanted = [idea for idea in IDEAS if not given.ideas or any(part in idea for part in given.ideas.split(","))]
    ideas = ["nothing", *(idea for idea in wanted if idea != "nothing")]
    record = Record("ablation", given.out, start(given))
    record.say(
        f"{given.recipe} on {given.file}, {given.epochs:g} epochs, {given.seeds} seeds, validation accuracy in %"
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(hardware.cores()) as side_by_side:
        processes = Processes(Path(folder), 1)
        data = given.data / given.file
        processes.prepare(data)

        def train(idea: str, seed: int) -> dict[str, Json]:
            options = ["--recipe", given.recipe, "--epochs", f"{given.epochs:g}", "--seed", str(seed), "--threads", "1"]
            for field, value in IDEAS[idea].items():
                options += ["--set", f"{field}={json.dumps(value)}"]
            return processes.train(data, [*options, "--speedups", "channels_last,bf16"])[1]

        asked = {idea: [side_by_side.submit(train, idea, seed) for seed in range(given.seeds)] for idea in ideas}
        found: dict[str, Json] = {}
        for idea, runs in asked.items():
            done = [run.result() for run in runs]
            found[idea] = {
                "scores": [one["score"] for one in done],
                "seconds": [one["seconds"]["train"] for one in done],
            }
            tell(record, idea, found[idea], found["nothing"])
            record.write({"ideas": found})
    record.close({"ideas": found})


def tell(record: Record, idea: str, one: dict[str, list[float]], base: dict[str, list[float]]) -> None:
    """The score without the idea, and in pairs of equal seeds what the idea brings."""
    brings = [100 * (b - o) for b, o in zip(base["scores"], one["scores"], strict=True)]
    text = f"without {idea:50} {100 * statistics.mean(one['scores']):6.2f}, {statistics.mean(one['seconds']):5.1f} s"
    if one is not base:
        text += f"; it brings {statistics.mean(brings):+.2f} (standard error {standard_error(brings):.2f})"
    record.say(text)


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


if __name__ == "__main__":
    main()
