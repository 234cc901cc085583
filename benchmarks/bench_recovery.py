"""The cost of a killed process, in a run with two processes on this machine.

`recovery`: `speednet` on CIFAR-10. Once it runs at full rate, one process is killed. Measured is the time until losses
are logged again, and until they come at full rate: nine tenths of the median before. It includes the agent's reaction,
the start of the new processes, the check before the first step, reading the checkpoint, and the repeated steps.

`kills`: a small network on digits, whose processes are killed at random times, also while they start. The final weights
must be those of an undisturbed run, bit by bit, with the same score, and no half-written file may remain.

    python benchmarks/bench_recovery.py ../shared/data --out records/…  [--parts recovery,kills] [--kills 50]

Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from record import Record, arguments, start
from servers import send, tree
from suanli.core.run import Run
from suanli.core.types import Json
from suanli.training import checkpoint
from subjects import SUBJECTS

LIMIT_S = 20.0  # from a kill to full rate
FULL = 0.9  # of the median rate before the kill
PATIENCE_S = 180.0
Logged = tuple[int, float, float]  # step, seconds and examples per second of a logged loss


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="recovery,kills")
    parser.add_argument("--rounds", type=int, default=7, help="kills of which each is recovered from")
    parser.add_argument("--kills", type=int, default=50, help="kills at random times")
    parser.add_argument("--epochs", type=int, default=250, help="on digits, between which the kills fall")
    args = parser.parse_args()
    parts = args.parts.split(",")
    record = Record("_".join(parts), args.out, start(args))
    values: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "recovery" in parts:
            data = args.data if args.data.is_file() else args.data / SUBJECTS["speednet"].file
            values["recovery"] = recovery(record, data, Path(folder), args.rounds, args.cache)
            record.write(values)
        if "kills" in parts:
            values["kills"] = kills(record, Path(folder), args.kills, args.epochs)
    record.close(values)


@contextlib.contextmanager
def training(*command: object) -> Iterator[subprocess.Popen[str]]:
    """Runs `suanli train` during the block, and always ends what it started."""
    with tempfile.TemporaryFile("w+") as output:
        line = [sys.executable, "-m", "suanli", "train", *map(str, command), "--nproc=2", "--device=cpu", "--json"]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=output, text=True)
        try:
            yield process
            if process.poll() not in (None, 0):
                output.seek(0)
                sys.exit(f"{' '.join(line)}\nended with {process.returncode}:\n{output.read()[-3000:]}")
        finally:
            send(process.pid, signal.SIGKILL)
            process.wait()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The training processes: children of the agent with suanli in their command."""
    pids = []
    for one in tree(process.pid)[1:]:
        with contextlib.suppress(OSError):
            if b"suanli" in Path(f"/proc/{one}/cmdline").read_bytes():
                pids.append(one)
    return pids


def logged(run: Path) -> list[Logged]:
    return [(m["step"], m["seconds"], m["examples_per_s"]) for m in Run(run).metrics if "loss" in m]


def recovery(record: Record, data: Path, folder: Path, rounds: int, cache: Path | None) -> Json:
    run = folder / "recovered"
    settings = ["--speedups=none", "--epochs=1000", f"--max-restarts={rounds}", "--checkpoint-every-s=5"]
    settings += [f"--out={run}"] + ([f"--cache-dir={cache}"] if cache else [])
    recoveries = []
    with training(data, *settings) as process:
        for number in range(rounds):
            chance = random.Random(number)
            while len(logged(run)) < 8:
                _new(process, run, logged(run))
            full = statistics.median(rate for _, _, rate in logged(run)[-8:])
            time.sleep(chance.uniform(12, 18))
            seen, saved = logged(run), checkpoint.last_step(run / "checkpoints")
            os.kill(chance.choice(workers(process)), signal.SIGKILL)
            killed = time.perf_counter()
            _new(process, run, seen)
            first = time.perf_counter() - killed
            rate = _new(process, run, seen, least=FULL * full)[2]
            whole = time.perf_counter() - killed
            one = {"step": seen[-1][0], "saved": saved, "first_s": first, "full_s": whole}
            recoveries.append(one | {"rate_before": full, "rate_after": rate})
            record.say(
                f"kill {number + 1} after step {seen[-1][0]}, saved at {saved}: losses again after {first:.1f} s, "
                f"at full rate after {whole:.1f} s ({rate:.0f} of {full:.0f} images/s)"
            )
    worst = max(f["full_s"] for f in recoveries)
    median = statistics.median(f["full_s"] for f in recoveries)
    record.say(f"from the kill to full rate: median {median:.1f} s, worst {worst:.1f} s of {rounds}")
    record.figure(f"{LIMIT_S:.0f} s / the worst recovery", LIMIT_S / worst, 0.0, rounds, floor=1.0)
    return {"kills": recoveries, "median_s": median, "worst_s": worst}


def _new(process: subprocess.Popen[str], run: Path, seen: list[Logged], least: float = 0.0) -> Logged:
    """Waits for a logged loss that isn't in `seen`, at a rate of at least `least`. Exits where none comes."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        for line in logged(run):
            if line not in seen and line[2] >= least:
                return line
        time.sleep(0.05)
    sys.exit(f"no loss was logged for {PATIENCE_S:.0f} s, or the run ended")


def kills(record: Record, folder: Path, count: int, epochs: int) -> Json:
    settings = ["digits", f"--epochs={epochs}", "--batch-size=64", "--speedups=none", "--seed=3"]
    settings += ['--set=model_args={"widths": [8, 8, 8]}']
    whole, run = folder / "whole", folder / "killed"
    began = time.perf_counter()
    with training(*settings, f"--out={whole}") as process:
        process.wait()
    undisturbed = time.perf_counter() - began
    chance = random.Random(5)
    at: list[float] = []
    learned = 0
    began = time.perf_counter()
    with training(*settings, f"--out={run}", "--checkpoint-every-s=0.5", f"--max-restarts={count + 10}") as process:
        while len(at) < count and process.poll() is None:
            before = logged(run)
            time.sleep(chance.uniform(1, 15))
            if alive := workers(process):
                learned += set(logged(run)) != set(before)
                os.kill(chance.choice(alive), signal.SIGKILL)
                at.append(time.perf_counter() - began)
        process.wait()
    took = time.perf_counter() - began
    same = _weights(run) == _weights(whole)
    status = Run(run).summary["status"]
    kept = [_score(one) for one in (whole, run)]
    half = [str(p.relative_to(run)) for p in run.rglob("*") if p.suffix in (".tmp", ".partial")]
    record.say(
        f"{len(at)} kills in {took:.0f} s, {learned} of them after losses had been logged since the one before; "
        f"undisturbed it takes {undisturbed:.0f} s"
    )
    record.say(f"the run {status}; validation {kept[1]:.4f}, undisturbed {kept[0]:.4f}")
    record.say(
        f"weights {'the same bit by bit' if same else 'DIFFER'}; half-written files: {', '.join(half) or 'none'}"
    )
    reached = len(at) == count and same and not half and status == "finished"
    record.figure(f"{count} kills survived, to the same bits", float(reached), 0.0, 1, floor=1.0)
    return {
        "at_s": at,
        "seconds": took,
        "undisturbed_s": undisturbed,
        "same": same,
        "scores": kept,
        "half_written": half,
    }


def _weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "weights.safetensors").read_bytes()).hexdigest()


def _score(run: Path) -> float:
    return float([m["scores"]["accuracy"] for m in Run(run).metrics if m.get("split") == "val"][-1])


if __name__ == "__main__":
    main()
