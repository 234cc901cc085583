"""suanli compared with PyTorch Lightning: the same model, data, batch size and optimizer; whole epochs alternate.

Two comparisons, each in one process:

- `equal`: Lightning, tuned as well as possible. The same uint8 rows in memory, a whole batch gathered at once
  (a batch sampler, no collation), suanli's own augmentations on the batch, bf16-mixed, channels_last, the same
  optimizer with its fused kernel, no logger, progress bar, checkpoint or summary. suanli has the same
  speedups, and no others.
- `defaults`: what a user gets without tuning, `Trainer(max_epochs=…)` and a `DataLoader` over decoded images:
  float32, one example at a time, collated, logger and checkpoint on. suanli has its defaults, too, with its own plan.

suanli's epoch runs in a callback at the end of each of Lightning's, so that start-up counts for neither side and the
machine is the same for both. All that Lightning does between the end of suanli's epoch and the end of its own is
Lightning's time, including the checkpoint of the epoch before.

    python benchmarks/bench_lightning.py ../shared/data --out records/…  [--subjects speednet] [--rounds 3]

It needs the package `lightning`, which nothing else in suanli uses.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from handwritten import MEANS, optimizer_of
from record import Record, arguments, start
from sides import Side, auto_plan, plan_of, settler
from splits import classes_of, inputs_of
from suanli.core.errors import pip_install
from suanli.core.types import Batch, Device, Json, Plan, Recipe
from suanli.data.cache import PreparedData
from suanli.machine import timing
from suanli.training.augment import AugmentationPipeline, compose, parse
from suanli.training.augments.crop import Crop
from suanli.training.augments.flip import Flip
from suanli.training.augments.resized_crop import ResizedCrop
from suanli.training.schedule import lr_factor
from suanli.training.setup import Setup
from subjects import endless, load

if importlib.util.find_spec("lightning") is None:
    sys.exit(f"This benchmark needs the package lightning. Install it beside suanli: {pip_install('lightning')}")

import lightning as pl
from lightning.pytorch.callbacks import Callback

FLOORS = {"equal": 1.0, "defaults": 2.0}  # times Lightning's examples per second
IMAGES = ("speednet", "resnet18")


# --- Lightning's side -----------------------------------------------------------------------


class Network(pl.LightningModule):
    """As a user writes it: a loss, an optimizer, a schedule. `augment` works on a batch; None where the data set
    augments."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: PreparedData,
        module: torch.nn.Module,
        *,
        augment: AugmentationPipeline | None,
        fused: bool,
    ) -> None:
        super().__init__()
        self.recipe, self.network, self.augment, self.fused = recipe, module, augment, fused
        self.to_model = prepared.preprocess.to_model
        self.classes = len(prepared.task.classes)
        self.steps_per_epoch = -(-len(prepared.splits["train"]) // recipe.batch_size)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        if self.augment is None:
            inputs, targets = batch
        else:
            rows, targets, index = batch
            own_batch = Batch(
                inputs=self.to_model({"image": rows}),
                targets={"class": targets},
                index=index,
                epoch=self.current_epoch,
                classes=self.classes,
            )
            changed = self.augment(own_batch, self.generator)
            inputs, targets = changed.inputs["image"], changed.targets["class"]
        smoothing = self.recipe.task_args.get("label_smoothing", 0.0)
        return F.cross_entropy(self.network(inputs), targets, label_smoothing=smoothing)

    def on_fit_start(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.recipe.seed)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.recipe, self.network, fused=self.fused)
        steps = round(self.recipe.epochs * self.steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.recipe, step, steps, self.steps_per_epoch)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(Dataset[Any]):
    """Whole batches of uint8 rows by index, already on the device."""

    def __init__(self, prepared: PreparedData, device: torch.device) -> None:
        split = prepared.splits["train"]
        self.rows = torch.from_numpy(inputs_of(split)).to(device)
        self.targets = torch.from_numpy(classes_of(split)).to(device)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, chosen: list[int]) -> Any:
        index = torch.tensor(chosen, device=self.targets.device)
        return self.rows[index], self.targets[index], index


class Images(Dataset[Any]):
    """One decoded image at a time, as float32 tensors, with the recipe's augmentations for a single image, as
    torchvision's transforms do it."""

    def __init__(self, recipe: Recipe, prepared: PreparedData) -> None:
        split = prepared.splits["train"]
        self.rows = torch.from_numpy(inputs_of(split))
        self.targets = classes_of(split).tolist()
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (_mean_of(prepared), _std_of(prepared)))
        self.changes = [_change_of(spec, self.rows.shape[1]) for spec in recipe.augment]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.rows[index].permute(2, 0, 1).contiguous().float().div_(255)
        for change in self.changes:
            image = change(image)
        return (image - self.mean) / self.std, self.targets[index]


def _mean_of(prepared: PreparedData) -> Any:
    return prepared.preprocess.mean  # type: ignore[attr-defined]


def _std_of(prepared: PreparedData) -> Any:
    return prepared.preprocess.std  # type: ignore[attr-defined]


def _change_of(spec: str, side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """An augmentation of a recipe for one image (C, H, W), as torchvision computes it."""
    wanted = parse(spec)
    if isinstance(wanted, Flip):
        return lambda image: image.flip(-1) if torch.rand(()) < 0.5 else image
    if isinstance(wanted, Crop):
        reach = wanted.padding if wanted.padding is not None else round(side * wanted.fraction)
        return lambda image: _moved(image, reach)
    if isinstance(wanted, ResizedCrop):
        return lambda image: _part(image, wanted.scale, wanted.ratio)
    raise ValueError(f"no version for one image of {spec}")


def _moved(image: torch.Tensor, reach: int) -> torch.Tensor:
    _, height, width = image.shape
    padded = F.pad(image[None], (reach, reach, reach, reach), mode="reflect")[0]
    down, right = (int(torch.randint(2 * reach + 1, ())) for _ in range(2))
    return padded[:, down : down + height, right : right + width]


def _part(image: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> torch.Tensor:
    _, height, width = image.shape
    area = height * width * float(torch.empty(()).uniform_(*scale))
    aspect = math.exp(float(torch.empty(()).uniform_(math.log(ratio[0]), math.log(ratio[1]))))
    h, w = min(height, round(math.sqrt(area / aspect))), min(width, round(math.sqrt(area * aspect)))
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    part = image[None, :, top : top + h, left : left + w]
    return F.interpolate(part, size=(height, width), mode="bilinear", antialias=True)[0]


class Turns(Callback):
    """Trains an epoch of suanli at the end of each epoch of Lightning, and keeps the seconds of both."""

    def __init__(self, other: Side, steps: int, settle: Callable[[], object] | None) -> None:
        self.other, self.steps, self.settle = other, steps, settle
        self.seconds: dict[str, list[float]] = {"lightning": [], "suanli": []}
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._wait()
        self._since = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._wait()
        self.seconds["lightning"].append(time.perf_counter() - self._since)
        self.seconds["suanli"].append(self.other.block(self.steps, self.settle, untimed=0))
        self._since = time.perf_counter()

    def _wait(self) -> None:
        if self.settle is not None:
            self.settle()


# --- both sides -----------------------------------------------------------------------------


def compare(kind: str, name: str, args: argparse.Namespace, device: Device) -> tuple[dict[str, list[float]], Plan]:
    """Seconds of each epoch of both sides without the first, which is a warm-up; and suanli's plan."""
    recipe, prepared = load(name, args.data, cache=args.cache)
    setup = Setup(endless(recipe), prepared, device)
    if kind == "equal":
        plan = plan_of(MEANS, setup)
    else:
        plan = auto_plan(Setup(recipe, prepared, device), args.cache)
    loop = setup.trial(plan)
    batch, steps = loop.order.batch_size, args.steps or loop.order.steps_per_epoch
    turns = Turns(Side.of(loop), steps, settler(device))
    recipe, module = setup.recipe, copy.deepcopy(setup.module)
    options: dict[str, Any] = {
        "max_epochs": args.rounds + 1,
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": 1,
        "gradient_clip_val": recipe.clip_norm,
        "callbacks": [turns],
        "limit_train_batches": steps,
    }
    with tempfile.TemporaryDirectory() as folder:
        if kind == "equal":
            trainer, network, loader = tuned(recipe, prepared, module, plan, device, batch, options)
        else:
            network = Network(recipe, prepared, module, augment=None, fused=False)
            images = Images(recipe, prepared)
            loader = DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=args.workers)
            trainer = pl.Trainer(default_root_dir=folder, **options)
        trainer.fit(network, loader)
    return {side: values[1:] for side, values in turns.seconds.items()}, plan


def tuned(
    recipe: Recipe,
    prepared: PreparedData,
    module: torch.nn.Module,
    plan: Plan,
    device: Device,
    batch: int,
    options: dict[str, Any],
) -> tuple[pl.Trainer, Network, DataLoader[Any]]:
    if "channels_last" in plan.speedups:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = Rows(prepared, torch.device(device.torch_name))
    augment = compose(recipe.augment, prepared.kind)
    network = Network(recipe, prepared, module, augment=augment, fused="fused_optimizer" in plan.speedups)
    batches = BatchSampler(RandomSampler(rows), batch, drop_last=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    precision = "bf16-mixed" if "bf16" in plan.speedups else "32-true"
    trainer = pl.Trainer(precision=precision, **quiet, **options)
    return trainer, network, DataLoader(rows, sampler=batches, batch_size=None)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--subjects", default=",".join(IMAGES))
    parser.add_argument("--kinds", default=",".join(FLOORS), help="equal, defaults")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of an epoch; default: all of it")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader of `defaults`; its own default is 0")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device = start(args)
    record = Record("lightning", args.out, device)
    record.say(f"lightning {pl.__version__}\n")
    results: dict[str, Json] = {}
    for name in args.subjects.split(","):
        for kind in args.kinds.split(","):
            seconds, plan = compare(kind, name, args, device)
            for side, values in seconds.items():
                record.say(f"{name:9} {kind:9} {side:10} {timing.spread(values).median:8.2f} s an epoch")
            gain = timing.gain(seconds["lightning"], seconds["suanli"])
            ratio = record.compare(f"{name}, {kind}: suanli / Lightning", gain, floor=FLOORS[kind])
            description = {"speedups": plan.speedups, "threads": plan.threads}
            results[f"{name} {kind}"] = {"seconds": seconds, "plan": description, "suanli_over_lightning": ratio}
    record.close({"lightning": pl.__version__, "steps_of_an_epoch": args.steps, "found": results})


if __name__ == "__main__":
    main()
