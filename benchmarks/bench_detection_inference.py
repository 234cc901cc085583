"""One image from the bytes of a JPEG to boxes: suanli's detectors compared with small ones by hand in OpenVINO.

The peers are NanoDet-Plus-m (RangiLyu/nanodet, 1.2 M parameters) and YOLOX-Nano (Megvii-BaseDetection/YOLOX, 0.9 M),
both Apache-2.0. Nothing of them is part of suanli: give folders with their sources.

    git clone --depth 1 https://github.com/RangiLyu/nanodet
    git clone --depth 1 https://github.com/Megvii-BaseDetection/YOLOX
    python benchmarks/bench_detection_inference.py bccd_voc.zip --nanodet nanodet --yolox YOLOX --out records/…

By hand means: OpenCV decodes and scales, OpenVINO (latency hint) casts, normalises and computes, NumPy makes boxes of
the 100 likeliest cells alone, OpenCV suppresses. All sides get the same images, shape and number of threads. suanli is
`Predictor.predict(bytes)`, with checks, EXIF and the answer as plain values.

What is compared is time alone, and weights are random, so each side's threshold is set to what 14 answers (and the
peers' 100 candidates) need, as images of blood cells have them. Which of suanli's engines may be used, because their
score holds, `suanli optimize` decides on a trained run; that the peers' int8 keeps theirs isn't known here. Needs
opencv-python-headless. Sides take turns in each round, and ratios are those of a round.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import MagicMock

import numpy as np
import torch

from record import Record, arguments, start
from suanli.core.types import EngineInputs, Json, Placement, Recipe
from suanli.data.preprocess.image import ImagePreprocess
from suanli.engines.backends import openvino as engine
from suanli.engines.inference_module import write_onnx
from suanli.engines.predictor import Predictor
from suanli.machine import timing
from suanli.machine.device import detect, versions
from suanli.models import build
from suanli.models.model_folder import build_task, load_model, save_model

CLASSES = ("Platelets", "RBC", "WBC")
PRECISIONS = ("float32", "bfloat16", "int8")
SHOWN, CANDIDATES = 14, 100
OURS = ("detnet_n", "detnet_s")
# Packages that the peers import for training and drawing alone.
UNUSED = (
    "loguru pycocotools pytorch_lightning lightning_fabric termcolor omegaconf imagesize thop torchvision matplotlib"
)
Side: TypeAlias = Callable[[bytes], int]  # from a file to how many boxes were found
BGR = ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395))  # mean and spread of NanoDet's channels


# --- suanli's sides -------------------------------------------------------------------------


def our_sides(name: str, images: Sequence[bytes], shape: tuple[int, int], threads: int, work: Path) -> dict[str, Side]:
    recipe = Recipe(name="boxes", task="detection", model=name)
    preprocess = ImagePreprocess(height=shape[0], width=shape[1], resize="pad", mean=(0.5,) * 3, std=(0.25,) * 3)
    task = build_task("detection", CLASSES, {})
    torch.manual_seed(0)
    network = build.build(recipe, preprocess, task).eval()
    folder = work / name
    save_model(folder, network, recipe=recipe, preprocess=preprocess, task=task, data={})
    write_onnx(load_model(folder), folder / "model.onnx")
    rows = np.stack([preprocess.encode(image).arrays["image"] for image in images])
    inputs = EngineInputs(model=folder, onnx=folder / "model.onnx", calibration=[{"image": row[None]} for row in rows])
    placement = Placement(device=detect("cpu"), threads=threads)
    sides = {}
    for precision in (one for one in PRECISIONS if engine.ENGINE.why_not(placement.device, one) is None):
        place = folder / precision
        place.mkdir()
        engine.build(inputs, precision, place, placement)
        loaded = engine.load(place, precision, placement)
        scores = loaded.answer({"image": rows})["det_scores"]
        fitted = replace(task, threshold=float(np.median(scores[:, SHOWN - 1])))  # type: ignore[call-arg]
        predictor = Predictor(
            engine="openvino", precision=precision, threads=threads, preprocess=preprocess, task=fitted, loaded=loaded
        )
        sides[f"suanli {name} {precision}"] = lambda data, p=predictor: int(p.predict(data, top=100)[0].values["count"])
    return sides


# --- the peers, by hand ---------------------------------------------------------------------


class _Placeholders(MetaPathFinder, Loader):
    """Stands for packages that aren't installed, and all modules in them."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname.partition(".")[0] not in UNUSED:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> Any:  # noqa: ARG002
        return MagicMock()

    def exec_module(self, module: object) -> None:
        pass


def make_network(name: str, source: Path) -> torch.nn.Module:
    """With placeholders for packages that aren't needed, while it is built alone: torch looks for some of them, too."""
    sys.meta_path.insert(0, _Placeholders())
    sys.path.insert(0, str(source))
    try:
        torch.manual_seed(0)
        return PEERS[name][0](source).eval()
    finally:
        del sys.meta_path[0], sys.path[0]
        for module in [one for one in sys.modules if isinstance(sys.modules[one], MagicMock)]:
            del sys.modules[module]


def make_nanodet(source: Path) -> torch.nn.Module:
    import yaml

    class Config(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            if name not in self:
                raise AttributeError(name)
            return self[name]

    def wrap(value: Any) -> Any:
        return Config({k: wrap(v) for k, v in value.items()}) if isinstance(value, dict) else value

    arch = importlib.import_module("nanodet.model.arch")
    config = wrap(yaml.safe_load((source / "config/nanodet-plus-m_416.yml").read_text()))["model"]["arch"]
    for part in ("head", "aux_head"):
        config[part]["num_classes"] = len(CLASSES)
    config["backbone"]["pretrain"] = False
    model: torch.nn.Module = arch.build_model(Config({"arch": config}))
    del model.aux_fpn, model.aux_head  # of training
    model.head.forward = model.head._forward_onnx  # type: ignore[union-attr, method-assign]  # as its exporter does
    return model


def make_yolox(source: Path) -> torch.nn.Module:
    experiment = importlib.import_module("yolox.exp.build").get_exp_by_file(str(source / "exps/default/yolox_nano.py"))
    experiment.num_classes = len(CLASSES)
    model: torch.nn.Module = experiment.get_model()
    model.head.decode_in_inference = False  # type: ignore[union-attr]
    return model


def centres(shape: tuple[int, int], strides: Sequence[int], offset: float) -> np.ndarray:
    """(A, 3): x and y in px and the stride of all cells."""
    levels = []
    for stride in strides:
        height, width = (math.ceil(side / stride) for side in shape)
        y, x = np.divmod(np.arange(height * width), width)
        levels.append(np.stack([(x + offset) * stride, (y + offset) * stride, np.full(len(x), stride)], 1))
    return np.concatenate(levels).astype(np.float32)


def decode_nanodet(output: np.ndarray, cells: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Left, top, width, height of these rows: the expected distance of each side over 8 bins."""
    bins = np.exp(output[which, len(CLASSES) :].reshape(-1, 4, 8))
    reach = bins @ np.arange(8, dtype=np.float32) / bins.sum(2) * cells[which, 2:]
    corner = cells[which, :2] - reach[:, :2]
    return np.concatenate([corner, reach[:, :2] + reach[:, 2:]], 1)


def decode_yolox(output: np.ndarray, cells: np.ndarray, which: np.ndarray) -> np.ndarray:
    stride = cells[which, 2:]
    centre, size = output[which, :2] * stride + cells[which, :2], np.exp(output[which, 2:4]) * stride
    return np.concatenate([centre - size / 2, size], 1)


def score_nanodet(output: np.ndarray) -> np.ndarray:
    return output[:, : len(CLASSES)]


def score_yolox(output: np.ndarray) -> np.ndarray:
    return output[:, 5:] * output[:, 4:5]


PEERS = {
    "NanoDet-Plus-m": (make_nanodet, (8, 16, 32, 64), 0.0, score_nanodet, decode_nanodet, BGR),
    "YOLOX-Nano": (make_yolox, (8, 16, 32), 0.0, score_yolox, decode_yolox, None),
}


def letterbox(data: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    ratio = min(shape[0] / image.shape[0], shape[1] / image.shape[1])
    size = (round(image.shape[1] * ratio), round(image.shape[0] * ratio))
    canvas = np.full((1, *shape, 3), 114, np.uint8)
    canvas[0, : size[1], : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return canvas, ratio


def peer_sides(
    name: str, source: Path, images: Sequence[bytes], shape: tuple[int, int], threads: int, work: Path
) -> dict[str, Side]:
    _, strides, offset, score, decode, normalizing = PEERS[name]
    openvino = engine.import_openvino()
    path = work / f"{name}.onnx"
    torch.onnx.export(make_network(name, source), (torch.zeros(1, 3, *shape),), str(path), dynamo=True, verbose=False)
    core = openvino.Core()
    graph = openvino.preprocess.PrePostProcessor(core.read_model(path))
    graph.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    graph.input().model().set_layout(openvino.Layout("NCHW"))
    graph.input().preprocess().convert_element_type(openvino.Type.f32)
    if normalizing is not None:
        graph.input().preprocess().mean(list(normalizing[0])).scale(list(normalizing[1]))
    model = graph.build()
    cells = centres(shape, strides, offset)
    boxes = [letterbox(data, shape)[0] for data in images]
    hints = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
    sides: dict[str, Side] = {}
    for precision in (one for one in PRECISIONS if engine.ENGINE.why_not(detect("cpu"), one) is None):
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hints[precision],
        }
        own = quantize(model.clone(), boxes) if precision == "int8" else model
        compiled = core.compile_model(own, "CPU", settings)
        ranked = np.sort(score(compiled(boxes[0])[0][0]).max(1))
        # So many candidates, of which the likeliest so many are shown
        least = float(ranked[-CANDIDATES])
        sides[f"{name} {precision}"] = by_hand(compiled, shape, cells, score, decode, least)
    return sides


def by_hand(compiled: Any, shape: tuple[int, int], cells: np.ndarray, score: Any, decode: Any, least: float) -> Side:
    import cv2

    request = compiled.create_infer_request()

    def side(data: bytes) -> int:
        image, ratio = letterbox(data, shape)
        output = request.infer([image], share_inputs=True, share_outputs=True)[0][0]
        scores = score(output)
        labels = scores.argmax(1)
        best = scores[np.arange(len(labels)), labels]
        which = np.flatnonzero(best >= least)
        which = which[np.argsort(-best[which])[:CANDIDATES]]
        found = decode(output, cells, which) / ratio
        kept = cv2.dnn.NMSBoxesBatched(found, best[which], labels[which].astype(np.int32), 0.0, 0.6)
        chosen = which[np.asarray(kept, np.int64)][:SHOWN]
        corners = found[np.asarray(kept, np.int64)][:SHOWN]
        answer = [
            {"label": CLASSES[labels[i]], "score": float(best[i]), "box": box}
            for i, box in zip(chosen, corners.tolist(), strict=True)
        ]
        return len(answer)

    return side


def quantize(model: Any, boxes: Sequence[np.ndarray]) -> Any:
    import nncf

    return nncf.quantize(model, nncf.Dataset(list(boxes)), subset_size=len(boxes))


# --- timing ---------------------------------------------------------------------------------


def read_images(data: Path, count: int) -> list[bytes]:
    with zipfile.ZipFile(data) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        return [archive.read(name) for name in names[:count]]


def race(sides: dict[str, Side], images: Sequence[bytes], rounds: int) -> dict[str, list[float]]:
    """Seconds an image of each side in each round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            took = []
            for image in images:
                before = time.perf_counter()
                sides[name](image)
                took.append(time.perf_counter() - before)
            if number:
                times[name].append(statistics.median(took))
    return times


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nanodet", type=Path, required=True, help="the folder with NanoDet's sources")
    parser.add_argument("--yolox", type=Path, required=True, help="the folder with YOLOX's sources")
    parser.add_argument("--size", default="320x416", help="height and width in px, of all sides")
    parser.add_argument("--images", type=int, default=6, help="of one turn")
    parser.add_argument("--rounds", type=int, default=21)
    args: argparse.Namespace = parser.parse_args()
    shape = tuple(map(int, args.size.split("x")))
    record = Record(f"detection_inference_{args.size}", args.out, start(args))
    record.say(", ".join(f"{n} {v}" for n, v in versions(("openvino", "nncf", "opencv-python-headless")).items()))
    images = read_images(args.data, args.images)
    record.say(f"{len(images)} JPEG files, {args.size} px, {args.threads} threads, batch 1, from bytes to boxes\n")
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in zip(PEERS, (args.nanodet, args.yolox), strict=True):
            sides |= peer_sides(name, source.resolve(), images, shape, args.threads, Path(folder))
        for name in OURS:
            sides |= our_sides(name, images, shape, args.threads, Path(folder))
        found = {name: statistics.mean(side(image) for image in images) for name, side in sides.items()}
        times = race(sides, images, args.rounds)
    figures: dict[str, Json] = {}
    for name, took in sorted(times.items(), key=lambda one: statistics.median(one[1])):
        spread = timing.spread(took)
        figures[name] = {"seconds": took, "boxes": found[name]}
        record.say(f"{name:26} {1e3 * spread.median:6.2f} ms ± {1e3 * spread.half_iqr:.2f}, {found[name]:.0f} boxes")
    record.say()
    summarize(record, times)
    record.close({"sides": figures, "size": args.size, "threads": args.threads})


def summarize(record: Record, times: dict[str, list[float]]) -> None:
    """Each of suanli's sides against the fastest peer, of the same precision and of any."""
    for name, took in times.items():
        if not name.startswith("suanli"):
            continue
        for limit in (name.rsplit(" ", 1)[1], ""):
            peers = {p: t for p, t in times.items() if not p.startswith("suanli") and p.endswith(limit)}
            best = min(peers, key=lambda peer: statistics.median(peers[peer]))
            record.compare(f"{name} / {best}{'' if limit else ', the fastest'}", timing.gain(peers[best], took))


if __name__ == "__main__":
    main()
