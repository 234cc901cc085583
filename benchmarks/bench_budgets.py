"""The score of each budget of a recipe: validation accuracy over several seeds. The recipe may promise the mean minus
its standard error.

Each training is a process with one thread; as many run in parallel as there are cores.

    python benchmarks/bench_budgets.py ../shared/data --out records/…  [--recipe small_images] [--file cifar10.zip]
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
    parser.add_argument("--only", help="numbers of budgets, from 0, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    choice: RecipeChoice = load("recipes", args.recipe)
    only = range(len(choice.budgets)) if args.only is None else [int(n) for n in args.only.split(",")]
    record = Record(f"efforts_{args.recipe}", args.out, start(args))
    data = args.data / args.file if (args.data / args.file).exists() else args.file
    ways = {str(number): dict(choice.budgets[number].changes) for number in only}
    results: dict[str, Json] = {}
    for number, one in train_all(data, ways, ["--recipe", args.recipe], args.seeds):
        promise = one.mean - standard_error(one.scores)
        results[number] = {"changes": ways[number], **asdict(one), "promise": promise}
        record.say(f"{json.dumps(ways[number])}: {one}; promise {promise:.4f}")
        record.write({"efforts": results})
    record.close({"efforts": results})


if __name__ == "__main__":
    main()
