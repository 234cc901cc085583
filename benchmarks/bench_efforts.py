"""What each effort of a recipe reaches: validation accuracy over several seeds. Its mean less its standard error is
what the recipe's table may promise.

Each training is a process with one thread; as many run side by side as there are cores.

    python benchmarks/bench_efforts.py ../shared/data --out records/…  [--recipe small_images] [--file cifar10.zip]
"""

from __future__ import annotations

import json
from dataclasses import asdict

from processes import standard_error, train_all
from record import Record, arguments, start
from suanli.core.registry import load
from suanli.core.types import Json, RecipeChoice


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--file", default="cifar10.zip", help="of the data, or the name of a data set")
    parser.add_argument("--recipe", default="small_images")
    parser.add_argument("--only", help="numbers of efforts, from 0, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    choice: RecipeChoice = load("recipes", given.recipe)
    only = range(len(choice.budgets)) if given.only is None else [int(n) for n in given.only.split(",")]
    record = Record(f"efforts_{given.recipe}", given.out, start(given))
    data = given.data / given.file if (given.data / given.file).exists() else given.file
    ways = {str(number): dict(choice.budgets[number].changes) for number in only}
    found: dict[str, Json] = {}
    for number, one in train_all(data, ways, ["--recipe", given.recipe], given.seeds):
        promise = one.mean - standard_error(one.scores)
        found[number] = {"changes": ways[number], **asdict(one), "promise": promise}
        record.say(f"{json.dumps(ways[number])}: {one}; promise {promise:.4f}")
        record.write({"efforts": found})
    record.close({"efforts": found})


if __name__ == "__main__":
    main()
