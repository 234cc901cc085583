"""What each effort of a recipe reaches: validation accuracy over several seeds. Its mean less its standard error is
what the recipe's table may promise.

Each training is a process with one thread; as many run side by side as there are cores.

    python benchmarks/bench_efforts.py ../shared/data --out records/…  [--recipe small_images] [--file cifar10.zip]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_ablation import standard_error
from processes import Processes
from record import Record, arguments, start
from suanli import hardware
from suanli.plugins import load
from suanli.types import Effort, Json, RecipeChoice


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--file", default="cifar10.zip", help="of the data, or the name of a data set")
    parser.add_argument("--recipe", default="small_images")
    parser.add_argument("--only", help="numbers of efforts, from 0, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--speedups", default="channels_last,bf16")
    given = parser.parse_args()
    choice: RecipeChoice = load("recipes", given.recipe)
    only = range(len(choice.efforts)) if given.only is None else [int(n) for n in given.only.split(",")]
    record = Record(f"efforts_{given.recipe}", given.out, start(given))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(hardware.cores()) as side_by_side:
        processes = Processes(Path(folder), 1)
        data = given.data / given.file if (given.data / given.file).exists() else given.file
        processes.prepare(data)

        def train(effort: Effort, seed: int) -> dict[str, Json]:
            options = ["--recipe", given.recipe, "--seed", str(seed), "--threads", "1", "--speedups", given.speedups]
            for field, value in effort.changes.items():
                options += ["--set", f"{field}={json.dumps(value)}"]
            return processes.train(data, options)[1]

        asked = {n: [side_by_side.submit(train, choice.efforts[n], s) for s in range(given.seeds)] for n in only}
        found: dict[str, Json] = {}
        for number, runs in asked.items():
            done = [run.result() for run in runs]
            scores, seconds = [one["score"] for one in done], [one["seconds"]["train"] for one in done]
            promise = statistics.mean(scores) - standard_error(scores)
            changes = dict(choice.efforts[number].changes)
            found[str(number)] = {"changes": changes, "scores": scores, "seconds": seconds, "promise": promise}
            record.say(
                f"{json.dumps(changes)}: {100 * statistics.mean(scores):.2f} % "
                f"(standard error {100 * standard_error(scores):.2f}, {len(scores)} seeds), "
                f"{statistics.mean(seconds):.1f} s; promise {promise:.4f}"
            )
            record.write({"efforts": found})
    record.close({"efforts": found})


if __name__ == "__main__":
    main()
