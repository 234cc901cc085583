"""Compares `suanli optimize` with what a careful engineer gets from each backend by hand, paired in one run, on a CPU.

Each network is trained briefly on real photos, so that calibration and scores mean something, and optimised once for
latency and once for throughput. The ways by hand (`engine_ways.py`) follow each backend's documentation and don't use
suanli's engines: eager PyTorch (float32, channels_last), torch.compile with freezing (float32, bfloat16; one thread and
all), ONNX Runtime (float32, int8 QDQ) and OpenVINO (float32, bfloat16, int8 by NNCF). All take the same rows of pixels
and return probabilities; each runs in a process of its own; timings alternate between them. suanli is compared with the
best way of each backend that loses at most half a point of validation accuracy.

Batch 1 is one call at a time. Batch 64 is 64 rows handed over together, until all 64 answers are there; OpenVINO may
take them in one call (hint LATENCY), or split over an AsyncInferQueue (hint THROUGHPUT) in pieces of the best size,
and the better counts. Its shapes are fixed for each batch size, as torch.compile's are.

    python benchmarks/bench_engines.py ../shared/data --out records/…  [--nets resnet18,vit_tiny] [--runs FOLDER]
    python benchmarks/bench_engines.py ../shared/data --out records/…  --accuracy-control

`--accuracy-control` compares with `nncf.quantize_with_accuracy_control` instead: its seconds, its score, and the speed
of its result. Not covered are GPUs, and settings that a backend's documentation calls experimental.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import suanli
from engine_ways import BATCHES, CALIBRATION, TOLERANCE, Way
from record import Record, arguments, start
from splits import classes_of, inputs_of
from suanli.core.compare import share_difference
from suanli.core.console import hide_progress
from suanli.core.run import Run
from suanli.core.types import Difference, Json
from suanli.engines.candidates import SearchResult
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine import device, timing
from suanli.models.model_folder import load_model
from suanli.training.prepare import DataOptions, resolve

PHOTOS, SMALL = "imagenette5k.zip", "cifar10.zip"
LEAST = {1: 20, 64: 2}  # calls of a turn
BEHIND = 1.3  # times the best of the same backend: no further turns
SAME = 0.05  # mean total variation distance of the answers at batch 1 and 64
FLOOR, RESNET_FLOOR, MEAN_FLOOR = 0.97, 3.0, 2.0
FAMILIES = ("openvino", "onnxruntime", "torch.compile", "eager")
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao")


@dataclass(frozen=True, kw_only=True)
class Net:
    model: str
    data: str = PHOTOS
    resnet: bool = False
    transformer: bool = False  # NNCF's documentation wants it stated


NETS = {
    "speednet": Net(model="speednet", data=SMALL),
    "resnet18": Net(model="resnet18", resnet=True),
    "resnet50": Net(model="resnet50", resnet=True),
    "mobilenet": Net(model="engine_nets:mobilenet"),
    "convnext": Net(model="engine_nets:convnext"),
    "vit_tiny": Net(model="vit_tiny", transformer=True),
}


def by_hand() -> list[Way]:
    """Eager PyTorch on all cores comes first: the scores of the others are compared with its."""
    cores = device.cores()
    bfloat16 = ["bfloat16"] if "bfloat16" in device.detect("cpu").fast_dtypes else []
    counts = sorted({cores, 1}, reverse=True)
    ways = [Way(backend="eager", precision="float32", threads=count) for count in counts]
    ways += [
        Way(backend="torch.compile", precision=precision, threads=count)
        for precision in ("float32", *bfloat16)
        for count in counts
    ]
    ways += [Way(backend="onnxruntime", precision=precision) for precision in ("float32", "int8")]
    for precision in ("float32", *bfloat16, "int8"):
        ways.append(Way(backend="openvino", precision=precision))
        ways.append(Way(backend="openvino queue", precision=precision, batches=BATCHES[1:]))
    return ways


def start_process(threads: int | None = None) -> Sandbox:
    """A process of `engine_ways.py`. The number of threads is set before it starts, as a careful engineer does it."""
    return Sandbox(module="engine_ways", environment={"OMP_NUM_THREADS": str(threads)} if threads else None)


@dataclass
class Running:
    """A loaded way, the scores of its answers, and the median time of each of its turns."""

    way: Way
    process: Sandbox
    remark: str
    accuracy: float = 0.0
    difference: Difference | None = None  # from eager float32
    drift: float = 0.0  # mean total variation distance from its answers
    batch_drift: float = 0.0  # the same distance between its answers at batch 1 and 64
    turns: dict[int, list[float]] = field(default_factory=dict)  # by batch
    racing: dict[int, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.way.name}: {self.remark}" if self.remark else self.way.name

    @property
    def refused(self) -> str:
        """Why a careful engineer would not use it; empty: they would."""
        assert self.difference is not None
        if not self.batch_drift <= SAME or not np.isfinite(self.drift):
            return "WRONG ANSWERS"
        return "refused" if self.difference.median < -TOLERANCE else ""

    def median_s(self, batch: int) -> float:
        return statistics.median(self.turns[batch])

    def to_json(self) -> dict[str, Json]:
        difference = None if self.difference is None else self.difference.to_json()
        medians = {str(batch): values for batch, values in self.turns.items()}
        about = {"accuracy": self.accuracy, "difference": difference, "drift": self.drift, "apart": self.batch_drift}
        return about | {"remark": self.remark, "refused": self.refused, "medians_s": medians}


class Bench:
    def __init__(self, args: Namespace, record: Record, folder: Path) -> None:
        self.args, self.record, self.folder = args, record, folder
        self._raw = None if args.out is None else args.out / f"{record.name}.jsonl"
        if self._raw is not None:
            self._raw.write_text("")
        self.keep("start", environment=record.environment, engines=device.versions(PACKAGES))

    def keep(self, what: str, **values: Json) -> None:
        """Adds a line to the raw record."""
        if self._raw is not None:
            with self._raw.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.clean({"what": what, **values})) + "\n")

    def clean(self, value: Json) -> Json:
        """Removes the names of local folders."""
        text = json.dumps(value).replace(str(self.folder), "…")
        return json.loads(text if len(str(Path.home())) == 1 else text.replace(str(Path.home()), "~"))

    # --- before the race ---

    def train(self, name: str) -> Path:
        """A run of the network: the user's, a kept one, or a new one."""
        net, args = NETS[name], self.args
        if name == "speednet" and args.run is not None:
            return Path(args.run)
        run = (args.runs or self.folder) / name
        if not (run / "model" / "model.json").exists():
            started = time.perf_counter()
            with hide_progress():
                suanli.train(
                    args.data / net.data,
                    model=net.model,
                    epochs=args.train_epochs,
                    settings={} if net.data == SMALL else {"preprocess.size": args.size},
                    device="cpu",
                    out=run,
                    cache_dir=args.cache,
                )
            self.record.say(
                f"{name}: trained for {args.train_epochs:g} epochs in {time.perf_counter() - started:.0f} s"
            )
        return run

    def make_case(self, name: str, run: Path, goals: Sequence[str]) -> Path:
        """A folder with the model, rows, and a copy of the run for each goal."""
        case = self.folder / f"case-{name}"
        for goal in goals:
            shutil.copytree(run, case / goal, ignore=shutil.ignore_patterns("engines", "checkpoints"))
        shutil.copytree(case / goals[0] / "model", case / "model")
        options = DataOptions.of_run(Run.open(run), cache_dir=self.args.cache)
        with hide_progress():
            recipe = load_model(case / "model", trust_code=True).recipe
            splits = resolve(options, recipe=recipe, settings={}, announce=False)[1].splits
        random = np.random.default_rng(0)  # the same rows in the same order as suanli uses
        order, training = random.permutation(len(splits["val"])), random.permutation(len(splits["train"]))
        if len(order) < BATCHES[-1]:
            sys.exit(f"{name}: {len(order)} validation examples are too few; {BATCHES[-1]} are needed.")
        np.save(case / "rows.npy", inputs_of(splits["val"])[order])
        np.save(case / "targets.npy", classes_of(splits["val"])[order])
        np.save(case / "calibration.npy", inputs_of(splits["train"])[np.sort(training[:CALIBRATION])])
        return case

    def optimize(self, name: str, case: Path, copy: str, **options: Json) -> tuple[SearchResult, float]:
        """Optimises a copy of the run; its result, and the seconds that it took."""
        started = time.perf_counter()
        with hide_progress():
            result = suanli.optimize(
                case / copy,
                time_budget=self.args.time_budget,
                cache_dir=self.args.cache,
                device="cpu",
                trust_code=True,
                **options,
            ).search
        took = time.perf_counter() - started
        tried = [
            {"name": c.name, "state": c.state, "reason": c.reason, "build_s": c.build_s} for c in result.candidates
        ]
        self.keep("optimize", net=name, options=options, seconds=took, found=result.to_json())
        states = ", ".join(f"{c['name']} {c['state']}" for c in tried if c["state"] not in ("impossible", "accepted"))
        self.record.say(
            f"{name}: optimize ({copy}) chose {result.chosen.name} in {took:.0f} s{'; ' if states else ''}{states}"
        )
        return result, took

    def build(self, name: str, case: Path, what: str, **more: Json) -> float | None:
        """Seconds; None, with a message, where it fails."""
        with start_process() as process:
            try:
                took = process.ask(self.args.limit_s, "build", what=what, case=str(case), **more)["took_s"]
            except SandboxError as error:
                self.record.say(self.clean(f"{name}: by hand, {what} can't be made: {error}"))
                self.keep("build", net=name, built=what, lost=str(error))
                return None
        self.keep("build", net=name, built=what, seconds=took, **more)
        return float(took)

    def load(self, name: str, case: Path, way: Way, stack: ExitStack) -> Running | None:
        process = stack.enter_context(start_process(way.threads))
        values = {"backend": way.backend, "precision": way.precision, "threads": way.threads, "batches": way.batches}
        try:
            reply = process.ask(self.args.limit_s, "load", case=str(case), way=values)
        except SandboxError as error:
            self.record.say(self.clean(f"{name}: {way.name} can't be run: {error}"))
            self.keep("load", net=name, way=way.name, lost=str(error))
            return None
        self.keep("load", net=name, way=way.name, seconds=reply["took_s"], remark=reply["remark"])
        turns: dict[int, list[float]] = {batch: [] for batch in way.batches}
        racing = dict.fromkeys(way.batches, True)
        return Running(way=way, process=process, remark=reply["remark"], turns=turns, racing=racing)

    def evaluate(self, name: str, case: Path, running: Sequence[Running]) -> None:
        """Scores all on the same rows, and compares them with the first."""
        targets, out = np.load(case / "targets.npy"), case / "answers.npy"
        most = BATCHES[-1]
        count = min(self.args.examples, len(targets)) // most * most
        known: dict[tuple[str, str], tuple[Running, np.ndarray]] = {}

        def answers(one: Running, rows: int, batch: int) -> np.ndarray:
            one.process.ask(self.args.limit_s, "answer", count=rows, batch=batch, out=str(out))
            probabilities: np.ndarray = np.load(out)
            return probabilities

        for one in running:
            sibling, all_answers = known.get((one.way.backend, one.way.precision), (one, None))
            few = answers(one, most, most)
            all_answers = answers(one, count, most) if all_answers is None else all_answers
            reference = known[next(iter(known))][1] if known else all_answers
            known.setdefault((one.way.backend, one.way.precision), (one, all_answers))
            one.batch_drift = distance(few, all_answers[:most])
            if 1 in one.way.batches:
                one.batch_drift = max(one.batch_drift, distance(few, answers(one, most, 1)))
            if sibling is not one:  # the same with another number of threads
                one.accuracy, one.difference, one.drift = sibling.accuracy, sibling.difference, sibling.drift
            else:
                right = all_answers.argmax(1) == targets[:count]
                one.accuracy, one.drift = float(right.mean()), distance(all_answers, reference)
                one.difference = share_difference(reference.argmax(1) == targets[:count], right)
            self.keep("exam", net=name, way=one.way.name, examples=count, **one.to_json())

    # --- the race ---

    def race(self, name: str, running: Sequence[Running]) -> None:
        for number in range(self.args.rounds):
            for batch in BATCHES:
                for one in running if number % 2 == 0 else running[::-1]:
                    if one.racing.get(batch):
                        self.turn(name, one, batch, number)
            if number >= 1:
                drop(running)

    def turn(self, name: str, one: Running, batch: int, number: int) -> None:
        time.sleep(0.05)  # until the threads of the previous way no longer spin while they wait for work
        try:
            request = {"batch": batch, "for_s": self.args.turn_s, "least": LEAST[batch]}
            seconds = one.process.ask(self.args.limit_s, "time", **request)["seconds"]
        except SandboxError as error:
            one.racing, one.turns = {}, {}
            self.record.say(self.clean(f"{name}: {one.way.name} was lost while it was timed: {error}"))
            return
        p50 = statistics.median(seconds)
        one.turns[batch].append(p50)
        about = {"calls": len(seconds), "p50_s": p50, "p95_s": timing.percentile(seconds, 0.95), "low_s": min(seconds)}
        self.keep("turn", net=name, way=one.way.name, batch=batch, round=number, **about)

    # --- results ---

    def table(self, running: Sequence[Running]) -> None:
        titles = f"{'p50 ms at 1':>11} {'images/s at 64':>14} {'accuracy':>9} {'points':>7} {'drift':>7}"
        self.record.say(f"  {'way':36} {titles}")
        for one in running:
            assert one.difference is not None
            one_ms = f"{1e3 * one.median_s(1):.3f}" if one.turns.get(1) else ""
            rate = f"{BATCHES[-1] / one.median_s(BATCHES[-1]):,.0f}" if one.turns.get(BATCHES[-1]) else ""
            ended = [f"{len(turns)} rounds at {b}" for b, turns in one.turns.items() if len(turns) < self.args.rounds]
            self.record.say(
                f"  {one.name:36} {one_ms:>11} {rate:>14} {one.accuracy:9.2%} {100 * one.difference.median:+7.2f} "
                f"{one.drift:7.4f} {', '.join([*filter(None, [one.refused]), *ended])}".rstrip()
            )

    def compare(self, name: str) -> dict[str, Json]:
        """All of one network."""
        goals = self.args.goals
        case = self.make_case(name, self.train(name), goals)
        results = {goal: self.optimize(name, case, goal, goal=goal) for goal in goals}
        builds = {what: self.build(name, case, what) for what in ("onnx", "onnxruntime")}
        builds["openvino"] = self.build(name, case, "openvino", transformer=NETS[name].transformer)
        running = self.measure(name, case, [*by_hand(), *(Way(backend="suanli", precision=goal) for goal in goals)])
        chosen = {goal: {"chosen": one.chosen.name, "seconds": seconds} for goal, (one, seconds) in results.items()}
        values = {"optimized": chosen, "build_s": builds, "ways": {one.way.name: one.to_json() for one in running}}
        return values | {"figures": self.figures(name, running)}

    def measure(self, name: str, case: Path, ways: Sequence[Way]) -> list[Running]:
        """Evaluates and times those that can be run; the scores of the others are compared with the first."""
        with ExitStack() as stack:
            running = [one for way in ways if (one := self.load(name, case, way, stack)) is not None]
            if not running or running[0].way != ways[0]:
                sys.exit(f"{name}: without {ways[0].name} nothing can be compared.")
            self.evaluate(name, case, running)
            self.race(name, running)
        self.table(running)
        shutil.rmtree(case)
        return running

    def figures(self, name: str, running: Sequence[Running]) -> dict[str, Json]:
        """For each size of a batch, how many times as fast suanli's engine is as the best of each backend."""
        record, ratios = self.record, {}
        ours = {one.way.precision: one for one in running if one.way.backend == "suanli" and one.turns}
        if not ours:
            record.say(f"{name}: NO ENGINE OF SUANLI IS LEFT TO COMPARE\n")
            return {}
        for batch, goal in zip(BATCHES, ("latency", "throughput"), strict=True):
            own = ours.get(goal) or next(iter(ours.values()))
            for family in FAMILIES:
                best = quickest(running, family, batch)
                if best is None:
                    record.say(f"{name}: nothing by hand with {family} is usable at batch {batch}")
                    continue
                gained = timing.gain(best.turns[batch], own.turns[batch])
                floor = (RESNET_FLOOR if NETS[name].resnet else None) if family == "eager" else FLOOR
                what = f"{name}, batch {batch}: suanli / {best.way.name}"
                ratios[f"{family} {batch}"] = record.compare(what, gained, floor=floor)
                if (loose := quickest(running, family, batch, scored=False)) is not None and loose is not best:
                    gained = timing.gain(loose.turns[batch], own.turns[batch])
                    what = f"{name}, batch {batch}: suanli / {loose.way.name}, which is {loose.refused}"
                    ratios[f"{family} {batch}, any score"] = record.compare(what, gained)
        for own in ours.values():
            self.score(name, own)
        record.say()
        return ratios

    def score(self, name: str, own: Running) -> None:
        """The accuracy that suanli's engine loses, compared with what it may."""
        assert own.difference is not None
        points = own.difference
        reached = points.median >= -TOLERANCE
        self.record.say(
            f"{name}: {own.name}: {100 * points.median:+.2f} points of accuracy (95 % interval {100 * points.low:+.2f} "
            f"to {100 * points.high:+.2f}), to lose at most {100 * TOLERANCE:g}: {'reached' if reached else 'MISSED'}"
        )
        about = {"what": f"{name}: accuracy, {own.name}", "value": points.median, "floor": -TOLERANCE}
        self.record.figures.append({**about, "interval": points.to_json(), "reached": reached})

    def control(self, name: str) -> dict[str, Json]:
        """Compares one network with NNCF's own accuracy control."""
        case = self.make_case(name, self.train(name), ["int8"])
        result, ours_s = self.optimize(name, case, "int8", engines="openvino")
        own = sum(c.build_s or 0.0 for c in result.candidates if (c.engine, c.precision) == ("openvino", "int8"))
        options = {"transformer": NETS[name].transformer, "control": result.examples}
        exported, controlled = self.build(name, case, "onnx"), self.build(name, case, "openvino", **options)
        values = {"optimize_s": ours_s, "int8_build_s": own, "export_s": exported, "nncf_s": controlled}
        if exported is None or controlled is None:
            return values
        self.record.say(
            f"{name}: NNCF with accuracy control took {controlled:.1f} s after {exported:.1f} s for the ONNX graph, "
            f"suanli optimize {ours_s:.1f} s for everything, of which building int8 {own:.1f} s; both evaluated "
            f"{result.examples} validation examples"
        )
        theirs_s = exported + controlled
        values["times"] = self.record.figure(f"{name}: seconds, NNCF / suanli optimize", theirs_s / ours_s, 0.0, 1)
        eager = Way(backend="eager", precision="float32", threads=device.cores())
        ways = [eager, Way(backend="openvino", precision="controlled"), Way(backend="suanli", precision="int8")]
        running = self.measure(name, case, ways)
        values["ways"] = {one.way.name: one.to_json() for one in running}
        for batch in BATCHES:
            turns = [one.turns[batch] for one in running[1:] if one.turns.get(batch)]
            if len(turns) == 2:
                what = f"{name}, batch {batch}: suanli ({running[-1].remark}) / NNCF with accuracy control"
                values[f"speed {batch}"] = self.record.compare(what, timing.gain(*turns))
        return values


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean total variation distance, 0 to 1, of probabilities (N, K); not a number where some aren't finite."""
    return float(np.abs(one - other).sum(1).mean() / 2)


def quickest(running: Sequence[Running], family: str, batch: int, *, scored: bool = True) -> Running | None:
    """The fastest way of a backend that was timed in every round; `scored`: and that doesn't lose too much accuracy."""
    able = [one for one in running if one.way.family == family and one.racing.get(batch) and one.turns.get(batch)]
    able = [one for one in able if not (one.refused and scored)]
    return min(able, key=lambda one: one.median_s(batch), default=None)


def drop(running: Sequence[Running]) -> None:
    """Gives no further turns to ways that are far slower than the best of their backend."""
    for batch in BATCHES:
        for one in running:
            best = None if one.way.backend == "suanli" else quickest(running, one.way.family, batch)
            if best is not None and one.turns.get(batch) and one.median_s(batch) > BEHIND * best.median_s(batch):
                one.racing[batch] = False


def summarize(record: Record, results: Mapping[str, Json]) -> None:
    """A line for each network and batch size, then the means over all networks."""
    record.say(f"{'times as fast as the best of':24} {' '.join(f'{family:>13}' for family in FAMILIES)}")
    for name, one in results.items():
        for batch in BATCHES:
            values = [one["figures"].get(f"{family} {batch}") for family in FAMILIES]
            cells = (f"{value['value']:7.2f} ±{value['spread']:4.2f}" if value else "" for value in values)
            record.say(f"{f'{name}, batch {batch}':24} {' '.join(f'{text:>13}' for text in cells)}")
    record.say()
    for batch in BATCHES:
        for family in FAMILIES:
            key = f"{family} {batch}"
            if values := [one["figures"][key]["value"] for one in results.values() if key in one["figures"]]:
                floor = MEAN_FLOOR if family == "eager" else FLOOR
                what = f"geometric mean of {len(values)} nets, batch {batch}: suanli / best of {family}"
                spread = timing.spread(values).half_iqr  # between nets
                record.figure(what, statistics.geometric_mean(values), spread, len(values), floor=floor)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-s", type=float, default=0.5, help="of timing, each way in each round")
    parser.add_argument("--size", type=int, default=128, help="of photos, px")
    parser.add_argument("--train-epochs", type=float, default=1.0)
    parser.add_argument("--run", type=Path, help="an existing run of speednet on cifar10")
    parser.add_argument("--runs", type=Path, help="a folder where trained runs are kept for the next time")
    parser.add_argument("--time-budget", default="3m", help="of each optimize")
    parser.add_argument("--goals", type=lambda text: text.split(","), default="latency,throughput")
    parser.add_argument("--examples", type=int, default=2000, help="of validation, at most, for the scores here")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="for one request to a process")
    parser.add_argument("--accuracy-control", action="store_true", help="against NNCF's own control instead")
    args = parser.parse_args()
    nets = args.nets.split(",")
    if unknown := set(nets) - set(NETS):
        parser.error(f"unknown nets {', '.join(sorted(unknown))}; known: {', '.join(NETS)}")
    if args.device != "cpu":
        parser.error("what is written by hand here is for the CPU")
    if not set(args.goals) <= {"latency", "throughput"}:
        parser.error("goals are latency and throughput")
    kind = "accuracy_control" if args.accuracy_control else "engines"
    record = Record("_".join([kind, *(nets if len(nets) < len(NETS) else [])]), args.out, start(args))
    record.say(", ".join(f"{name} {version}" for name, version in device.versions(PACKAGES).items()) + "\n")
    os.environ.pop("OMP_NUM_THREADS", None)  # a way has its own number, or its backend chooses
    results: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, record, Path(folder).resolve())
        for name in nets:
            results[name] = bench.control(name) if args.accuracy_control else bench.compare(name)
            record.write(bench.clean({"nets": results}))
        if not args.accuracy_control:
            summarize(record, results)
        record.close(bench.clean({"engines": device.versions(PACKAGES), "nets": results}))


if __name__ == "__main__":
    main()
