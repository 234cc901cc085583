"""The effect of each idea in the fast recipe: the same training with one of them switched off, over several seeds.

All trainings have the same number of epochs and are scored on validation. Each is a process with one thread; as many
run in parallel as there are cores, so compare the seconds only within this table.

    python benchmarks/bench_ablation.py ../shared/data --out records/…  [--epochs 1.5] [--seeds 5] [--ideas size,muon]

`--way NAME JSON` adds other changes of the recipe's fields; `--ideas nothing` runs only those.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict

from processes import Scored, standard_error, train_all
from record import Record, arguments, start
from suanli.core.types import Json

# The changes that switch each idea off. The learning rates of the other optimizers are usual ones and were not tuned.
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
    parser.add_argument("--size", type=int, help="px of the pictures; default: the recipe's")
    parser.add_argument("--way", nargs=2, action="append", default=[], metavar=("NAME", "JSON"))
    args = parser.parse_args()
    chosen = [idea for idea in IDEAS if not args.ideas or any(part in idea for part in args.ideas.split(","))]
    ideas = ["nothing", *(idea for idea in chosen if idea != "nothing")]
    record = Record("ablation", args.out, start(args))
    record.say(f"{args.recipe} on {args.file}, {args.epochs:g} epochs, {args.seeds} seeds, validation accuracy in %")
    results: dict[str, Scored] = {}
    ways = {idea: IDEAS[idea] for idea in ideas} | {name: json.loads(text) for name, text in args.way}
    options = ["--recipe", args.recipe]
    every: dict[str, Json] = {"epochs": args.epochs} | ({} if args.size is None else {"preprocess.size": args.size})
    ways = {idea: every | changes for idea, changes in ways.items()}
    for idea, one in train_all(args.data / args.file, ways, options, args.seeds):
        results[idea] = one
        report(record, idea, one, results["nothing"], added=idea not in IDEAS)
        record.write({"ideas": {idea: asdict(one) for idea, one in results.items()}})
    record.close({"ideas": {idea: asdict(one) for idea, one in results.items()}})


def report(record: Record, idea: str, one: Scored, base: Scored, *, added: bool) -> None:
    """Prints the score without the idea, or with an `added` change, and its effect, from pairs of equal seeds."""
    text = f"{'with' if added else 'without'} {idea:50} {one}"
    if one is not base:
        sign = 100 if added else -100
        brings = [sign * (o - b) for b, o in zip(base.scores, one.scores, strict=True)]
        text += f"; it brings {statistics.mean(brings):+.2f} (standard error {standard_error(brings):.2f})"
    record.say(text)


if __name__ == "__main__":
    main()
