"""The cost of suanli's loop: its images per second compared with a loop written by hand, with the same settings.

Both sides train copies of one network with the same optimizer, batch size, augmentations, precision and
layout, on the same rows. suanli's side is `Loop.run()`, with everything that it does in a step: order of
examples, seeds, learning rate, clocks, the check of the loss. The other is `handwritten.py`. Blocks of steps
alternate, and each round gives a ratio.

    python benchmarks/bench_loop.py ../shared/data --out records/…  [--subjects speednet,text_cnn] [--rounds 15]

`text_cnn` is the hard case: its step is so short that a millisecond of overhead would show.
"""

from __future__ import annotations

import copy

from handwritten import MEANS, Handwritten
from record import Record, arguments, start
from sides import Side, alternate, plan_of
from suanli.core.types import Json
from suanli.machine import timing
from suanli.training.setup import Setup
from subjects import SUBJECTS, endless, load

FLOOR = 0.98  # of the hand-written loop's images per second


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="of a block; default: a second or two")
    args = parser.parse_args()
    device = start(args)
    record = Record("loop", args.out, device)
    results = {}
    for name in args.subjects.split(","):
        recipe, prepared = load(name, args.data, cache=args.cache)
        setup = Setup(endless(recipe), prepared, device)
        plan = plan_of(MEANS, setup)
        loop = setup.trial(plan)
        hand = Handwritten(setup.recipe, prepared, copy.deepcopy(loop.model), device, plan.speedups)
        record.say(f"{name}: both sides with {', '.join(plan.speedups) or 'plain PyTorch'}")
        count = args.steps or SUBJECTS[name].block
        sides = {"hand": Side(steps=hand.steps()), "suanli": Side.of(loop)}
        seconds = alternate(sides, count, rounds=args.rounds, device=device)
        results[name] = {"speedups": plan.speedups, **figures(record, name, seconds, count, hand.batch_size)}
    record.close({"subjects": results})


def figures(record: Record, name: str, seconds: dict[str, list[float]], count: int, batch: int) -> dict[str, Json]:
    step_s = {side: timing.spread([s / count for s in values]) for side, values in seconds.items()}
    for side, times in step_s.items():
        rate = batch / times.median
        record.say(f"{name:9} {side:7} {1e3 * times.median:9.2f} ms a step of {batch}, {rate:10,.0f} examples/s")
    ratio = record.compare(
        f"{name}: suanli / hand-written", timing.gain(seconds["hand"], seconds["suanli"]), floor=FLOOR
    )
    cost_ms = 1e3 * (step_s["suanli"].median - step_s["hand"].median)
    record.say(f"{name}: {cost_ms:+.2f} ms a step\n")
    return {
        "batch": batch,
        "steps_of_a_block": count,
        "block_s": seconds,
        "step_s": {side: times.median for side, times in step_s.items()},
        "suanli_over_handwritten": ratio,
    }


if __name__ == "__main__":
    main()
