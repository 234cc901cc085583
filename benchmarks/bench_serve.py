"""`suanli serve` against what the wire allows, against its own engine, against peers, and under too much load.

All on one machine, with one client: the generator of `suanli bench --serve` in a process of its own, and for gRPC one
that sends ready messages. Servers take turns (A B C, then C B A), several rounds; one whose turn it isn't is stopped
(SIGSTOP), since some of them poll. CPU time is that of all of a server's processes.

- `wire`: a body of 150,528 bytes (UINT8 1x224x224x3), 32 clients, and an engine that looks at ten pixels: uvicorn
  that sends the body back; suanli over HTTP and gRPC; MLServer over gRPC (binary) and REST (JSON, since its REST fails
  on binary tensors), with processes for models and without, of which the faster counts; LitServe with its fast queue.
- `engine`: ResNet-18 at 224 px, untrained, as `suanli optimize` makes it fastest: served throughput against the best
  of the same engine in a process without a server, and the latency of one client against that of a call.
- `overload`: the same model offered three times its capacity, open-loop, for a minute: how long accepted requests
  take, how soon the others are refused, memory, and how soon it is as before. Once with the defaults and once with
  `--p99-ms`, twice the unloaded 99th percentile.

    python benchmarks/bench_serve.py --out records/… --peers /path/to/python  [--parts wire,engine] [--rounds 5]

`--peers` is a Python with mlserver and litserve; a peer that isn't there is left out, and that is said.
Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpc_load import GrpcGenerator, infer_message
from record import Record
from serve_peers import CLASSES, SHAPE
from servers import MemoryWatch, cpu_seconds, free_port, has, peer, send
from suanli import engine_store, hardware, measure
from suanli.hosts import Host, describe
from suanli.loads import Figures, Load, Stretch, Target, figures
from suanli.offered_load import Generator
from suanli.plugins import load as load_plugin
from suanli.types import Json, Placement
from suanli.verbs._bench_serve import started
from suanli.verbs._payloads import payload

CLIENTS = 32
WARM_UP_S = 0.5
ECHO_FLOOR, MLSERVER_FLOOR, LITSERVE_FLOOR, TAIL_FLOOR = 0.5, 10.0, 2.0, 2.0
ENGINE_FLOOR, ADDED_MS = 0.95, 1.0
OVERLOAD, OVERLOAD_S, TAIL, REFUSED_MS, GROWN, RECOVERED_S = 3.0, 60.0, 2.0, 10.0, 1.1, 2.0
BATCHES = (1, 2, 4, 8, 16, 32, 64)


# --- sides and their turns ----------------------------------------------------------------------


@dataclass
class Side:
    """A server that is up, and who asks it."""

    name: str
    pid: int
    generator: Generator

    def turn(self, load: Load) -> tuple[Stretch, float]:
        """What came, and the CPU seconds of the server. It runs during its turn only."""
        send(self.pid, signal.SIGCONT)
        try:
            self.generator.offer(Load(rate_per_s=None, connections=load.connections, seconds=WARM_UP_S))
            before = cpu_seconds(self.pid)
            found = self.generator.offer(load)
            return found, cpu_seconds(self.pid) - before
        finally:
            send(self.pid, signal.SIGSTOP)


@dataclass
class Turns:
    """All turns of one side."""

    stretches: list[Stretch]
    cpu_s: list[float]

    @property
    def per_s(self) -> list[float]:
        return [one.answered_per_s for one in self.stretches]

    @property
    def per_cpu_s(self) -> list[float]:
        return [len(one.accepted_us) / max(cpu, 1e-3) for one, cpu in zip(self.stretches, self.cpu_s, strict=True)]

    @property
    def p99_ms(self) -> list[float]:
        return [measure.percentile(one.accepted_us, 0.99) / 1000 for one in self.stretches]

    def to_json(self) -> Json:
        known = figures(self.stretches)
        return {"per_s": self.per_s, "per_cpu_s": self.per_cpu_s, "p99_ms": self.p99_ms, **known.to_json()}


def by_turns(sides: Sequence[Side], load: Load, rounds: int) -> dict[str, Turns]:
    found = {side.name: Turns([], []) for side in sides}
    try:
        for side in sides:
            send(side.pid, signal.SIGSTOP)
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                stretch, cpu = side.turn(load)
                if not stretch.accepted_us:
                    sys.exit(f"{side.name} answers nothing: {stretch.errors} {stretch.said}")
                found[side.name].stretches.append(stretch)
                found[side.name].cpu_s.append(cpu)
    finally:  # what is stopped can't end
        for side in sides:
            send(side.pid, signal.SIGCONT)
    return found


def tell(record: Record, found: Mapping[str, Turns]) -> None:
    record.say(f"{'':30} {'requests/s':>18} {'p50 ms':>8} {'p99 ms':>8} {'longest':>8} {'per server CPU s':>17}")
    for name, turns in found.items():
        per_s, known = measure.spread(turns.per_s), figures(turns.stretches)
        record.say(
            f"{name:30} {per_s.median:10,.0f} ± {per_s.half_iqr:5,.0f} {known.p50_ms or 0:8.2f} "
            f"{known.p99_ms or 0:8.2f} {known.max_ms or 0:8.1f} {statistics.median(turns.per_cpu_s):17,.0f}"
            + (f"  errors {known.errors}" if known.errors else "")
            + ("  (the client was the limit)" if known.limited else "")
        )


def ratio(record: Record, what: str, ours: Sequence[float], theirs: Sequence[float], floor: float | None) -> Json:
    """Ours / theirs, round by round."""
    found = measure.spread([a / b for a, b in zip(ours, theirs, strict=True)])
    return record.figure(what, found.median, found.half_iqr, found.count, floor=floor)


# --- wire ---------------------------------------------------------------------------------------


def trivial(folder: Path) -> Path:
    """A folder of engines with one for ONNX Runtime that looks at the first ten bytes of a row."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    size = int(np.prod(SHAPE[1:]))
    constants = {"flat": [0, size], "from": [0], "to": [CLASSES], "axis": [1]}
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["rows", "flat"], ["bytes"]),
            helper.make_node("Slice", ["bytes", "from", "to", "axis"], ["few"]),
            helper.make_node("Cast", ["few"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["numbers", "scale"], ["scaled"]),
            helper.make_node("Softmax", ["scaled"], ["probabilities"], axis=1),
        ],
        "trivial",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, ["batch", *SHAPE[1:]])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", CLASSES])],
        [
            *(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()),
            numpy_helper.from_array(np.float32(1 / 255), "scale"),
        ],
    )
    made, engines = folder / "made", folder / "trivial"
    for place in (made, engines):
        place.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, made / "model.onnx")
    engine = load_plugin("engines", "onnxruntime")
    engine_store.save(
        engines,
        [
            engine_store.Kept(
                engine="onnxruntime",
                precision="float32",
                folder=made,
                threads=1,
                packages=engine.packages,
                portable=engine.portable,
            )
        ],
        device=hardware.detect("cpu"),
        about={
            "weights": "none",
            "classes": [f"class {n}" for n in range(CLASSES)],
            "preprocess": load_plugin("preprocess", "image")(
                height=SHAPE[1], width=SHAPE[2], channels=SHAPE[3]
            ).to_json(),
        },
    )
    return engines


def http_side(stack: ExitStack, name: str, pid: int, target: Target) -> Side:
    return Side(name, pid, stack.enter_context(Generator(target)))


def multipart(pixels: bytes) -> tuple[bytes, dict[str, str]]:
    edge = "edge-of-a-part"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="request"; filename="pixels"\r\n'
    body = head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + pixels + f"\r\n--{edge}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={edge}"}


def mlserver_json(pixels: bytes) -> bytes:
    data = np.frombuffer(pixels, np.uint8).tolist()
    tensor = {"name": "image", "shape": SHAPE, "datatype": "UINT8", "data": data}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def wire(given: Namespace, record: Record, work: Path) -> Json:
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8).tobytes()
    load = Load(rate_per_s=None, connections=CLIENTS, seconds=given.seconds)
    with ExitStack() as stack:
        sides = []
        port, pid = stack.enter_context(peer(sys.executable, "serve_peers.py echo", "/"))
        target = Target.of(f"http://127.0.0.1:{port}/", [pixels], {"Content-Type": "application/octet-stream"})
        sides.append(http_side(stack, "uvicorn echo", pid, target))
        grpc_port = free_port()
        url, pid = stack.enter_context(started(trivial(work), "--grpc-port", str(grpc_port)))
        asked = payload(url, {}, rows=1, files=[])
        sides.append(http_side(stack, "suanli HTTP", pid, Target.of(asked.url, asked.bodies, asked.headers)))
        message = infer_message(asked.model, "image", pixels, SHAPE)
        sides.append(Side("suanli gRPC", pid, stack.enter_context(GrpcGenerator(f"127.0.0.1:{grpc_port}", message))))
        if has(given.peers, "mlserver"):
            for workers in ("1", "0"):
                port, pid = stack.enter_context(
                    peer(
                        given.peers,
                        "serve_peers.py mlserver",
                        "/v2/models/trivial/ready",
                        MLSERVER_PARALLEL_WORKERS=workers,
                    )
                )
                told = "" if workers == "1" else " in one process"
                message = infer_message("trivial", "image", pixels, SHAPE)
                generator = stack.enter_context(GrpcGenerator(f"127.0.0.1:{port + 1}", message))
                sides.append(Side(f"MLServer gRPC{told}", pid, generator))
                place = f"http://127.0.0.1:{port}/v2/models/trivial/infer"
                target = Target.of(place, [mlserver_json(pixels)], {"Content-Type": "application/json"})
                sides.append(http_side(stack, f"MLServer JSON{told}", pid, target))
        else:
            record.say("MLServer is left out: --peers has no mlserver.")
        if has(given.peers, "litserve"):
            port, pid = stack.enter_context(peer(given.peers, "serve_litserve.py", "/health"))
            body, headers = multipart(pixels)
            sides.append(
                http_side(stack, "LitServe", pid, Target.of(f"http://127.0.0.1:{port}/predict", [body], headers))
            )
        else:
            record.say("LitServe is left out: --peers has no litserve.")
        found = by_turns(sides, load, given.rounds)
    tell(record, found)
    ours = found["suanli HTTP"]
    ratio(record, "suanli / uvicorn echo, requests per second", ours.per_s, found["uvicorn echo"].per_s, ECHO_FLOOR)
    ratio(record, "suanli / uvicorn echo, per CPU second", ours.per_cpu_s, found["uvicorn echo"].per_cpu_s, None)
    for peer_name, floor in (("MLServer gRPC", MLSERVER_FLOOR), ("MLServer JSON", None), ("LitServe", LITSERVE_FLOOR)):
        rivals = [turns for name, turns in found.items() if name.startswith(peer_name)]
        if not rivals:
            continue
        best = max(rivals, key=lambda turns: statistics.median(turns.per_s))
        ratio(record, f"suanli / {peer_name}, requests per second", ours.per_s, best.per_s, floor)
        ratio(record, f"suanli / {peer_name}, per CPU second", ours.per_cpu_s, best.per_cpu_s, None)
        ratio(record, f"{peer_name} / suanli, p99", best.p99_ms, ours.p99_ms, floor and TAIL_FLOOR)
    return {name: turns.to_json() for name, turns in found.items()}


# --- engine -------------------------------------------------------------------------------------


def resnet(given: Namespace, work: Path) -> Path:
    """A model folder with ResNet-18 at 224 px and random weights, optimised for throughput with made-up pictures: what
    its answers are doesn't matter here, so any loss is allowed."""
    if given.model is not None:
        return Path(given.model)
    from PIL import Image

    from suanli import building
    from suanli.saved import save_model
    from suanli.types import Recipe

    random = np.random.default_rng(0)
    classes = tuple(f"class{n}" for n in range(10))
    for name in classes:
        (work / "data" / name).mkdir(parents=True)
        for number in range(30):
            coarse = random.integers(0, 256, (14, 14, 3), np.uint8)
            Image.fromarray(coarse).resize((224, 224)).save(work / "data" / name / f"{number}.png")
    preprocess = load_plugin("preprocess", "image")(height=224, width=224, mean=(0.5,) * 3, std=(0.25,) * 3)
    recipe = Recipe(name="bench", model="resnet18")
    module = building.build(recipe, preprocess, len(classes))
    save_model(work / "resnet18", module, recipe=recipe, preprocess=preprocess, classes=classes, data={})
    options = ["--for", "throughput", "--data", str(work / "data"), "--tolerance", "0.99", "--engines", given.engines]
    command = [sys.executable, "-m", "suanli", "optimize", str(work / "resnet18"), *options, "--json"]
    done = subprocess.run([*command, "--cache-dir", str(work / "cache")], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return work / "resnet18"


class InProcess:
    """The engine that a model is served with, in a process without a server."""

    def __init__(self, model: Path, work: Path) -> None:
        folder = model if (model / engine_store.INDEX).exists() else model / engine_store.FOLDER
        index = engine_store.read(folder)
        if index is None:
            sys.exit(f"{model} has no engines: suanli optimize")
        name = index["chosen"]
        entry = index["engines"][name]
        self.name = f"{entry['engine']} {entry['precision']}, {entry['threads']} threads"
        self.threads = entry["threads"]
        self.rows = work / "rows.npy"
        preprocess = load_plugin("preprocess", index["preprocess"]["kind"])(**index["preprocess"]["settings"])
        random = np.random.default_rng(0)
        np.save(self.rows, random.integers(0, 256, (max(BATCHES), *preprocess.row_shape), np.uint8))
        placement = describe(Placement(device=hardware.detect("cpu"), threads=self.threads))
        self.host = Host()
        asked = {"engine": entry["engine"], "precision": entry["precision"], "folder": str(folder / name)}
        self.host.ask(120, "load", **asked, placement=placement)

    def seconds(self, batch: int, for_s: float) -> list[float]:
        """Of each call with a batch."""
        asked = {"threads": self.threads, "rows": str(self.rows), "batch": batch, "for_s": for_s}
        found: list[float] = self.host.ask(300, "time", **asked, warm_up=3, least=3)["seconds"]
        return found

    def per_s(self, batch: int, for_s: float) -> float:
        taken = self.seconds(batch, for_s)
        return batch * len(taken) / sum(taken)


def engine(given: Namespace, record: Record, model: Path, work: Path) -> Json:
    with ExitStack() as stack:
        alone = InProcess(model, work)
        stack.enter_context(alone.host)
        best = max(BATCHES, key=lambda batch: alone.per_s(batch, 1.0))
        record.say(f"\n{alone.name}; alone it is best in batches of {best}")
        url, pid = stack.enter_context(started(model))
        asked = payload(url, {}, rows=1, files=[])
        generator = stack.enter_context(Generator(Target.of(asked.url, asked.bodies, asked.headers)))
        many = Load(rate_per_s=None, connections=CLIENTS, seconds=given.seconds)
        single = Load(rate_per_s=None, connections=1, seconds=given.seconds / 2)
        for load in (many, single):
            generator.offer(load)
        alone_per_s, alone_ms, served, lone = [], [], Turns([], []), Turns([], [])
        for number in range(given.rounds):
            for ours in (False, True) if number % 2 == 0 else (True, False):
                if ours:
                    for turns, load in ((served, many), (lone, single)):
                        before = cpu_seconds(pid)
                        turns.stretches.append(generator.offer(load))
                        turns.cpu_s.append(cpu_seconds(pid) - before)
                else:
                    alone_per_s.append(alone.per_s(best, given.seconds))
                    alone_ms.append(1000 * statistics.median(alone.seconds(1, given.seconds / 2)))
    record.say(f"alone {measure.spread(alone_per_s).median:,.1f} inputs/s in batches of {best}")
    tell(record, {"served, 32 clients": served, "served, one client": lone})
    kept = ratio(record, "served / alone, inputs per second", served.per_s, alone_per_s, ENGINE_FLOOR)
    single_ms = [measure.percentile(one.accepted_us, 0.5) / 1000 for one in lone.stretches]
    added = measure.spread([a - b for a, b in zip(single_ms, alone_ms, strict=True)])
    record.say(f"one client {statistics.median(single_ms):.3f} ms, a call {statistics.median(alone_ms):.3f} ms")
    allowed = record.figure(
        f"{ADDED_MS} ms / what serving adds for one client ({added.median:.3f} ms)",
        ADDED_MS / max(added.median, 1e-3),
        added.half_iqr,
        added.count,
        floor=1.0,
    )
    return {
        "engine": alone.name,
        "batch": best,
        "alone_per_s": alone_per_s,
        "served": served.to_json(),
        "alone_ms": alone_ms,
        "single_ms": single_ms,
        "served_over_alone": kept,
        "added": allowed,
    }


# --- overload -----------------------------------------------------------------------------------


def overload(given: Namespace, record: Record, model: Path, work: Path) -> Json:  # noqa: ARG001
    record.say("\noverload, with the defaults")
    first = overloaded(given, record, model, None)
    target_ms = TAIL * first["unloaded"]["p99_ms"]
    record.say(f"\noverload, with --p99-ms {target_ms:.1f}")
    at_most = first["capacity"]["answered_per_s"]
    return {"defaults": first, "with_target": overloaded(given, record, model, target_ms, at_most)}


def overloaded(
    given: Namespace, record: Record, model: Path, p99_ms: float | None, at_most: float = 0.0
) -> dict[str, Json]:
    """`at_most`: requests a second that the server answers without a target; with one, it turns away clients that
    don't wait between requests, so that they don't show its capacity."""
    options = [] if p99_ms is None else ["--p99-ms", f"{p99_ms:.3f}"]
    way = "defaults" if p99_ms is None else "--p99-ms"
    with ExitStack() as stack:
        url, pid = stack.enter_context(started(model, *options))
        asked = payload(url, {}, rows=1, files=[])
        generator = stack.enter_context(Generator(Target.of(asked.url, asked.bodies, asked.headers)))
        closed = Load(rate_per_s=None, connections=CLIENTS, seconds=5.0)
        generator.offer(closed)
        capacity = figures([generator.offer(closed)])
        reaches = max(capacity.answered_per_s, at_most)
        few_per_s = 0.1 * reaches
        unloaded = figures([generator.offer(Load(rate_per_s=few_per_s, connections=256, seconds=given.overload_s / 2))])
        rate = OVERLOAD * reaches
        began = time.monotonic()
        with MemoryWatch(pid) as memory:
            under = figures([generator.offer(Load(rate_per_s=rate, connections=256, seconds=given.overload_s, seed=1))])
        over = began + given.overload_s
        after: list[tuple[float, Figures]] = []
        while len(after) < 8 or time.monotonic() < over + 6:
            since = time.monotonic() - over
            few = Load(rate_per_s=max(few_per_s, 8.0), connections=256, seconds=0.5, seed=len(after))
            after.append((since, figures([generator.offer(few)])))
    assert unloaded.p99_ms is not None
    assert under.p99_ms is not None
    well = [since for since, one in after if not one.refused_per_s and (one.p99_ms or 1e9) <= TAIL * unloaded.p99_ms]
    recovered_s = max(0.0, well[0]) if well else float("inf")
    under_load = memory.values[len(memory.values) // 10 : -1]  # its connections have their buffers by then
    tenth = max(1, len(under_load) // 10)
    grown = statistics.median(under_load[-tenth:]) / statistics.median(under_load[:tenth])
    record.say(
        f"capacity {reaches:,.1f}/s; unloaded p99 {unloaded.p99_ms:.2f} ms at {few_per_s:,.1f}/s; "
        f"offered {under.offered_per_s:,.0f}/s: answered {under.answered_per_s:,.1f}/s, p50 {under.p50_ms:.1f}, p99 "
        f"{under.p99_ms:.1f} ms; refused {under.refused_per_s:,.1f}/s, p99 {under.refused_p99_ms or 0:.2f}, longest "
        f"{under.refused_max_ms or 0:.1f} ms (from sending: {under.refused_sent_p99_ms or 0:.2f}, "
        f"{under.refused_sent_max_ms or 0:.1f}); errors {under.errors}; {under.waited:,} waited for a connection; "
        f"generator late by {under.lag_ms_p99:.2f} ms (p99); memory before, in the first and last tenth, "
        f"after: {memory.values[0] / 1e6:.0f}, {under_load[0] / 1e6:.0f}, {under_load[-1] / 1e6:.0f}, "
        f"{memory.values[-1] / 1e6:.0f} MB; as before after {recovered_s:.1f} s"
    )
    count = under.requests
    kept = TAIL * unloaded.p99_ms / under.p99_ms
    record.figure(f"{way}: 2 x unloaded p99 / accepted p99", kept, 0.0, count, floor=None if p99_ms is None else 1.0)
    for what, ms in (("p99", under.refused_p99_ms), ("longest", under.refused_max_ms)):
        value = REFUSED_MS / ms if ms else 0.0
        record.figure(
            f"{way}: 10 ms / time to a refusal, {what}", value, 0.0, count, floor=1.0 if what == "p99" else None
        )
    record.figure(
        f"{way}: 1.1 / memory in the last tenth of the time to that in the first",
        GROWN / grown,
        0.0,
        len(memory.values),
        floor=1.0,
    )
    record.figure(f"{way}: 2 s / time to recover", RECOVERED_S / max(recovered_s, 0.01), 0.0, 1, floor=1.0)
    return {
        "capacity": capacity.to_json(),
        "unloaded": unloaded.to_json(),
        "under": under.to_json(),
        "after": [{"since_s": since, **one.to_json()} for since, one in after],
        "memory_bytes": memory.values,
        "recovered_s": recovered_s if well else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder that gets the text and the figures")
    parser.add_argument("--peers", type=Path, help="a Python with mlserver and litserve")
    parser.add_argument("--parts", default="wire,engine,overload")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("--overload-s", type=float, default=OVERLOAD_S)
    parser.add_argument("--engines", default="openvino", help="that optimize tries for ResNet-18")
    parser.add_argument("--model", type=Path, help="a model folder, or one of engines, instead of ResNet-18")
    given = parser.parse_args()
    record = Record("serve", given.out, hardware.detect("cpu"))
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        found: dict[str, Json] = {}
        chosen = given.parts.split(",")
        if "wire" in chosen:
            found["wire"] = wire(given, record, work)
            record.write({"found": found})
        if {"engine", "overload"} & set(chosen):
            model = resnet(given, work)
            for name, part in (("engine", engine), ("overload", overload)):
                if name in chosen:
                    found[name] = part(given, record, model, work)
                    record.write({"found": found})
    record.close({"found": found})


if __name__ == "__main__":
    main()
