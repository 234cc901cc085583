"""`suanli optimize` against what a careful person gets from each backend by hand, paired in one run, on a CPU.

Each net is trained for a moment on real photos, so that calibration and scores mean something, and optimised, once for
latency and once for throughput. By hand there are, written after each backend's documentation and without suanli's
engines: eager PyTorch (float32, channels_last), torch.compile with freezing (float32, bfloat16; one thread and all),
ONNX Runtime (float32, int8 QDQ) and OpenVINO (float32, bfloat16, int8 by NNCF). All take the same rows of pixels and
give probabilities; each is a process of its own; all are timed by turns. Against suanli counts the best of each
backend that loses at most half a point of validation accuracy.

At batch 1 it is one call at a time. At batch 64 it is 64 rows handed over together until all 64 answers are there;
OpenVINO by hand may take them in one call (hint LATENCY), or cut up over an AsyncInferQueue (hint THROUGHPUT) in
pieces of the best size; the better counts. Its shapes are fixed for each batch size, as torch.compile's are.

    python benchmarks/bench_engines.py ../shared/data --out records/…  [--nets resnet18,vit_tiny] [--runs FOLDER]
    python benchmarks/bench_engines.py ../shared/data --out records/…  --accuracy-control

`--accuracy-control` compares with `nncf.quantize_with_accuracy_control` instead: the seconds that it took, its score,
and the speed of what came out. What this doesn't do: GPUs, or backends' settings that their documentation calls
experimental.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import suanli
from suanli.core.compare import share_difference
from suanli.core.console import hide_progress
from suanli.core.run import Run
from suanli.core.types import Difference, Json
from suanli.engines.candidates import SearchResult
from suanli.engines.sandbox import Sandbox, SandboxError
from suanli.machine import device, timing
from suanli.models.model_folder import load_model

if TYPE_CHECKING:
    from torch import nn

    from record import Record

PHOTOS, SMALL = "imagenette5k.zip", "cifar10.zip"
CALIBRATION = 300  # rows
BATCHES = (1, 64)
PIECES = (1, 8, 32)  # of 64 rows, for the queue
LEAST = {1: 20, 64: 2}  # calls of a turn
BEHIND = 1.3  # times the best of the same backend: no further turns
TOLERANCE = 0.005  # of accuracy
SAME = 0.05  # mean total variation distance of the answers at batch 1 and 64
FLOOR, RESNET_FLOOR, MEAN_FLOOR = 0.97, 3.0, 2.0
FAMILIES = ("openvino", "onnxruntime", "torch.compile", "eager")
SERVE = "--serve"  # how this file is told to be the process of one way
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao")

Answer = Callable[[np.ndarray], np.ndarray]
Loaded = tuple[Answer, str]  # and a remark


@dataclass(frozen=True, kw_only=True)
class Net:
    model: str
    data: str = PHOTOS
    resnet: bool = False
    transformer: bool = False  # NNCF's documentation asks for it to be said


NETS = {
    "speednet": Net(model="speednet", data=SMALL),
    "resnet18": Net(model="resnet18", resnet=True),
    "resnet50": Net(model="resnet50", resnet=True),
    "mobilenet": Net(model="engine_nets:mobilenet"),
    "convnext": Net(model="engine_nets:convnext"),
    "vit_tiny": Net(model="vit_tiny", transformer=True),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of running a net, in a process of its own."""

    backend: str
    precision: str
    threads: int | None = None  # None: as the backend likes
    batches: tuple[int, ...] = BATCHES

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}" + (f", threads {self.threads}" if self.threads else "")

    @property
    def family(self) -> str:
        return self.backend.removesuffix(" queue")


def by_hand() -> list[Way]:
    """The one with eager PyTorch on all cores first: scores are held against its."""
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


# --- by hand: what runs in a process of its own. Only what a way needs is imported there. ---------


def module_of(case: Path) -> nn.Module:
    from engine_nets import FromRows

    saved = load_model(case / "model", trust_code=True)
    about = saved.card["preprocess"]["settings"]
    return FromRows(saved.module, about["mean"], about["std"]).eval()


def eager(case: Path, way: Way) -> Loaded:
    import torch

    assert way.threads is not None
    torch.set_num_threads(way.threads)
    model = module_of(case).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def answer(rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(rows)).numpy()

    return answer, ""


def compiled(case: Path, way: Way) -> Loaded:
    """Source: "torch.compile" in PyTorch's documentation; `freezing` in torch._inductor.config."""
    import torch
    import torch._inductor.config

    assert way.threads is not None
    torch.set_num_threads(way.threads)
    torch._inductor.config.freezing = True
    module = module_of(case).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = torch.compile(module, dynamic=False)

    def answer(rows: np.ndarray) -> np.ndarray:
        lower = torch.autocast("cpu", torch.bfloat16, enabled=way.precision == "bfloat16")
        with torch.inference_mode(), lower:
            return model(torch.from_numpy(rows)).numpy()

    return answer, ""


def onnxruntime(case: Path, way: Way) -> Loaded:
    """Source: "Graph Optimizations" in ONNX Runtime's documentation. Its threads are its own choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    file = "onnxruntime-int8.onnx" if way.precision == "int8" else "plain.onnx"
    session = ort.InferenceSession(case / file, options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"rows": rows})[0], ""


def openvino_package() -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would report this import to a server
    import openvino

    return openvino


def openvino_compiled(case: Path, way: Way, batch: int, hint: str) -> Any:
    """For one size of a batch. Sources: "Changing Input Shapes", "High-level Performance Hints" and "Precision Control"
    in OpenVINO's documentation."""
    core = openvino_package().Core()
    floating = {"float32": "f32", "bfloat16": "bf16"}
    file = "plain.onnx" if way.precision in floating else f"openvino-{way.precision}.xml"
    model = core.read_model(case / file)
    model.reshape([batch, *list(model.inputs[0].partial_shape)[1:]])
    settings = {"PERFORMANCE_HINT": hint}
    if way.precision in floating:
        settings["INFERENCE_PRECISION_HINT"] = floating[way.precision]
    return core.compile_model(model, "CPU", settings)


def openvino(case: Path, way: Way) -> Loaded:
    models = {batch: openvino_compiled(case, way, batch, "LATENCY") for batch in way.batches}
    return lambda rows: models[len(rows)](rows)[0], ""


def openvino_queue(case: Path, way: Way) -> Loaded:
    """Source: "OpenVINO Runtime Python API", AsyncInferQueue. The size of a piece is tried."""
    rows = np.load(case / "rows.npy", mmap_mode="r", allow_pickle=False)[: BATCHES[-1]].copy()
    tried = {piece: queue_of(openvino_compiled(case, way, piece, "THROUGHPUT"), piece) for piece in PIECES}
    took = timing.time_interleaved({piece: lambda work=work: work(rows) for piece, work in tried.items()}, rounds=5)
    best = min(took, key=lambda piece: statistics.median(took[piece]))
    return tried[best], f"pieces of {best}"


def queue_of(model: Any, piece: int) -> Answer:
    queue = openvino_package().AsyncInferQueue(model)
    classes = model.outputs[0].partial_shape[1].get_length()
    found = np.empty((0, classes), np.float32)

    def keep(request: Any, start: int) -> None:
        found[start : start + piece] = request.get_output_tensor(0).data

    queue.set_callback(keep)

    def answer(rows: np.ndarray) -> np.ndarray:
        nonlocal found
        found = np.empty((len(rows), classes), np.float32)
        for start in range(0, len(rows), piece):
            queue.start_async({0: rows[start : start + piece]}, start, share_inputs=True)
        queue.wait_all()
        return found

    return answer


def optimized(case: Path, way: Way) -> Loaded:
    """suanli's own: what `suanli.load` gives for a run that was optimised. `precision` is what was asked of it."""
    found = suanli.load(case / way.precision, trust_code=True)
    return found.probabilities, f"{found.engine} {found.precision}"


LOADERS = {
    "eager": eager,
    "torch.compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino queue": openvino_queue,
    "suanli": optimized,
}


# --- by hand: making files ------------------------------------------------------------------------


def export(case: Path) -> None:
    """Source: "Export a PyTorch model to ONNX" in PyTorch's documentation."""
    import torch

    model = module_of(case)
    rows = torch.from_numpy(np.load(case / "calibration.npy", allow_pickle=False)[:2])
    with torch.no_grad():
        torch.onnx.export(
            model,
            (rows,),
            case / "plain.onnx",
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            input_names=["rows"],
            output_names=["probabilities"],
            external_data=False,
        )


def quantize_for_onnxruntime(case: Path) -> None:
    """Source: "Quantize ONNX models" in ONNX Runtime's documentation: preprocessing, then static QDQ with weights per
    channel; unsigned activations are what x86 processors multiply with."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(np.load(case / "calibration.npy", allow_pickle=False))

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self._rows, None)
            return None if row is None else {"rows": row[None]}

    # Its symbolic inference of shapes, meant for transformers, fails on what PyTorch's exporter writes for a maximum.
    quant_pre_process(case / "plain.onnx", case / "prepared.onnx", skip_symbolic_shape=True)
    quantize_static(
        case / "prepared.onnx",
        case / "onnxruntime-int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def quantize_for_openvino(case: Path, transformer: bool, control: int | None = None) -> None:
    """Sources: "Basic Quantization Flow" and "Quantizing with Accuracy Control" in OpenVINO's documentation. With
    `control`, accuracy is controlled on so many validation rows, one at a time as there."""
    package = openvino_package()
    import nncf

    calibration = nncf.Dataset([row[None] for row in np.load(case / "calibration.npy", allow_pickle=False)])
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    model = package.Core().read_model(case / "plain.onnx")
    if control is None:
        found = nncf.quantize(model, calibration, subset_size=CALIBRATION, model_type=kind)
        package.save_model(found, case / "openvino-int8.xml", compress_to_fp16=False)
        return
    rows = np.load(case / "rows.npy", allow_pickle=False)[:control]
    targets = np.load(case / "targets.npy", allow_pickle=False)[:control]

    def accuracy(candidate: Any, items: Any) -> tuple[float, list[float]]:
        right = [float(candidate(row)[0].argmax() == target) for row, target in items]
        return statistics.mean(right), right

    examples = [(row[None], target) for row, target in zip(rows, targets, strict=True)]
    found = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=calibration,
        validation_dataset=nncf.Dataset(examples, lambda item: item[0]),
        validation_fn=accuracy,
        max_drop=TOLERANCE,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=CALIBRATION,
        model_type=kind,
    )
    package.save_model(found, case / "openvino-controlled.xml", compress_to_fp16=False)


# --- the process of one way -----------------------------------------------------------------------


class Served:
    """What a process does when it is asked."""

    def __init__(self) -> None:
        self._work: Answer | None = None

    def build(self, what: str, case: str, **more: Json) -> Json:
        makers = {"onnx": export, "onnxruntime": quantize_for_onnxruntime, "openvino": quantize_for_openvino}
        makers[what](Path(case), **more)  # type: ignore[operator]
        return {}

    def load(self, case: str, way: Json) -> Json:
        """Ready for each size of a batch, whatever is compiled at the first call included."""
        chosen = Way(**(way | {"batches": tuple(way["batches"])}))
        self._work, remark = LOADERS[chosen.backend](Path(case), chosen)
        self._rows = np.load(Path(case) / "rows.npy", mmap_mode="r", allow_pickle=False)
        for batch in chosen.batches:
            self._work(self._rows[:batch].copy())
        return {"remark": remark}

    def answer(self, count: int, batch: int, out: str) -> Json:
        assert self._work is not None
        parts = range(0, count, batch)
        found = [np.array(self._work(self._rows[start : start + batch].copy())) for start in parts]
        np.save(out, np.concatenate(found).astype(np.float32), allow_pickle=False)
        return {}

    def time(self, batch: int, for_s: float, least: int) -> Json:
        """Seconds of each call, after two that don't count, or one that is long."""
        assert self._work is not None
        rows = self._rows[:batch].copy()
        if timing.seconds(lambda: self._work(rows)) < for_s:
            self._work(rows)
        took: list[float] = []
        started = time.perf_counter()
        while len(took) < least or time.perf_counter() - started < for_s:
            took.append(timing.seconds(lambda: self._work(rows)))
        return {"seconds": took}


def serve() -> None:
    """Answers requests until its input ends, as `suanli.engines.sandbox` does."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like
    served = Served()
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        try:
            reply = getattr(served, request.pop("do"))(**request) | {"took_s": time.perf_counter() - started}
        except Exception as error:  # noqa: BLE001  # told to who asked
            reply = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


class Process(Sandbox):
    """A process with this file at its other end. Threads are set before it starts, as a person does it."""

    def __init__(self, threads: int | None = None) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=others | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            start_new_session=True,
        )
        self._pending = b""


# --- the benchmark --------------------------------------------------------------------------------


@dataclass
class Running:
    """A way that was loaded, what its answers came to, and the median of each of its turns."""

    way: Way
    process: Process
    remark: str
    accuracy: float = 0.0
    difference: Difference | None = None  # to eager float32
    drift: float = 0.0  # mean total variation distance to its answers
    apart: float = 0.0  # the same between batch 1 and 64
    turns: dict[int, list[float]] = field(default_factory=dict)  # by batch
    racing: dict[int, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.way.name}: {self.remark}" if self.remark else self.way.name

    @property
    def refused(self) -> str:
        """Why a careful person would not use it; empty: they would."""
        assert self.difference is not None
        if not self.apart <= SAME or not np.isfinite(self.drift):
            return "WRONG ANSWERS"
        return "refused" if self.difference.median < -TOLERANCE else ""

    def median_s(self, batch: int) -> float:
        return statistics.median(self.turns[batch])

    def to_json(self) -> dict[str, Json]:
        difference = None if self.difference is None else self.difference.to_json()
        medians = {str(batch): values for batch, values in self.turns.items()}
        about = {"accuracy": self.accuracy, "difference": difference, "drift": self.drift, "apart": self.apart}
        return about | {"remark": self.remark, "refused": self.refused, "medians_s": medians}


class Bench:
    def __init__(self, given: Namespace, record: Record, folder: Path) -> None:
        self.given, self.record, self.folder = given, record, folder
        self._raw = None if given.out is None else given.out / f"{record.name}.jsonl"
        if self._raw is not None:
            self._raw.write_text("")
        self.keep("start", environment=record.environment, engines=device.versions(PACKAGES))

    def keep(self, what: str, **values: Json) -> None:
        """A line of the raw record."""
        if self._raw is not None:
            with self._raw.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.clean({"what": what, **values})) + "\n")

    def clean(self, value: Json) -> Json:
        """Without the names of folders here."""
        text = json.dumps(value).replace(str(self.folder), "…")
        return json.loads(text if len(str(Path.home())) == 1 else text.replace(str(Path.home()), "~"))

    # --- before the race ---

    def trained(self, name: str) -> Path:
        """A run of the net: the user's, one that is kept, or a new one."""
        net, given = NETS[name], self.given
        if name == "speednet" and given.run is not None:
            return Path(given.run)
        run = (given.runs or self.folder) / name
        if not (run / "model" / "model.json").exists():
            started = time.perf_counter()
            with hide_progress():
                suanli.train(
                    given.data / net.data,
                    model=net.model,
                    epochs=given.train_epochs,
                    settings={} if net.data == SMALL else {"preprocess.size": given.size},
                    device="cpu",
                    out=run,
                    cache_dir=given.cache,
                )
            self.record.say(
                f"{name}: trained for {given.train_epochs:g} epochs in {time.perf_counter() - started:.0f} s"
            )
        return run

    def case(self, name: str, run: Path, goals: Sequence[str]) -> Path:
        """A folder with the model, rows, and for each goal a copy of the run to optimise."""
        from suanli.training.prepare import DataOptions, resolve  # imports torch

        case = self.folder / f"case-{name}"
        for goal in goals:
            shutil.copytree(run, case / goal, ignore=shutil.ignore_patterns("engines", "checkpoints"))
        shutil.copytree(case / goals[0] / "model", case / "model")
        options = DataOptions.of_run(Run.open(run), cache_dir=self.given.cache)
        with hide_progress():
            recipe = load_model(case / "model", trust_code=True).recipe
            splits = resolve(options, recipe=recipe, settings={}, announce=False)[1].splits
        random = np.random.default_rng(0)  # the same rows in the same order as suanli's own
        order, training = random.permutation(len(splits["val"])), random.permutation(len(splits["train"]))
        validation = splits["val"].index[order]
        if len(validation) < BATCHES[-1]:
            sys.exit(f"{name}: {len(validation)} validation examples are too few; {BATCHES[-1]} are needed.")
        np.save(case / "rows.npy", splits["val"].inputs[validation])
        np.save(case / "targets.npy", splits["val"].targets[order])
        np.save(
            case / "calibration.npy",
            splits["train"].inputs[splits["train"].index[np.sort(training[:CALIBRATION])]],
        )
        return case

    def optimize(self, name: str, case: Path, copy: str, **options: Json) -> tuple[SearchResult, float]:
        """What was found for a copy of the run, and the seconds of all of it."""
        started = time.perf_counter()
        with hide_progress():
            found = suanli.optimize(
                case / copy,
                time_budget=self.given.time_budget,
                cache_dir=self.given.cache,
                device="cpu",
                trust_code=True,
                **options,
            ).search
        took = time.perf_counter() - started
        tried = [{"name": c.name, "state": c.state, "reason": c.reason, "build_s": c.build_s} for c in found.candidates]
        self.keep("optimize", net=name, options=options, seconds=took, found=found.to_json())
        states = ", ".join(f"{c['name']} {c['state']}" for c in tried if c["state"] not in ("impossible", "accepted"))
        self.record.say(
            f"{name}: optimize ({copy}) chose {found.chosen.name} in {took:.0f} s{'; ' if states else ''}{states}"
        )
        return found, took

    def build(self, name: str, case: Path, what: str, **more: Json) -> float | None:
        """Seconds; None where it can't be made, which is said."""
        with Process() as process:
            try:
                took = process.ask(self.given.limit_s, "build", what=what, case=str(case), **more)["took_s"]
            except SandboxError as error:
                self.record.say(self.clean(f"{name}: by hand, {what} can't be made: {error}"))
                self.keep("build", net=name, built=what, lost=str(error))
                return None
        self.keep("build", net=name, built=what, seconds=took, **more)
        return float(took)

    def loaded(self, name: str, case: Path, way: Way, stack: ExitStack) -> Running | None:
        process = stack.enter_context(Process(way.threads))
        asked = {"backend": way.backend, "precision": way.precision, "threads": way.threads, "batches": way.batches}
        try:
            reply = process.ask(self.given.limit_s, "load", case=str(case), way=asked)
        except SandboxError as error:
            self.record.say(self.clean(f"{name}: {way.name} can't be run: {error}"))
            self.keep("load", net=name, way=way.name, lost=str(error))
            return None
        self.keep("load", net=name, way=way.name, seconds=reply["took_s"], remark=reply["remark"])
        turns: dict[int, list[float]] = {batch: [] for batch in way.batches}
        racing = dict.fromkeys(way.batches, True)
        return Running(way=way, process=process, remark=reply["remark"], turns=turns, racing=racing)

    def examine(self, name: str, case: Path, running: Sequence[Running]) -> None:
        """Scores of all on the same rows, held against the first's."""
        targets, out = np.load(case / "targets.npy"), case / "answers.npy"
        most = BATCHES[-1]
        count = min(self.given.examples, len(targets)) // most * most
        known: dict[tuple[str, str], tuple[Running, np.ndarray]] = {}

        def answers(one: Running, rows: int, batch: int) -> np.ndarray:
            one.process.ask(self.given.limit_s, "answer", count=rows, batch=batch, out=str(out))
            found: np.ndarray = np.load(out)
            return found

        for one in running:
            sibling, found = known.get((one.way.backend, one.way.precision), (one, None))
            few = answers(one, most, most)
            found = answers(one, count, most) if found is None else found
            reference = known[next(iter(known))][1] if known else found
            known.setdefault((one.way.backend, one.way.precision), (one, found))
            one.apart = distance(few, found[:most])
            if 1 in one.way.batches:
                one.apart = max(one.apart, distance(few, answers(one, most, 1)))
            if sibling is not one:  # the same with another number of threads
                one.accuracy, one.difference, one.drift = sibling.accuracy, sibling.difference, sibling.drift
            else:
                right = found.argmax(1) == targets[:count]
                one.accuracy, one.drift = float(right.mean()), distance(found, reference)
                one.difference = share_difference(reference.argmax(1) == targets[:count], right)
            self.keep("exam", net=name, way=one.way.name, examples=count, **one.to_json())

    # --- the race ---

    def race(self, name: str, running: Sequence[Running]) -> None:
        for number in range(self.given.rounds):
            for batch in BATCHES:
                for one in running if number % 2 == 0 else running[::-1]:
                    if one.racing.get(batch):
                        self.turn(name, one, batch, number)
            if number >= 1:
                drop(running)

    def turn(self, name: str, one: Running, batch: int, number: int) -> None:
        time.sleep(0.05)  # until the threads of the one before no longer wait for work by running in circles
        try:
            asked = {"batch": batch, "for_s": self.given.turn_s, "least": LEAST[batch]}
            seconds = one.process.ask(self.given.limit_s, "time", **asked)["seconds"]
        except SandboxError as error:
            one.racing, one.turns = {}, {}
            self.record.say(self.clean(f"{name}: {one.way.name} was lost while it was timed: {error}"))
            return
        p50 = statistics.median(seconds)
        one.turns[batch].append(p50)
        about = {"calls": len(seconds), "p50_s": p50, "p95_s": timing.percentile(seconds, 0.95), "low_s": min(seconds)}
        self.keep("turn", net=name, way=one.way.name, batch=batch, round=number, **about)

    # --- what came out ---

    def table(self, running: Sequence[Running]) -> None:
        titles = f"{'p50 ms at 1':>11} {'images/s at 64':>14} {'accuracy':>9} {'points':>7} {'drift':>7}"
        self.record.say(f"  {'way':36} {titles}")
        for one in running:
            assert one.difference is not None
            one_ms = f"{1e3 * one.median_s(1):.3f}" if one.turns.get(1) else ""
            rate = f"{BATCHES[-1] / one.median_s(BATCHES[-1]):,.0f}" if one.turns.get(BATCHES[-1]) else ""
            ended = [f"{len(turns)} rounds at {b}" for b, turns in one.turns.items() if len(turns) < self.given.rounds]
            self.record.say(
                f"  {one.name:36} {one_ms:>11} {rate:>14} {one.accuracy:9.2%} {100 * one.difference.median:+7.2f} "
                f"{one.drift:7.4f} {', '.join([*filter(None, [one.refused]), *ended])}".rstrip()
            )

    def compare(self, name: str) -> dict[str, Json]:
        """One net: all of it."""
        goals = self.given.goals
        case = self.case(name, self.trained(name), goals)
        found = {goal: self.optimize(name, case, goal, goal=goal) for goal in goals}
        builds = {what: self.build(name, case, what) for what in ("onnx", "onnxruntime")}
        builds["openvino"] = self.build(name, case, "openvino", transformer=NETS[name].transformer)
        running = self.measured(name, case, [*by_hand(), *(Way(backend="suanli", precision=goal) for goal in goals)])
        chosen = {goal: {"chosen": one.chosen.name, "seconds": seconds} for goal, (one, seconds) in found.items()}
        values = {"optimized": chosen, "build_s": builds, "ways": {one.way.name: one.to_json() for one in running}}
        return values | {"figures": self.figures(name, running)}

    def measured(self, name: str, case: Path, ways: Sequence[Way]) -> list[Running]:
        """Those that can be run, examined and timed; the first is what the others' scores are held against."""
        with ExitStack() as stack:
            running = [one for way in ways if (one := self.loaded(name, case, way, stack)) is not None]
            if not running or running[0].way != ways[0]:
                sys.exit(f"{name}: without {ways[0].name} nothing can be compared.")
            self.examine(name, case, running)
            self.race(name, running)
        self.table(running)
        shutil.rmtree(case)
        return running

    def figures(self, name: str, running: Sequence[Running]) -> dict[str, Json]:
        """For each size of a batch, how many times as fast suanli's engine is as the best of each backend."""
        record, found = self.record, {}
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
                found[f"{family} {batch}"] = record.compare(what, gained, floor=floor)
                if (loose := quickest(running, family, batch, scored=False)) is not None and loose is not best:
                    gained = timing.gain(loose.turns[batch], own.turns[batch])
                    what = f"{name}, batch {batch}: suanli / {loose.way.name}, which is {loose.refused}"
                    found[f"{family} {batch}, any score"] = record.compare(what, gained)
        for own in ours.values():
            self.score(name, own)
        record.say()
        return found

    def score(self, name: str, own: Running) -> None:
        """The accuracy that suanli's engine costs, against what it may."""
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
        """One net against NNCF's own control of accuracy."""
        case = self.case(name, self.trained(name), ["int8"])
        found, ours_s = self.optimize(name, case, "int8", engines="openvino")
        own = sum(c.build_s or 0.0 for c in found.candidates if (c.engine, c.precision) == ("openvino", "int8"))
        asked = {"transformer": NETS[name].transformer, "control": found.examples}
        exported, controlled = self.build(name, case, "onnx"), self.build(name, case, "openvino", **asked)
        values = {"optimize_s": ours_s, "int8_build_s": own, "export_s": exported, "nncf_s": controlled}
        if exported is None or controlled is None:
            return values
        self.record.say(
            f"{name}: NNCF with accuracy control took {controlled:.1f} s after {exported:.1f} s for the ONNX graph, "
            f"suanli optimize {ours_s:.1f} s for everything, of which building int8 {own:.1f} s; both examined "
            f"{found.examples} validation examples"
        )
        theirs_s = exported + controlled
        values["times"] = self.record.figure(f"{name}: seconds, NNCF / suanli optimize", theirs_s / ours_s, 0.0, 1)
        eager = Way(backend="eager", precision="float32", threads=device.cores())
        ways = [eager, Way(backend="openvino", precision="controlled"), Way(backend="suanli", precision="int8")]
        running = self.measured(name, case, ways)
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
    """The best by hand of a backend that is timed in every round; `scored`: and doesn't lose too much accuracy."""
    able = [one for one in running if one.way.family == family and one.racing.get(batch) and one.turns.get(batch)]
    able = [one for one in able if not (one.refused and scored)]
    return min(able, key=lambda one: one.median_s(batch), default=None)


def drop(running: Sequence[Running]) -> None:
    """What is far behind the best of its own backend gets no further turns."""
    for batch in BATCHES:
        for one in running:
            best = None if one.way.backend == "suanli" else quickest(running, one.way.family, batch)
            if best is not None and one.turns.get(batch) and one.median_s(batch) > BEHIND * best.median_s(batch):
                one.racing[batch] = False


def summary(record: Record, found: Mapping[str, Json]) -> None:
    """One line a net and size of a batch, then the means over all nets."""
    record.say(f"{'times as fast as the best of':24} {' '.join(f'{family:>13}' for family in FAMILIES)}")
    for name, one in found.items():
        for batch in BATCHES:
            values = [one["figures"].get(f"{family} {batch}") for family in FAMILIES]
            shown = (f"{value['value']:7.2f} ±{value['spread']:4.2f}" if value else "" for value in values)
            record.say(f"{f'{name}, batch {batch}':24} {' '.join(f'{text:>13}' for text in shown)}")
    record.say()
    for batch in BATCHES:
        for family in FAMILIES:
            key = f"{family} {batch}"
            if values := [one["figures"][key]["value"] for one in found.values() if key in one["figures"]]:
                floor = MEAN_FLOOR if family == "eager" else FLOOR
                what = f"geometric mean of {len(values)} nets, batch {batch}: suanli / best of {family}"
                spread = timing.spread(values).half_iqr  # between nets
                record.figure(what, statistics.geometric_mean(values), spread, len(values), floor=floor)


def main() -> None:
    from record import Record, arguments, start  # imports torch, which most processes of this file run without

    parser = arguments(__doc__)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-s", type=float, default=0.5, help="of timing, each way in each round")
    parser.add_argument("--size", type=int, default=128, help="of photos, px")
    parser.add_argument("--train-epochs", type=float, default=1.0)
    parser.add_argument("--run", type=Path, help="a run of speednet on cifar10 that is there already")
    parser.add_argument("--runs", type=Path, help="a folder where trained runs are kept, and taken from the next time")
    parser.add_argument("--time-budget", default="3m", help="of each optimize")
    parser.add_argument("--goals", type=lambda text: text.split(","), default="latency,throughput")
    parser.add_argument("--examples", type=int, default=2000, help="of validation, at most, for the scores told here")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="for one thing that a process is asked")
    parser.add_argument("--accuracy-control", action="store_true", help="against NNCF's own control instead")
    given = parser.parse_args()
    nets = given.nets.split(",")
    if unknown := set(nets) - set(NETS):
        parser.error(f"unknown nets {', '.join(sorted(unknown))}; known: {', '.join(NETS)}")
    if given.device != "cpu":
        parser.error("what is written by hand here is for the CPU")
    if not set(given.goals) <= {"latency", "throughput"}:
        parser.error("goals are latency and throughput")
    kind = "accuracy_control" if given.accuracy_control else "engines"
    record = Record("_".join([kind, *(nets if len(nets) < len(NETS) else [])]), given.out, start(given))
    record.say(", ".join(f"{name} {version}" for name, version in device.versions(PACKAGES).items()) + "\n")
    found: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, record, Path(folder).resolve())
        for name in nets:
            found[name] = bench.control(name) if given.accuracy_control else bench.compare(name)
            record.write(bench.clean({"nets": found}))
        if not given.accuracy_control:
            summary(record, found)
        record.close(bench.clean({"engines": device.versions(PACKAGES), "nets": found}))


if __name__ == "__main__":
    serve() if sys.argv[1:] == [SERVE] else main()
