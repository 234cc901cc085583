"""The plan that suanli measures for itself against plain PyTorch: speed, and the score after equal steps.

Three sides take turns, a block of steps each: `plain`, a loop written by hand in plain PyTorch (float32,
images as planes, eager; see `handwritten.py`); suanli with `--speedups none`; and suanli with its plan. The
first shows that suanli's own `none` isn't slowed down to look good beside it.

Then `none` and the plan train from the same start over the same examples, and both are examined on the
validation split. The difference is taken example by example, with its 95 % interval. Rounding alone sends
two trainings apart as another seed would, so several seeds (`--seeds`) narrow it.

    python benchmarks/bench_plan.py ../shared/data --out records/…  [--subjects speednet] [--seeds 3]
"""

from __future__ import annotations

import argparse
import copy
import math

import numpy as np

from handwritten import Handwritten
from record import Record, arguments, start
from sides import Side, auto_plan, by_turns
from suanli.compute.infer import infer
from suanli.compute.plan import plain_plan
from suanli.compute.step_runner import apply_settings
from suanli.core.types import Device, Json, Plan
from suanli.machine import timing
from suanli.tasks.classification import Z_95, wilson_interval
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
    given = parser.parse_args()
    device = start(given)
    record = Record("plan", given.out, device)
    found = {}
    for name in given.subjects.split(","):
        plan, rates = speed(record, name, given, device)
        found[name] = rates
        count = TRAINED[name] if given.train is None else given.train
        if count:
            found[name] |= {"scores": scores(record, name, given, device, plan, count)}
    record.close({"subjects": found})


def speed(record: Record, name: str, given: argparse.Namespace, device: Device) -> tuple[Plan, dict[str, Json]]:
    recipe, prepared = load(name, given.data, cache=given.cache)
    plan = auto_plan(Setup(recipe, prepared, device), given.cache)
    setup = Setup(endless(recipe), prepared, device)
    record.say(f"\n{name}: the plan is {', '.join(plan.speedups) or 'plain'}, {plan.threads} threads; {plan.origin}")
    none, fast = setup.trial(plain_plan(device)), setup.trial(plan)
    hand = Handwritten(setup.recipe, prepared, copy.deepcopy(none.model), device)
    count = given.steps or SUBJECTS[name].block
    sides = {"plain": Side(steps=hand.steps()), "none": Side.of(none), "plan": Side.of(fast)}
    seconds = by_turns(sides, count, rounds=given.rounds, device=device)
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
    shown = {"speedups": plan.speedups, "threads": plan.threads, "origin": plan.origin, "seconds": plan.seconds}
    return plan, {"plan": shown, "batch": hand.batch_size, "step_s": step_s, "block_s": seconds, "ratios": ratios}


# --- scores ---------------------------------------------------------------------------------


def scores(
    record: Record, name: str, given: argparse.Namespace, device: Device, plan: Plan, count: int
) -> dict[str, Json]:
    """Of both sides after `count` steps from the same start, for each seed."""
    sides = {"none": plain_plan(device), "plan": plan}
    right: dict[str, list[np.ndarray]] = {side: [] for side in sides}
    for seed in range(given.seeds):
        recipe, prepared = load(name, given.data, cache=given.cache, settings={"seed": seed})
        recipe = recipe.model_copy(update={"epochs": count / steps_per_epoch(recipe, prepared)})
        setup = Setup(recipe, prepared, device)
        for side, chosen in sides.items():
            loop = setup.trial(chosen)
            with apply_settings(loop.compute):
                for _ in loop.run():
                    pass
                right[side].append(answers(loop))
    shown = {side: [describe(one) for one in values] for side, values in right.items()}
    for seed in range(given.seeds):
        text = ", ".join(f"{side} {shown[side][seed]['accuracy']:.4f}" for side in sides)
        record.say(f"{name}: validation accuracy after {count} steps, seed {seed}: {text}")
    differences = np.mean(right["plan"], axis=0) - np.mean(right["none"], axis=0)
    low, middle, high = interval(differences)
    same = low <= 0 <= high
    record.say(
        f"{name}: plan minus none {100 * middle:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}, 95 %, paired, "
        f"{len(differences):,} examples, {given.seeds} seeds): {'no difference' if same else 'DIFFERENT'}"
    )
    return {"steps": count, **shown, "difference": {"mean": middle, "low": low, "high": high}, "same": same}


def answers(loop: Loop) -> np.ndarray:
    """1.0 for each validation example that is answered rightly, else 0.0."""
    with loop.use_averaged_weights():
        batches = (rows for rows, _, _ in loop.val_feed.in_order(validation_batch_size(loop.recipe)))
        found = infer(loop.compute, loop.preprocess, loop.task, batches)
    return (found.argmax(1) == loop.val_feed.split.targets).astype(float)


def describe(right: np.ndarray) -> dict[str, Json]:
    return {"accuracy": float(right.mean()), "interval": list(wilson_interval(int(right.sum()), len(right)))}


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Low, mean and high of the mean of paired differences (N,), 95 %: normal, since N is hundreds."""
    middle = float(differences.mean())
    half = Z_95 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return middle - half, middle, middle + half


if __name__ == "__main__":
    main()
