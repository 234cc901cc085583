"""Is suanli's own plan never slower than plain PyTorch, and nearly as fast as the fastest of all that make sense?

For each subject, `--speedups auto` chooses a plan. Then up to 32 stated combinations race until three are left
(`oracle.py`). Then blocks of steps alternate in fresh rounds: `plain`, a loop written by hand in plain PyTorch
(float32, contiguous images, eager; see `handwritten.py`); suanli with `--speedups none`, which must not be slow, or the
choice would look good; the choice; and the best three, since the best of many noisy figures flatters itself. The choice
must not be below 1.0 of plain PyTorch by more than its spread, and must reach 0.95 of the best. A round during which
other processes kept cores busy is measured again.

    python benchmarks/bench_plan.py ../shared/data --out records/… [--subjects speednet] [--fresh-cache] [--train 360]

Another kind of processor is had by limiting this one, which the record says: ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2. Use `--fresh-cache` there: kept plans
and figures of the machine don't know of the limit.

`--short` compares whole commands instead, with a training too short to plan at leisure: `suanli train DATA --epochs E
--speedups X` in new processes, each with an empty cache except for decoded data. X is `auto`, `none` and each of the
best three, which are read from the record that the same command without `--short` left in `--out`.

With `--train`, `none` and the plan train for so many steps from the same start on the same examples, and both are
evaluated on the validation split. The difference is taken example by example, with its 95 % interval. Rounding alone
makes two trainings differ as another seed would, so more seeds (`--seeds`) narrow the interval.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import oracle
from handwritten import Handwritten
from processes import Processes
from record import Others, Record, arguments, start
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

PLAIN_FLOOR, BEST_FLOOR = 1.0, 0.95
DISTURBING = 0.2  # cores that others keep busy during a round
BLOCK_S = 0.5  # of a block: of plain PyTorch in the race, of the fastest plan in the fresh rounds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--name", default="plan", help="of the files in --out")
    parser.add_argument("--fresh-cache", action="store_true", help="auto plans with an empty cache of its own")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the race, for each subject")
    parser.add_argument("--rounds", type=int, help="fresh ones, default 9; with --short 3")
    parser.add_argument("--short", action="store_true", help="compare whole commands")
    parser.add_argument("--epochs", type=float, help="of --short; default: the subject's")
    parser.add_argument("--train", type=int, default=0, help="steps before the scores are compared; 0: no scores")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each side")
    args = parser.parse_args()
    if args.short and args.out is None:
        parser.error("--short reads the best three from the record in --out: give that")
    device = start(args)
    known = read_best(args) if args.short else {}
    record = Record(f"{args.name}_short" if args.short else args.name, args.out, device)
    results: dict[str, Json] = {}
    for name in args.subjects.split(","):
        record.say()
        if args.short:
            results[name] = short_runs(record, name, args, known[name])
        else:
            results[name] = judge(record, name, args, device)
        record.write({"subjects": results})
    for what, key in (("plain PyTorch", "choice_over_plain"), ("the best", "choice_over_best")):
        name = min(results, key=lambda name: results[name]["ratios"][key]["value"])
        worst = results[name]["ratios"][key]
        record.say(f"worst choice against {what}: {worst['value']:.3f} (spread {worst['spread']:.3f}), {name}")
    record.close({"subjects": results})


def judge(record: Record, name: str, args: argparse.Namespace, device: Device) -> dict[str, Json]:
    recipe, prepared = load(name, args.data, cache=args.cache)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        choice = auto_plan(Setup(recipe, prepared, device), empty if args.fresh_cache else args.cache)
    planning_s = time.perf_counter() - started
    record.say(f"{name}: the choice is {oracle.label(choice)}; {choice.origin}, in {planning_s:.1f} s")
    setup = Setup(endless(recipe), prepared, device)
    plans = oracle.combinations(setup)
    plain = Side.of(setup.trial(plain_plan(device)))
    count = max(1, round(BLOCK_S / plain.block(1, untimed=2)))
    raced = oracle.race(setup, plans, count=count, budget_s=args.seconds)
    raced_s = {which: min(seconds) / count for which, seconds in raced.items()}
    record.say(f"{name}: {len(plans)} combinations, batch {setup.recipe.batch_size}, blocks of {count} steps")
    for which, seconds in raced_s.items():
        record.say(f"  {1e3 * seconds:9.2f} ms, {len(raced[which])} rounds: {which}")
    best = {which: plans[which] for which in list(raced)[: oracle.BEST]}
    fresh_count = max(1, round(BLOCK_S / min(raced_s.values())))
    fresh, disturbed = measure_afresh(setup, choice, best, count=fresh_count, rounds=args.rounds or 9)
    if disturbed:
        record.say(f"{name}: {disturbed} further rounds were disturbed by other processes and don't count")
    for which, seconds in fresh.items():
        step_s = statistics.median(seconds) / fresh_count
        record.say(f"{name}: {1e3 * step_s:9.2f} ms a step: {which}")
    result: dict[str, Json] = {
        "choice": {**described(choice), "origin": choice.origin, "seconds": choice.seconds, "planning_s": planning_s},
        "best": {which: described(plan) for which, plan in best.items()},
        "batch": setup.recipe.batch_size,
        "raced_steps": count,
        "raced_block_s": {which: [s if math.isfinite(s) else None for s in taken] for which, taken in raced.items()},
        "fresh_steps": fresh_count,
        "fresh_block_s": fresh,
        "disturbed_rounds": disturbed,
        "ratios": verdicts(record, name, fresh, choice=oracle.label(choice), best=best, plain="plain"),
    }
    result["ratios"]["none_over_plain"] = record.compare(
        f"{name}: none / plain", timing.gain(fresh["plain"], fresh["none"])
    )
    if args.train:
        result["scores"] = scores(record, name, args, device, choice, args.train)
    return result


def described(plan: Plan) -> dict[str, Json]:
    return {"speedups": plan.speedups, "threads": plan.threads}


def measure_afresh(
    setup: Setup, choice: Plan, best: Mapping[str, Plan], *, count: int, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds of blocks of `count` steps of each side, by label: equal plans are one side. Also the number of rounds
    that don't count, `rounds` at most, because other processes kept more than DISTURBING cores busy meanwhile."""
    plans = {"none": plain_plan(setup.device), **best, oracle.label(choice): choice}
    loops = {which: setup.trial(plan) for which, plan in plans.items()}
    hand = Handwritten(setup.recipe, setup.prepared, copy.deepcopy(setup.module), setup.device)
    sides = {"plain": Side(steps=hand.steps()), **{which: Side.of(loop) for which, loop in loops.items()}}
    taken: dict[str, list[float]] = {which: [] for which in sides}
    alternate(sides, count, rounds=0, device=setup.device, warm_up=1)
    disturbed = 0
    while len(taken["plain"]) < rounds:
        others = Others()
        order = sides if (len(taken["plain"]) + disturbed) % 2 else dict(reversed(sides.items()))
        one = alternate(order, count, rounds=1, device=setup.device, warm_up=0)
        if others.cores() > DISTURBING and disturbed < rounds:
            disturbed += 1
            continue
        for which, seconds in one.items():
            taken[which] += seconds
    return taken, disturbed


def verdicts(
    record: Record,
    name: str,
    taken: Mapping[str, Sequence[float]],
    *,
    choice: str,
    best: Mapping[str, Json],
    plain: str,
) -> dict[str, Json]:
    """The choice against plain PyTorch, and against what is the best of `best` in these rounds."""
    fastest = min(best, key=lambda which: statistics.median(taken[which]))
    over_plain, over_best = (timing.gain(taken[other], taken[choice]) for other in (plain, fastest))
    return {
        "choice_over_plain": record.compare(
            f"{name}: choice / {plain}", over_plain, floor=PLAIN_FLOOR, within_spread=True
        ),
        "choice_over_best": record.compare(f"{name}: choice / {fastest}", over_best, floor=BEST_FLOOR),
    }


# --- short runs ------------------------------------------------------------------------------


def read_best(args: argparse.Namespace) -> dict[str, Json]:
    """The best three of each subject, from the record of the race."""
    file: Path = args.out / f"{args.name}.json"
    subjects = json.loads(file.read_text())["subjects"] if file.is_file() else {}
    if missing := [name for name in args.subjects.split(",") if name not in subjects]:
        sys.exit(f"{file} has no best three of {', '.join(missing)}: run the same command without --short first")
    return {name: result["best"] for name, result in subjects.items()}


def short_runs(record: Record, name: str, args: argparse.Namespace, best: Mapping[str, Json]) -> dict[str, Json]:
    """Whole commands in turn. The rate is that of the run's summary: of its steps, planning excluded."""
    subject = SUBJECTS[name]
    ways = {which: ",".join(plan["speedups"]) or "none" for which, plan in best.items()}
    threads = {which: plan["threads"] for which, plan in best.items()}
    ways |= {"auto": "auto", "none": "none"}
    epochs = args.epochs or subject.short
    options = ["--recipe", subject.recipe, "--device", args.device]
    for field, value in {**subject.settings, "epochs": epochs}.items():
        options += ["--set", f"{field}={json.dumps(value)}"]
    runs: dict[str, list[dict[str, Json]]] = {which: [] for which in ways}
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder), args.threads)
        load(name, args.data, cache=Path(folder))
        for number in range(args.rounds or 3):
            for which in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                how = ["--speedups", ways[which]]
                how += ["--threads", str(threads[which])] if threads.get(which) else []
                others = Others()
                took, summary = processes.train(args.data / subject.file, [*options, *how])
                del summary["run"]
                runs[which].append({"process_s": took, "others_cores": others.cores(), **summary})
                used = "+".join(summary["plan"]["speedups"]) or "none"
                record.say(
                    f"{name}, {epochs:g} epochs: {summary['examples_per_s']:9,.1f} examples/s, process {took:5.1f} s, "
                    f"others {others.cores():.2f} cores: {which}{f' ({used})' if which == 'auto' else ''}"
                )
    taken = {which: [1 / one["examples_per_s"] for one in done] for which, done in runs.items()}
    ratios = verdicts(record, f"{name}, short", taken, choice="auto", best=best, plain="none")
    return {"epochs": epochs, "runs": runs, "ratios": ratios}


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
