"""suanli on a machine that is not quiet: beside one or two processes that burn a core each.

`train`: `suanli train` on CIFAR-10, pictures of full size. In the middle of the run one competitor starts, and ends;
then two. The throughput of each phase is read from the run's own log, without the first seconds of the phase, in which
a plan may change. `auto` is what users get; the same speedups with a fixed number of threads stand beside it.

`serve`: `suanli serve` with an open loop at a third of what one client after the other reaches, quiet and beside one
competitor in turn. Figures are of the 99th percentile. Without `--model` it serves the run of `train`.

    python benchmarks/bench_busy.py ../shared/data --out records/…  [--parts train,serve] [--seconds 20] [--model RUN]

Linux only: it reads /proc. `serve` needs h2load.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench_serve import infer
from h2load import Answers, closed, offered
from record import Record, arguments, start
from servers import send, served
from suanli.core.run import Run
from suanli.core.types import Json
from suanli.machine.timing import spread
from subjects import SUBJECTS

FLOORS = {1: 0.5, 2: 0.33}  # throughput beside so many competitors, over that of the quiet phases around it
TAIL = 4.0  # times the quiet p99 that a served answer may take beside one
PHASES = (0, 1, 0, 2, 0)  # competitors
SETTLE_S = 8.0  # of a phase that don't count
PATIENCE_S = 300.0
SHARE = 1 / 3  # of the capacity, in `serve`
BURN = "import time; end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


@contextlib.contextmanager
def competitors(count: int, limit_s: float = 600.0) -> Iterator[None]:
    """So many processes that burn a core each while the block runs; they end by themselves after `limit_s`."""
    command = [sys.executable, "-c", BURN.format(limit_s)]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- training -----------------------------------------------------------------------------------


@contextlib.contextmanager
def training(run: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    """Runs `suanli train` during the block; asks it to stop at the end, as Ctrl-C does."""
    line = [sys.executable, "-m", "suanli", "train", *map(str, options), f"--out={run}"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output, text=True)
        try:
            yield process
            if process.poll() is not None:
                output.seek(0)
                sys.exit(f"{' '.join(line)}\nended with {process.returncode}:\n{output.read()[-3000:]}")
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE_S)
        finally:
            send(process.pid, signal.SIGKILL)
            process.wait()


def logged(run: Path) -> list[Json]:
    return [line for line in Run(run).metrics if "loss" in line] if run.exists() else []


def throughput(lines: list[Json], batch: int) -> float:
    """Examples a second between the first and the last of some logged losses."""
    first, last = lines[0], lines[-1]
    return float(batch * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"]))


def phases(run: Path, process: subprocess.Popen[str], seconds: float, rounds: int) -> list[tuple[int, float]]:
    """The number of competitors and the throughput of each phase, once the run trains."""
    until = time.monotonic() + PATIENCE_S
    while len(logged(run)) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    measured = []
    for count in (*PHASES, *PHASES[1:] * (rounds - 1)):
        with competitors(count):
            time.sleep(SETTLE_S)
            seen = len(logged(run))
            time.sleep(max(0.0, seconds - SETTLE_S))
            lines = logged(run)[seen - 1 :]
        if process.poll() is not None or len(lines) < 2:
            sys.exit(f"The run ended, or logged no loss, beside {count} competitors. Give more --epochs or --seconds.")
        measured.append((count, throughput(lines, Run(run).recipe.batch_size)))
    return measured


def shares(measured: list[tuple[int, float]], count: int) -> list[float]:
    """Throughput beside `count` competitors over the mean of the quiet phases before and after, each time."""
    return [
        measured[i][1] / statistics.mean((measured[i - 1][1], measured[i + 1][1]))
        for i in range(1, len(measured) - 1)
        if measured[i][0] == count
    ]


def train(record: Record, args: argparse.Namespace, folder: Path) -> Json:
    data = args.data if args.data.is_file() else args.data / SUBJECTS["speednet"].file
    usual = [
        data,
        "--device=cpu",
        f"--epochs={args.epochs}",
        "--set=progressive_resizing=[]",
        "--set=validate_every=99",
    ]
    usual += [f"--cache-dir={args.cache}"] if args.cache else []
    results: dict[str, Json] = {}
    ways: dict[str, list[str]] = {"auto": ["--speedups=auto"]}
    for way in ("auto",) if args.only_auto else ("auto", f"{args.threads} threads", "1 thread"):
        run = folder / way.replace(" ", "_")
        with training(run, *usual, *ways[way]) as process:
            measured = phases(run, process, args.seconds, args.rounds)
        plan = Run(run).summary["plan"]
        if way == "auto":
            names = ",".join(plan["speedups"]) or "none"
            for threads in {args.threads, 1}:
                key = f"{threads} threads" if threads > 1 else "1 thread"
                ways[key] = [f"--speedups={names}", f"--threads={threads}"]
        record.say(f"\n{way}: {', '.join(plan['speedups']) or 'plain'}, {plan['threads']} threads at the end")
        record.say("  " + "; ".join(f"beside {count}: {rate:,.0f}/s" for count, rate in measured))
        for count, floor in FLOORS.items():
            share = spread(shares(measured, count))
            what = f"train, {way}: beside {count} / quiet"
            record.figure(what, share.median, share.half_iqr, share.count, floor=floor if way == "auto" else None)
        results[way] = {"plan": plan, "phases": [{"beside": c, "examples_per_s": r} for c, r in measured]}
        record.write({"train": results})
    return results


# --- serving ------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace, folder: Path) -> Path:
    """A run of a few steps, with engines where they are installed."""
    subject, run = SUBJECTS["resnet18"], folder / "served"
    cache = [f"--cache-dir={args.cache}"] if args.cache else []
    settings = [f"--set={name}={value}" for name, value in subject.settings.items()]
    commands = [["train", args.data / subject.file, f"--out={run}", "--epochs=0.05", "--speedups=none", *settings]]
    if find_spec("openvino") is not None:
        commands.append(["optimize", run, "--engines=openvino,onnxruntime", "--time-budget=90s"])
    for command in commands:
        subprocess.run([sys.executable, "-m", "suanli", *map(str, command), *cache], check=True, capture_output=True)
    return run


def serve(record: Record, args: argparse.Namespace, model: Path) -> Json:
    times: dict[int, list[Answers]] = {0: [], 1: []}
    with served(model) as (port, _):
        target = infer(port)
        per_s = SHARE * closed(target, 1, 3.0).per_s
        record.say(f"\nserve: {per_s:,.0f} requests a second")
        for number in range(2 * args.rounds + 1):
            for count in (0, 1) if number % 2 == 0 else (1, 0):
                with competitors(count):
                    answers = offered(target, per_s, args.seconds / 2)
                if not answers.accepted_ms:
                    sys.exit(f"No request was answered beside {count} competitors: {answers.to_json()}")
                times[count].append(answers)
    for count, values in times.items():
        p99, late = spread([one.p99_ms for one in values]), sum(len(one.refused_ms) + one.failed for one in values)
        record.say(f"serve, beside {count}: p99 {p99.median:.2f} ± {p99.half_iqr:.2f} ms; {late} refused or failed")
    ratios = spread([quiet.p99_ms / busy.p99_ms for quiet, busy in zip(times[0], times[1], strict=True)])
    record.figure("serve: quiet / busy p99", ratios.median, ratios.half_iqr, ratios.count, floor=1 / TAIL)
    return {str(count): [one.to_json() for one in values] for count, values in times.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="train,serve")
    parser.add_argument("--seconds", type=float, default=24.0, help="of a phase of training; serving takes half")
    parser.add_argument("--rounds", type=int, default=1, help="of phases")
    parser.add_argument("--epochs", type=float, default=12.0, help="more than the phases have time for")
    parser.add_argument("--only-auto", action="store_true", help="no fixed numbers of threads beside it")
    parser.add_argument("--model", type=Path, help="for serve: a run or a model folder")
    args = parser.parse_args()
    record = Record("busy", args.out, start(args))
    values: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        if "train" in args.parts.split(","):
            values["train"] = train(record, args, folder)
        if "serve" in args.parts.split(","):
            values["serve"] = serve(record, args, args.model or make_model(args, folder))
    record.close(values)


if __name__ == "__main__":
    main()
