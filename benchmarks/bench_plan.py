"""suanli's own plan compared with plain PyTorch: speed, and the score after the same number of steps.

Blocks of steps of three sides alternate: `plain`, a loop written by hand in plain PyTorch (float32, contiguous images,
eager; see `handwritten.py`); suanli with `--speedups none`; and suanli with its plan. The first shows that suanli's
own `none` isn't slowed down to make the plan look good.

Then `none` and the plan train from the same start on the same examples, and both are evaluated on the validation
split. The difference is taken example by example, with its 95 % interval. Rounding alone makes two trainings differ as
another seed would, so more seeds (`--seeds`) narrow the interval.

    python benchmarks/bench_plan.py ../shared/data --out records/…  [--subjects speednet] [--seeds 3]
"""

from __future__ import annotations

import argparse
import copy
import math

import numpy as np

from handwritten import Handwritten
from record import Record, arguments, start
from sides import Side, alternate, auto_plan
from splits import classes_of
from suanli.compute.infer import infer
from suanli.compute.plan import plain_plan
from suanli.compute.step_runner import apply_settings
from suanli.core.compare import Z_95, wilson_interval
from suanli.core.types import Device, Json, Plan
from suanli.machine import timing
from suanli.training.loop import Loop
from suanli.training.setup import Setup
from suanli.training.validation import validation_batch_size
from subjects import SUBJECTS, endless, load, steps_per_epoch

FLOORS = {"speednet": 2.0, "resnet18": 1.6}  # times plain PyTorch
TRAINED = {"speednet": 360, "resnet18": 112, "text_cnn": 526}  # steps before the scores are compared


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--subjects", default=",".join(FLOORS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="of a block; default: a second or two")
    parser.add_argument("--train", type=int, help="steps before the scores are compared; 0: no scores")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each side")
    args = parser.parse_args()
    device = start(args)
    record = Record("plan", args.out, device)
    results = {}
    for name in args.subjects.split(","):
        plan, rates = speed(record, name, args, device)
        results[name] = rates
        count = TRAINED[name] if args.train is None else args.train
        if count:
            results[name] |= {"scores": scores(record, name, args, device, plan, count)}
    record.close({"subjects": results})


def speed(record: Record, name: str, args: argparse.Namespace, device: Device) -> tuple[Plan, dict[str, Json]]:
    recipe, prepared = load(name, args.data, cache=args.cache)
    plan = auto_plan(Setup(recipe, prepared, device), args.cache)
    setup = Setup(endless(recipe), prepared, device)
    record.say(f"\n{name}: the plan is {', '.join(plan.speedups) or 'plain'}, {plan.threads} threads; {plan.origin}")
    none, fast = setup.trial(plain_plan(device)), setup.trial(plan)
    hand = Handwritten(setup.recipe, prepared, copy.deepcopy(none.model), device)
    count = args.steps or SUBJECTS[name].block
    sides = {"plain": Side(steps=hand.steps()), "none": Side.of(none), "plan": Side.of(fast)}
    seconds = alternate(sides, count, rounds=args.rounds, device=device)
    step_s = {side: timing.spread(values).median / count for side, values in seconds.items()}
    for side, took in step_s.items():
        record.say(f"{name:9} {side:6} {1e3 * took:9.2f} ms a step, {hand.batch_size / took:10,.0f} examples/s")
    ratios = {
        f"{fast_side}_over_{slow_side}": record.compare(
            f"{name}: {fast_side} / {slow_side}",
            timing.gain(seconds[slow_side], seconds[fast_side]),
            floor=FLOORS.get(name) if (fast_side, slow_side) == ("plan", "plain") else None,
        )
        for fast_side, slow_side in (("plan", "plain"), ("plan", "none"), ("none", "plain"))
    }
    description = {"speedups": plan.speedups, "threads": plan.threads, "origin": plan.origin, "seconds": plan.seconds}
    return plan, {"plan": description, "batch": hand.batch_size, "step_s": step_s, "block_s": seconds, "ratios": ratios}


# --- scores ---------------------------------------------------------------------------------


def scores(
    record: Record, name: str, args: argparse.Namespace, device: Device, plan: Plan, count: int
) -> dict[str, Json]:
    """Scores of both sides after `count` steps from the same start, for each seed."""
    sides = {"none": plain_plan(device), "plan": plan}
    right: dict[str, list[np.ndarray]] = {side: [] for side in sides}
    for seed in range(args.seeds):
        recipe, prepared = load(name, args.data, cache=args.cache, settings={"seed": seed})
        recipe = recipe.model_copy(update={"epochs": count / steps_per_epoch(recipe, prepared)})
        setup = Setup(recipe, prepared, device)
        for side, chosen in sides.items():
            loop = setup.trial(chosen)
            with apply_settings(loop.compute):
                for _ in loop.run():
                    pass
                right[side].append(answers(loop))
    texts = {side: [describe(one) for one in values] for side, values in right.items()}
    for seed in range(args.seeds):
        text = ", ".join(f"{side} {texts[side][seed]['accuracy']:.4f}" for side in sides)
        record.say(f"{name}: validation accuracy after {count} steps, seed {seed}: {text}")
    differences = np.mean(right["plan"], axis=0) - np.mean(right["none"], axis=0)
    low, middle, high = interval(differences)
    same = low <= 0 <= high
    record.say(
        f"{name}: plan minus none {100 * middle:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}, 95 %, paired, "
        f"{len(differences):,} examples, {args.seeds} seeds): {'no difference' if same else 'DIFFERENT'}"
    )
    return {"steps": count, **texts, "difference": {"mean": middle, "low": low, "high": high}, "same": same}


def answers(loop: Loop) -> np.ndarray:
    """1.0 for each validation example with a correct answer, else 0.0."""
    with loop.use_averaged_weights():
        batches = (inputs for inputs, _, _ in loop.val_feed.in_order(validation_batch_size(loop.recipe)))
        probabilities = infer(loop.compute, loop.preprocess, loop.task, batches)["probabilities"]
    return (probabilities.argmax(1) == classes_of(loop.val_feed.split)).astype(float)


def describe(right: np.ndarray) -> dict[str, Json]:
    return {"accuracy": float(right.mean()), "interval": list(wilson_interval(int(right.sum()), len(right)))}


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Low, mean and high of the mean of paired differences (N,), 95 %: normal, since N is hundreds."""
    middle = float(differences.mean())
    half = Z_95 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return middle - half, middle, middle + half


if __name__ == "__main__":
    main()
