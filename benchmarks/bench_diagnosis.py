"""The cost of the diagnosis: training steps with the clock and the watch, compared with the same steps without.

Both sides are the same loop with the same network in one process, with and without the clock, alternating every few
steps; a third side, also without it, shows what the ratio of equal sides looks like here. The loop is written by hand
and marks the same phases as suanli's own: input, forward, backward, optimizer. There are two sizes: `small` is the
worst case, a network for digits whose steps take a few milliseconds; a step of `large` takes some hundred.

    python benchmarks/bench_diagnosis.py [--rounds 600] [--threads 1] [--device cpu] [--out records/…/diagnosis.json]

There are two figures for each. `ratio` is how many times as long the steps take with the clock, from pairs. It includes
all costs, but also the noise of the machine, so its standard error is printed. `share` is the time of the calls alone,
in a loop without work, divided by the time of a step, as if every step were timed. It leaves out that a step evicts
their data from the caches. `--every-step` times every step for the first figure, too.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from suanli.compute.step_clock import CudaTimeline, DeviceClock, HostClock, StepClock
from suanli.core.types import Json
from suanli.machine.device import cores, detect, environment
from suanli.machine.timing import gain, spread, time_interleaved
from suanli.training.diagnose import Facts, Watch

# Batch, channels, side, width, steps of a turn. A turn is longer than the clock's interval, which goes on during the
# turns of the others, so the first step of each turn is timed, like one in several otherwise.
SIZES = {
    "small": (64, 1, 8, 24, 10),
    "large": (64, 3, 32, 48, 1),
}
CALLS = 4000


class Loop:
    def __init__(self, size: str, device: torch.device, clock: StepClock) -> None:
        batch, channels, side, width, self.turn = SIZES[size]
        torch.manual_seed(0)
        self.pool = torch.randint(256, (4 * batch, channels, side, side), dtype=torch.uint8, device=device)
        self.targets = torch.randint(10, (4 * batch,), device=device)
        self.batch, self.device, self.step = batch, device, 0
        self.model = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(width * (side // 2) ** 2, 10)),
        ).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        facts = Facts(device_type=device.type, batch_size=batch, cores=cores())
        self.clock = clock
        self.watch = Watch(self.clock, lambda: facts, 10**9)

    def plain(self) -> None:
        self._steps(StepClock(), None)

    def clocked(self) -> None:
        self._steps(self.clock, self.watch)

    def _steps(self, clock: StepClock, watch: Watch | None) -> None:
        for _ in range(self.turn):
            clock.begin()
            picked = torch.randint(len(self.pool), (self.batch,), device=self.device)
            inputs = self.pool[picked].float().div_(255)
            clock.mark("input")
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), self.targets[picked])
            clock.mark("forward")
            loss.backward()
            clock.mark("backward")
            self.optimizer.step()
            clock.mark("optimizer")
            if self.device.type == "cpu" or self.step % 20 == 0:
                loss.item()
            clock.end()
            self.step += 1
            if watch is not None:
                watch.after_step(self.step)


def clock_every_step(device: torch.device) -> StepClock:
    """Times every step."""
    return HostClock(every_s=0) if device.type == "cpu" else DeviceClock(CudaTimeline(device), every_s=0)


def measure_calls_s(device: torch.device) -> float:
    """Seconds that clock and watch take of a timed step, including its part of the evaluation of a window."""
    clock = clock_every_step(device)
    facts = Facts(device_type=device.type, batch_size=1, cores=1)
    watch = Watch(clock, lambda: facts, 10**9)
    started = time.perf_counter()
    for step in range(1, CALLS + 1):
        clock.begin()
        for name in ("input", "forward", "backward", "optimizer"):
            clock.mark(name)
        clock.end()
        watch.after_step(step)
    clock.window()
    return (time.perf_counter() - started) / CALLS


def measure(size: str, device: torch.device, clock: StepClock, rounds: int, budget_s: float) -> dict[str, Json]:
    loop = Loop(size, device, clock)
    settle = None if device.type == "cpu" else partial(torch.cuda.synchronize, device)
    sides = {"plain": loop.plain, "clocked": loop.clocked, "plain again": loop.plain}
    turns = time_interleaved(sides, rounds=rounds, warm_up=5, budget_s=budget_s, settle=settle)
    ratio, equals = gain(turns["clocked"], turns["plain"]), gain(turns["plain again"], turns["plain"])
    step_s = spread(turns["plain"]).median / loop.turn
    diagnosis = loop.watch.current
    return {
        "step_ms": step_s * 1e3,
        "ratio": ratio.ratio,
        "spread": ratio.spread,
        # Of a median: 1.25 standard deviations over the root of the count, one being 1.48 half interquartile ranges.
        "standard_error": 1.25 * 1.48 * ratio.spread / math.sqrt(ratio.rounds),
        "rounds": ratio.rounds,
        "steps_a_round": loop.turn,
        "ratio_of_equals": equals.ratio,
        "call_us": (call_us := measure_calls_s(device) * 1e6),
        "share": call_us / 1e6 / step_s,
        "diagnosis": None if diagnosis is None else diagnosis.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--budget-s", type=float, default=90.0, help="for each size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every-step", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = detect(args.device)
    where = torch.device(device.torch_name)
    sizes = {}
    for size in SIZES:
        clock = clock_every_step(where) if args.every_step else StepClock.of(where)
        sizes[size] = figures = measure(size, where, clock, args.rounds, args.budget_s)
        print(
            f"{size}: a step of {figures['step_ms']:.2f} ms takes {figures['ratio']:.4f} times as long with the clock, "
            f"{figures['ratio_of_equals']:.4f} times without it "
            f"(spread {figures['spread']:.4f}, standard error {figures['standard_error']:.4f}, "
            f"{figures['rounds']} rounds of {figures['steps_a_round']}); the calls take {figures['call_us']:.1f} us, "
            f"{figures['share']:.3%} of the step",
            flush=True,
        )
    result = {"what": "cost of the diagnosis", "sizes": sizes, "environment": environment(device)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
