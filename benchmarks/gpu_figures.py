"""Figures that need a GPU: how close `speednet` comes to the peak of the card, and whether input keeps up.

    python benchmarks/gpu_figures.py DATA --what prepare|speednet|resnet50 --device cuda --out records/…

`speednet`: the operations of a training step divided by its time, as a share of the measured peak of the card in half
precision, with and without whole-step graphs and data on the device. It runs twice: as shipped, and with the widths and
batch size for which the network was designed on GPUs.
`resnet50`: images per second at 224 px with rows from suanli's cache (through the memory map, and from the
device's memory), compared with a loop written by hand that computes on random tensors on the device, without any input.

Clocks are read after the device has finished; sides alternate; figures are medians. Pictures that DATA lacks are
generated: `prepare` writes them there and decodes all. `--tiny` makes everything so small that it runs anywhere.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from handwritten import MEANS, Handwritten
from record import Record, arguments, start
from sides import Side, alternate, half_precision_flops, plan_of
from suanli.compute.flops import flops
from suanli.compute.infer import network_inputs
from suanli.compute.plan import plain_plan
from suanli.core.console import hide_progress
from suanli.core.errors import SuanliError
from suanli.core.types import Device, Json, Recipe
from suanli.data.cache import PreparedData
from suanli.machine import timing
from suanli.training.loop import Loop
from suanli.training.prepare import DataOptions, resolve
from suanli.training.setup import Setup
from subjects import ENDLESS

SHARE = 0.35  # of the ceiling in half precision
OF_SYNTHETIC = 0.90  # of the images per second without input
USUAL_ON_GPU = (*MEANS, "cudnn_benchmark")
WAYS = {
    "usual": USUAL_ON_GPU,
    "graphs, resident": (*USUAL_ON_GPU, "graphs", "resident"),
}
SMALL, PHOTOS = ("cifar10.zip", "made-up-small.npz"), ("imagenette5k.zip", "made-up-photos.zip")
NETWORKS: dict[str, dict[str, Json]] = {
    "as shipped": {},
    "64-256-256": {"model_args.widths": [64, 256, 256], "batch_size": 2000},
}


def main() -> None:
    works = {"prepare": prepare, "speednet": speednet, "resnet50": resnet50}
    parser = arguments(__doc__)
    parser.add_argument("--what", choices=works, required=True)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: sizes that say nothing about speed")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = start(args)
    works[args.what](args, device, Record(args.what, args.out, device))


# --- data -----------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, device: Device, record: Record) -> None:  # noqa: ARG001
    """Generates missing data and fills the cache, so that it isn't timed later."""
    args.data.mkdir(parents=True, exist_ok=True)
    if not (args.data / SMALL[0]).exists():
        make_small(args.data / SMALL[1], 600 if args.tiny else 30_000)
    if not (args.data / PHOTOS[0]).exists():
        make_photos(args.data / PHOTOS[1], 60 if args.tiny else 1_280)
    for name, (_, prepared) in {"small": small(args, {}), "photos": photos(args)}.items():
        shape = "x".join(map(str, prepared.preprocess.input_shape))
        record.say(f"{name}: {prepared.name}, {len(prepared.splits['train']):,} for training, {shape}")


def small(args: argparse.Namespace, settings: dict[str, Json]) -> tuple[Recipe, PreparedData]:
    return _resolve(args, SMALL, "small_images", settings)


def photos(args: argparse.Namespace) -> tuple[Recipe, PreparedData]:
    pixels, batch = (64, 8) if args.tiny else (224, 256)
    settings = {"model": "resnet50", "preprocess.size": pixels, "batch_size": batch}
    return _resolve(args, PHOTOS, "photos", settings)


def _resolve(
    args: argparse.Namespace, names: tuple[str, str], recipe: str, settings: dict[str, Json]
) -> tuple[Recipe, PreparedData]:
    path = next(p for p in (args.data / name for name in names) if p.exists())
    options = DataOptions.of(path, data_dir=None, cache_dir=args.cache)
    with hide_progress():
        return resolve(options, recipe=recipe, settings={"epochs": ENDLESS, **settings}, announce=False)


def make_small(path: Path, count: int) -> None:
    """Noisy 32 px colour images of ten shapes, as .npz."""
    random = np.random.default_rng(0)
    shapes = _smooth(random, 10, 32)
    labels = random.integers(0, 10, count)
    images = np.clip(shapes[labels] + random.normal(0, 40, (count, 32, 32, 3)).astype(np.float32), 0, 255)
    images, test = images.astype(np.uint8), count // 10
    np.savez(path, x_train=images[test:], y_train=labels[test:], x_test=images[:test], y_test=labels[:test])


def make_photos(path: Path, count: int) -> None:
    """Class folders of JPEG files of 256 by 224 px that cost about as much to decode as photos."""
    random = np.random.default_rng(1)
    shapes = _smooth(random, 10, 256)[:, :, 16:240]

    def encoded(number: int) -> tuple[str, bytes]:
        noise = np.random.default_rng(number).normal(0, 8, shapes.shape[1:]).astype(np.float32)
        stream = io.BytesIO()
        Image.fromarray(np.clip(shapes[number % 10] + noise, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        return f"class{number % 10}/{number:05d}.jpg", stream.getvalue()

    with ThreadPoolExecutor() as pool, zipfile.ZipFile(path, "w") as archive:
        for name, content in pool.map(encoded, range(count)):
            archive.writestr(name, content)


def _smooth(random: np.random.Generator, count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) float32 in 0 to 255."""
    coarse = torch.from_numpy(random.random((count, 3, 7, 7), dtype=np.float32))
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()


# --- speednet -------------------------------------------------------------------------------


def speednet(args: argparse.Namespace, device: Device, record: Record) -> None:
    ceiling, precision = half_precision_flops(device, args.cache)
    record.say(f"ceiling, measured: {ceiling / 1e12:,.3g} TFLOP/s in {precision}")
    result: dict[str, Json] = {}
    failed: list[str] = []
    count = 2 if args.tiny else 60
    for name, settings in NETWORKS.items():
        recipe, prepared = small(args, {**settings, **({"batch_size": 50} if args.tiny else {})})
        setup = Setup(recipe, prepared, device)
        plain = setup.trial(plain_plan(device))
        work, batch = training_flops(plain), plain.order.batch_size
        record.say(f"\n{name}: {work / 1e9:,.1f} GFLOP a step of {batch}")
        sides = {"plain": Side.of(plain), **running(record, setup, WAYS)}
        failed += [f"{name}, {way}" for way in WAYS if way not in sides]
        seconds = alternate(sides, count, rounds=args.rounds, device=device)
        result[name] = {"batch": batch, "flops_of_a_step": work, "block_s": seconds}
        for side, values in seconds.items():
            step_s = timing.spread([s / count for s in values])
            share = work / step_s.median / ceiling
            record.say(f"  {side:17} {1e3 * step_s.median:8.3f} ms, {batch / step_s.median:10,.0f} images/s")
            floor = SHARE if "graphs" in WAYS.get(side, ()) else None
            what = f"speednet, {name}, {side}: share of the half-precision ceiling"
            result[name][side] = record.figure(what, share, share * step_s.relative, step_s.count, floor=floor)
        record.write({"ceiling_flops": ceiling, "precision": precision, "failed": failed, "networks": result})
    record.close({"ceiling_flops": ceiling, "precision": precision, "failed": failed, "networks": result})
    if failed:
        sys.exit(1)


def running(record: Record, setup: Setup, ways: Mapping[str, tuple[str, ...]]) -> dict[str, Side]:
    """A side for each way that succeeds in its first steps; the others are reported and left out."""
    result = {}
    for way, wanted in ways.items():
        try:
            side = Side.of(setup.trial(plan_of(wanted, setup)))
            side.block(3)
        except (RuntimeError, SuanliError) as error:  # what torch raises where a backend fails, and suanli
            record.say(f"  {way} doesn't run: {error}")
        else:
            result[way] = side
    return result


def training_flops(loop: Loop) -> int:
    """Operations of the matrix products and convolutions in a forward and backward pass, as PyTorch counts them,
    without the optimizer's."""
    batch = loop.first_batch()
    inputs, classes = network_inputs(batch.inputs), batch.targets["class"]
    operations = flops(lambda: F.cross_entropy(loop.runner.forward(inputs), classes).backward())
    loop.model.zero_grad(set_to_none=True)
    return operations


# --- resnet50 -------------------------------------------------------------------------------


class Synthetic(Handwritten):
    """The hand-written loop without input: random batches that lie on the device from the start."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        index = torch.arange(self.batch_size, device=self.device)
        inputs, targets = super().inputs(index, 0)
        self._batches = [(torch.randn_like(inputs), targets) for _ in range(4)]
        self._turn = 0

    def inputs(self, index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        self._turn += 1
        return self._batches[self._turn % len(self._batches)]


def resnet50(args: argparse.Namespace, device: Device, record: Record) -> None:
    recipe, prepared = photos(args)
    setup = Setup(recipe, prepared, device)
    plans = {name: plan_of((*USUAL_ON_GPU, name), setup) for name in ("read_ahead", "resident")}
    mapped, resident = (setup.trial(plan) for plan in plans.values())
    usual = plan_of(MEANS, setup).speedups
    synthetic = Synthetic(recipe, prepared, copy.deepcopy(setup.module), device, usual)
    count = 1 if args.tiny else 12
    sides = {
        "synthetic": Side(steps=synthetic.steps()),
        "cache, memory map": Side.of(mapped),
        "cache, on the device": Side.of(resident),
    }
    seconds = alternate(sides, count, rounds=args.rounds, device=device)
    side = prepared.preprocess.input_shape[-1]
    result: dict[str, Json] = {"batch": synthetic.batch_size, "pixels": side, "speedups": usual, "block_s": seconds}
    for name, values in seconds.items():
        rate = count * synthetic.batch_size / timing.spread(values).median
        record.say(f"resnet50, {side} px, {name:21} {rate:9,.0f} images/s")
        result |= {f"{name}, images_per_s": rate}
        if name != "synthetic":
            gain = timing.gain(seconds["synthetic"], values)
            result |= {f"{name} / synthetic": record.compare(f"resnet50, {name} / synthetic", gain, floor=OF_SYNTHETIC)}
    record.close(result)


if __name__ == "__main__":
    main()
