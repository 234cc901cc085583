"""`suanli serve` compared with a bare server and with peers, and under too much load, by `h2load` on the same machine.

- `wire`: bodies of 150,528 bytes (UINT8 1x224x224x3), 32 clients, and an engine that looks at ten pixels. The sides are
  uvicorn, which sends the body back; suanli over HTTP and gRPC; MLServer over gRPC, with and without processes for
  models, of which the faster counts; LitServe with its fast queue. Servers alternate (A B C, then C B A) for several
  rounds. The others are stopped meanwhile (SIGSTOP), since some of them poll.
- `overload`: `MODEL` gets three times the load that 32 clients reach with it, once with the defaults and once with
  `--p99-ms`, twice the 99th percentile at a tenth of that load. Measured are how long accepted requests take, how soon
  the others are refused, memory, and the time to recover. Times count from when a request is sent.

    python benchmarks/bench_serve.py wire --out records/… [--peers /path/to/python] [--rounds 5] [--seconds 4]
    python benchmarks/bench_serve.py overload MODEL --out records/… [--seconds 60]

`--peers` is a Python with mlserver and litserve; a peer that isn't installed is left out, with a message. `MODEL` is a
run or a model folder; in README, an untrained resnet18 at 224 px in OpenVINO int8. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import struct
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

from h2load import GRPC, Answers, Target, closed, offered
from record import Record
from serve_peers import CLASSES, SHAPE
from servers import MemoryWatch, free_port, has, peer, send, served
from suanli.core.registry import load as load_plugin
from suanli.core.types import Json
from suanli.engines import store
from suanli.machine import device
from suanli.machine.timing import spread

CLIENTS = 32
ECHO_FLOOR, MLSERVER_FLOOR, LITSERVE_FLOOR = 0.5, 10.0, 2.0
OVERLOAD, TAIL, REFUSED_MS, GROWN, RECOVERED_S = 3.0, 2.0, 10.0, 1.1, 2.0


# --- wire ---------------------------------------------------------------------------------------


@dataclass
class Side:
    """A running server, and the results of its turns."""

    name: str
    pid: int
    target: Target
    answers: list[Answers] = field(default_factory=list)

    def turn(self, seconds: float) -> None:
        """Runs the server for this turn only."""
        send(self.pid, signal.SIGCONT)
        try:
            self.answers.append(closed(self.target, CLIENTS, seconds))
        finally:
            send(self.pid, signal.SIGSTOP)
        if self.answers[-1].failed or not self.answers[-1].accepted_ms:
            sys.exit(f"{self.name}: {self.answers[-1].to_json()}")

    @property
    def per_s(self) -> list[float]:
        return [one.per_s for one in self.answers]


def trivial(folder: Path) -> Path:
    """A folder of engines with one for ONNX Runtime that looks at the first ten bytes of a row."""
    from onnx import parser, save

    graph = f"""<ir_version: 10, opset_import: ["": 18]>
        trivial (uint8[batch, {SHAPE[1]}, {SHAPE[2]}, {SHAPE[3]}] image) => (float[batch, {CLASSES}] probabilities)
        <int64[2] flat = {{0, -1}}, int64[1] first = {{0}}, int64[1] last = {{{CLASSES}}}, int64[1] axis = {{1}}> {{
            bytes = Reshape(image, flat)
            few = Slice(bytes, first, last, axis)
            numbers = Cast<to = 1>(few)
            probabilities = Softmax<axis = 1>(numbers)
        }}"""
    built, engines = folder / "built", folder / "trivial"
    for place in (built, engines):
        place.mkdir()
    save(parser.parse_model(graph), built / "model.onnx")
    name, engine = "onnxruntime", load_plugin("engines", "onnxruntime")
    about = {"packages": engine.packages, "portable": engine.portable}
    kept = store.StoredEngine(engine=name, precision="float32", folder=built, threads=1, **about)
    preprocess = load_plugin("preprocess", "image")(height=SHAPE[1], width=SHAPE[2], channels=SHAPE[3])
    model = {"weights": "none", "classes": [f"class {n}" for n in range(CLASSES)], "preprocess": preprocess.to_json()}
    store.save(engines, [kept], device=device.detect("cpu"), about=model)
    return engines


def infer(port: int) -> Target:
    """A request with one input for the only model of a server, as bytes after the JSON."""
    url = f"http://127.0.0.1:{port}/v2"
    with urlopen(Request(f"{url}/repository/index", b"{}")) as answer:
        path = f"{url}/models/{json.load(answer)[0]['name']}"
    with urlopen(path) as answer:
        (about,) = json.load(answer)["inputs"]
    shape = [1, *about["shape"][1:]]
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8).tobytes()
    tensor = {"name": about["name"], "datatype": about["datatype"], "shape": shape}
    tensor["parameters"] = {"binary_data_size": len(pixels)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return Target(url=f"{path}/infer", body=head + pixels, headers=headers)


def infer_grpc(port: int, pixels: bytes) -> Target:
    """The same over gRPC, after a call that checks that the server answers."""
    import grpc
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name="trivial", raw_input_contents=[pixels])
    request.inputs.add(name="image", datatype="UINT8", shape=SHAPE)
    message, method = request.SerializeToString(), "/inference.GRPCInferenceService/ModelInfer"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        channel.unary_unary(method)(message, timeout=30, wait_for_ready=True)
    framed = struct.pack(">?I", False, len(message)) + message
    return Target(url=f"http://127.0.0.1:{port}{method}", body=framed, headers=GRPC)


def start(args: argparse.Namespace, work: Path, stack: ExitStack) -> list[Side]:
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8).tobytes()
    port, pid = stack.enter_context(peer(sys.executable, "serve_peers.py echo", "/"))
    sides = [Side("uvicorn echo", pid, Target(url=f"http://127.0.0.1:{port}/", body=pixels))]
    grpc_port = free_port()
    port, pid = stack.enter_context(served(trivial(work), "--grpc-port", str(grpc_port)))
    sides += [Side("suanli HTTP", pid, infer(port)), Side("suanli gRPC", pid, infer_grpc(grpc_port, pixels))]
    if has(args.peers, "mlserver"):
        for workers in ("1", "0"):
            ready = "/v2/models/trivial/ready"
            started = peer(args.peers, "serve_peers.py mlserver", ready, MLSERVER_PARALLEL_WORKERS=workers)
            port, pid = stack.enter_context(started)
            sides.append(Side(f"MLServer gRPC, {workers} more processes", pid, infer_grpc(port + 1, pixels)))
    if has(args.peers, "litserve"):
        port, pid = stack.enter_context(peer(args.peers, "serve_litserve.py", "/health"))
        head = b'--edge\r\nContent-Disposition: form-data; name="request"; filename="pixels"\r\n\r\n'
        target = Target(
            url=f"http://127.0.0.1:{port}/predict",
            body=head + pixels + b"\r\n--edge--\r\n",
            headers={"content-type": "multipart/form-data; boundary=edge"},
        )
        sides.append(Side("LitServe", pid, target))
    return sides


def wire(args: argparse.Namespace, record: Record, work: Path) -> Json:
    with ExitStack() as stack:
        sides = start(args, work, stack)
        try:
            for side in sides:
                send(side.pid, signal.SIGSTOP)
            for number in range(args.rounds):
                for side in sides if number % 2 == 0 else sides[::-1]:
                    side.turn(args.seconds or 4.0)
        finally:  # a stopped process can't end
            for side in sides:
                send(side.pid, signal.SIGCONT)
    for side in sides:
        per_s, p99 = spread(side.per_s), statistics.median(one.p99_ms for one in side.answers)
        record.say(f"{side.name:32} {per_s.median:8,.0f} ± {per_s.half_iqr:5,.0f} requests/s, p99 {p99:6.1f} ms")
    ours = next(side for side in sides if side.name == "suanli HTTP")
    for name, floor in (("uvicorn", ECHO_FLOOR), ("MLServer", MLSERVER_FLOOR), ("LitServe", LITSERVE_FLOOR)):
        rivals = [side for side in sides if side.name.startswith(name)]
        if not rivals:
            record.say(f"{name} is left out: --peers has none.")
            continue
        best = max(rivals, key=lambda side: statistics.median(side.per_s))
        ratio = spread([a / b for a, b in zip(ours.per_s, best.per_s, strict=True)])
        record.figure(
            f"suanli HTTP / {best.name}, requests per second", ratio.median, ratio.half_iqr, ratio.count, floor=floor
        )
    return {side.name: [one.to_json() for one in side.answers] for side in sides}


# --- overload -----------------------------------------------------------------------------------


def overload(args: argparse.Namespace, record: Record) -> Json:
    seconds = args.seconds or 60.0
    with served(args.model) as (port, _):  # with a target, clients that don't wait are refused, and get less
        capacity_per_s = closed(infer(port), CLIENTS, min(5.0, seconds)).per_s
        unloaded = offered(infer(port), 0.1 * capacity_per_s, seconds / 2)
    if not unloaded.accepted_ms:
        sys.exit(f"At a tenth of {capacity_per_s:.1f}/s, no request was answered. Give more --seconds.")
    target_ms = TAIL * unloaded.p99_ms
    record.say(f"{CLIENTS} clients get {capacity_per_s:,.1f}/s; at a tenth of that, p99 is {unloaded.p99_ms:.2f} ms")
    ways = {"defaults": [], "with --p99-ms": ["--p99-ms", f"{target_ms:.3f}"]}
    result: Json = {"capacity_per_s": capacity_per_s, "unloaded": unloaded.to_json()}
    for name, options in ways.items():
        with served(args.model, *options) as (port, pid):
            result[name] = overloaded(record, name, infer(port), pid, capacity_per_s, target_ms, seconds)
    return result


def overloaded(
    record: Record, way: str, target: Target, pid: int, capacity_per_s: float, target_ms: float, seconds: float
) -> Json:
    offered(target, 0.1 * capacity_per_s, 1.0)
    with MemoryWatch(pid) as memory:
        under = offered(target, OVERLOAD * capacity_per_s, seconds)
    over, recovered_s = time.monotonic(), math.inf
    while recovered_s == math.inf and time.monotonic() < over + 10:
        since_s = time.monotonic() - over
        after = offered(target, max(8.0, 0.1 * capacity_per_s), 0.5)
        if not after.refused_ms and after.p99_ms <= target_ms:
            recovered_s = since_s
    values = memory.values[len(memory.values) // 10 : -1]  # from when all connections have their buffers
    tenth = max(1, len(values) // 10)
    grown = statistics.median(values[-tenth:]) / statistics.median(values[:tenth])
    count = len(under.accepted_ms) + len(under.refused_ms) + under.failed
    offered_per_s, refused_per_s = count / under.seconds, len(under.refused_ms) / under.seconds
    record.say(
        f"{way}: offered {offered_per_s:,.0f}/s, answered {under.per_s:,.1f}/s (p99 {under.p99_ms:.1f} ms), refused "
        f"{refused_per_s:,.1f}/s (p99 {under.refused_p99_ms or 0:.1f} ms), failed {under.failed}; memory × "
        f"{grown:.2f}; as before after {recovered_s:.1f} s"
    )
    allowed = [("1.1 / memory at the end over that at the beginning", GROWN / grown, 1.0)]
    allowed += [("2 s / time to recover", RECOVERED_S / max(recovered_s, 0.01), 1.0)]
    allowed += [("2 x unloaded p99 / accepted p99", target_ms / under.p99_ms, None if way == "defaults" else 1.0)]
    if under.refused_p99_ms:
        allowed += [("10 ms / refusal p99", REFUSED_MS / under.refused_p99_ms, 1.0)]
    for what, value, floor in allowed:
        record.figure(f"{way}: {what}", value, 0.0, count, floor=floor)
    return under.to_json() | {"memory_bytes": memory.values, "recovered_s": recovered_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("wire", "overload"))
    parser.add_argument("model", nargs="?", type=Path, help="for overload: a run, or a model folder")
    parser.add_argument("--out", type=Path, help="the folder that gets the text and the figures")
    parser.add_argument("--peers", type=Path, help="a Python with mlserver and litserve")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="of a turn (4), or of the overload (60)")
    args = parser.parse_args()
    if (args.part == "overload") != (args.model is not None):
        parser.error("overload needs a model, and only overload")
    record = Record(f"serve_{args.part}", args.out, device.detect("cpu"))
    if args.part == "wire":
        with tempfile.TemporaryDirectory() as work:
            result = wire(args, record, Path(work))
    else:
        result = overload(args, record)
    record.close({args.part: result})


if __name__ == "__main__":
    main()
