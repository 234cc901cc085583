"""Many short trainings and their validation scores: the search before a recipe's budgets are measured.

    python benchmarks/search.py DATA --ways FILE --out records/…  [--seeds 3] [--worker 0/4] [--until-s 100]

Each line of FILE is a JSON object: changes of the recipe's fields. Each way is trained with every seed in one process;
several workers share the lines. Each line of the output is a JSON object: the changes, scores (one view, and the views
of the augmentations), seconds, operations of a whole training. It uses only the validation split.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from gpu_figures import training_flops
from processes import standard_error
from record import arguments, start
from suanli.compute.plan import plain_plan
from suanli.core.console import hide_progress
from suanli.core.errors import SuanliError
from suanli.training.prepare import DataOptions, resolve
from suanli.training.recipe import change
from suanli.training.setup import Setup
from warm import Warm

SPEEDUPS = ["channels_last", "bf16", "cudnn_benchmark", "resident", "graphs"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--file", default="cifar10.zip", help="of the data")
    parser.add_argument("--recipe", default="small_images")
    parser.add_argument("--ways", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worker", default="0/1", help="which part of the lines, of how many")
    parser.add_argument("--until-s", type=float, default=1e9, help="no way starts later")
    parser.add_argument("--speedups", default=",".join(SPEEDUPS))
    args = parser.parse_args()
    began = time.perf_counter()
    device = start(args)
    worker, workers = map(int, args.worker.split("/"))
    options = DataOptions.of(args.data / args.file, data_dir=None, cache_dir=args.cache)
    with hide_progress():
        recipe, prepared = resolve(options, recipe=args.recipe, settings={}, announce=False)
    lines = [line for line in args.ways.read_text().splitlines() if line.strip()][worker::workers]
    for line in lines:
        if time.perf_counter() - began > args.until_s:
            break
        changes = json.loads(line)
        result: dict[str, object] = {"changes": changes}
        try:
            subject = change(recipe, changes)
            warm = Warm(subject, prepared, device, args.speedups.split(","))
            runs = [warm.train(seed) for seed in range(args.seeds)]
            single = [run.single for run in runs]
            plain = Setup(subject, prepared, device).trial(plain_plan(device))
            result |= {
                "single": statistics.mean(single),
                "standard_error": standard_error(single),
                "views": statistics.mean(run.views for run in runs),
                "train_s": min(run.train_s for run in runs),
                "steps": warm.loop.steps,
                "flops": training_flops(plain) * plain.full_size_steps_left,
                "runs": [asdict(run) for run in runs],
            }
        except (SuanliError, RuntimeError) as error:
            result["failed"] = str(error)[:300]
        text = json.dumps(result)
        print(text, flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / f"search{worker}.jsonl").open("a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
