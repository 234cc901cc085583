"""Trains a detector of LibreYOLO (MIT) from random weights for so many epochs, and answers for a folder of images: the
other side of `bench_detection.py`, as a process of its own that needs nothing of suanli.

    python detect_libreyolo.py data.yaml --images test/ --out answers.npz --family yolox --size s --epochs 20

Settings are LibreYOLO's defaults but for those that `--set` gives, and: images are cached, training doesn't stop early,
and the warm-up and the last epochs without mosaic are at most a tenth and 15 % of a short training. It keeps the
averaged weights that did best on its validation images, as LibreYOLO itself does. With `--calibrate` it only measures.

Beside a torch without CUDA torchvision's compiled operations can't be loaded. So its `nms` is replaced by one in
NumPy here, which is used in validation and for the answers; training doesn't need it.

Prints a JSON object a line: the seconds since `--started` (of `time.time`, when the process was requested) of each
epoch, and of the end of training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCORE, OVERLAP, MOST = 0.001, 0.65, 300  # as in LibreYOLO's own validation
CALIBRATION_EPOCHS = 3
VALIDATE_EVERY = 10  # epochs, its default
OVERTIME = 1.1  # times its time, after which a training is cut


def prepare_torchvision() -> torch.library.Library:
    """Makes torchvision importable beside a torch without CUDA. What it returns must stay alive."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.ops

    torchvision.ops.nms = torchvision.ops.boxes.nms = nms
    torchvision.ops.batched_nms = torchvision.ops.boxes.batched_nms = batched_nms
    return library


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Positions of the boxes that stay, the best first."""
    left, top, right, bottom = boxes.detach().double().numpy().T
    areas = (right - left) * (bottom - top)
    order = np.argsort(-scores.detach().numpy(), kind="stable")
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        width = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest])
        height = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest])
        shared = width.clip(0) * height.clip(0)
        order = rest[shared <= iou_threshold * (areas[best] + areas[rest] - shared)]
    return torch.tensor(kept, dtype=torch.int64)


def batched_nms(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Boxes of different classes don't suppress each other."""
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64)
    apart = idxs.double() * (boxes.double().max() - boxes.double().min() + 1)
    return nms(boxes.double() + apart[:, None], scores, iou_threshold)


class OutOfTime(Exception):
    pass


class Watch:
    """Says how training goes, and ends it where the next epoch would take it too far beyond its time."""

    def __init__(self, started: float, limit_s: float) -> None:
        self.started, self.limit_s = started, limit_s

    def on_train_start(self, event: Any) -> None:
        self.say(ready=True, settings={name: repr(value) for name, value in event.config.items()})

    def on_train_epoch_end(self, event: Any) -> None:
        self.say(
            epoch=event.epoch,
            epoch_s=event.epoch_seconds,
            loss=event.train_loss,
            validated=event.validated,
            map_50=event.val_metrics.get("metrics/mAP50"),
            map=event.val_metrics.get("metrics/mAP50-95"),
        )
        after = time.time() - self.started + event.epoch_seconds
        if event.epoch < event.total_epochs and after > OVERTIME * self.limit_s:
            raise OutOfTime

    def say(self, **values: Any) -> None:
        print(json.dumps({"seconds": time.time() - self.started} | values), flush=True)


def build(family: str, size: str) -> Any:
    import libreyolo

    kinds = {"yolox": libreyolo.LibreYOLOX, "yolo9": libreyolo.LibreYOLO9}
    return kinds[family](None, size=size, device="cpu")


def train(model: Any, args: argparse.Namespace, watch: Watch) -> None:
    epochs = CALIBRATION_EPOCHS if args.calibrate else args.epochs
    usual = model.TRAIN_CONFIG()
    settings = {
        "epochs": epochs,
        "imgsz": args.side,
        "seed": args.seed,
        "warmup_epochs": min(usual.warmup_epochs, max(1, round(0.1 * epochs))),
        "no_aug_epochs": 0 if args.calibrate else min(usual.no_aug_epochs, max(1, round(0.15 * epochs))),
        "eval_interval": epochs if args.calibrate else VALIDATE_EVERY,
        "patience": 0,
        "save_period": 0,
        "device": "cpu",
        "project": str(args.work),
        "name": "run",
        "exist_ok": True,
        "callbacks": watch,
    }
    try:
        model.train(data=str(args.data), **settings | json.loads(args.set))
    except OutOfTime:
        weights = args.work / "run" / "weights"
        best = weights / "best.pt"
        model._load_weights(str(best if best.exists() else weights / "last.pt"))
        watch.say(cut=True)
    model.model.eval()


def answer(model: Any, images: list[Path], side: int) -> dict[str, np.ndarray]:
    """Boxes in px of the image, scores and classes of all images, one after the other, and how many each has."""
    found = [model(str(path), conf=SCORE, iou=OVERLAP, max_det=MOST, imgsz=side).boxes for path in images]
    return {
        "count": np.array([len(one.conf) for one in found]),
        "xyxy": np.concatenate([np.asarray(one.xyxy, np.float32).reshape(-1, 4) for one in found]),
        "conf": np.concatenate([np.asarray(one.conf, np.float32).ravel() for one in found]),
        "cls": np.concatenate([np.asarray(one.cls, np.int32).ravel() for one in found]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data.yaml")
    parser.add_argument("--images", type=Path, required=True, help="the folder of test images")
    parser.add_argument("--out", type=Path, required=True, help="gets the answers for them, sorted by name")
    parser.add_argument("--work", type=Path, required=True, help="a folder for its own files")
    parser.add_argument("--family", choices=("yolox", "yolo9"), default="yolox")
    parser.add_argument("--size", default="s")
    parser.add_argument("--side", type=int, default=416, help="px")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", default="{}", help="more settings, as JSON")
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--calibrate", action="store_true")
    args = parser.parse_args()
    library = prepare_torchvision()
    watch = Watch(args.started, args.limit_s)
    model = build(args.family, args.size)
    parameters = sum(one.numel() for one in model.model.parameters())
    train(model, args, watch)
    watch.say(trained=True, parameters=parameters, threads=torch.get_num_threads())
    if not args.calibrate:
        np.savez(args.out, **answer(model, sorted(args.images.iterdir()), args.side))
    del library


if __name__ == "__main__":
    main()
