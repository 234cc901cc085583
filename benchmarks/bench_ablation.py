"""What each idea of the fast recipe brings: the same training with one of them switched off, over several seeds.

All trainings have equal epochs and are scored on validation. Each is a process with one thread; as many run side by
side as there are cores, so seconds are for comparing within this table only.

    python benchmarks/bench_ablation.py ../shared/data --out records/…  [--epochs 1.5] [--seeds 5] [--ideas size,muon]

`--way NAME JSON` adds changes of the recipe's fields that are not a switch of the fast recipe; `--ideas nothing` leaves
those alone.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict

from processes import Scored, standard_error, train_all
from record import Record, arguments, start
from suanli.core.types import Json

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
    parser.add_argument("--size", type=int, help="px of the pictures; default: the recipe's")
    parser.add_argument("--way", nargs=2, action="append", default=[], metavar=("NAME", "JSON"))
    given = parser.parse_args()
    wanted = [idea for idea in IDEAS if not given.ideas or any(part in idea for part in given.ideas.split(","))]
    ideas = ["nothing", *(idea for idea in wanted if idea != "nothing")]
    record = Record("ablation", given.out, start(given))
    record.say(
        f"{given.recipe} on {given.file}, {given.epochs:g} epochs, {given.seeds} seeds, validation accuracy in %"
    )
    found: dict[str, Scored] = {}
    ways = {idea: IDEAS[idea] for idea in ideas} | {name: json.loads(text) for name, text in given.way}
    options = ["--recipe", given.recipe]
    every: dict[str, Json] = {"epochs": given.epochs} | ({} if given.size is None else {"preprocess.size": given.size})
    ways = {idea: every | changes for idea, changes in ways.items()}
    for idea, one in train_all(given.data / given.file, ways, options, given.seeds):
        found[idea] = one
        tell(record, idea, one, found["nothing"], added=idea not in IDEAS)
        record.write({"ideas": {idea: asdict(one) for idea, one in found.items()}})
    record.close({"ideas": {idea: asdict(one) for idea, one in found.items()}})


def tell(record: Record, idea: str, one: Scored, base: Scored, *, added: bool) -> None:
    """The score without the idea, or with what was `added`, and in pairs of equal seeds what it brings."""
    text = f"{'with' if added else 'without'} {idea:50} {one}"
    if one is not base:
        sign = 100 if added else -100
        brings = [sign * (o - b) for b, o in zip(base.scores, one.scores, strict=True)]
        text += f"; it brings {statistics.mean(brings):+.2f} (standard error {standard_error(brings):.2f})"
    record.say(text)


if __name__ == "__main__":
    main()
