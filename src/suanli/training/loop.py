"""The training loop: one optimizer step at a time, with everything that it must remember.

What a step does depends on the weights, the seed and the step's number only, so a loop that is
put back to the state of step n goes on bit by bit as if it had never stopped. The loop knows no
files and no progress bars; `training.py` decides when to save, to validate and to stop.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from suanli.compute.infer import infer
from suanli.compute.step_runner import Numbers, StepRunner
from suanli.core.errors import DamagedFile, Diverged, UsageError
from suanli.core.types import Batch, Device, Json, Preprocess, Recipe, Step, Task
from suanli.data.loader import Feed, Order, mix
from suanli.models.safetensors_io import StoredTensors
from suanli.parallel import dtensor
from suanli.parallel.group import ALONE, Group
from suanli.training import checkpoint
from suanli.training.augment import compose
from suanli.training.progressive_resizing import full_size_steps, scale_at, shrink
from suanli.training.schedule import lr_factor

LOSSES_HELD = 20  # on a GPU, reading the loss waits for the device: do it once in so many steps
EARLY = 0.1  # of a run's steps: until there it is watched for a loss that climbs
CLIMBED = (10, 2.0)  # so many losses in a row, each so many times what it began with, or what guessing costs


@dataclass(kw_only=True)
class Progress:
    """The plain values that a loop remembers between steps."""

    step: int = 0
    segments: list[float]  # epochs of each stretch: the recipe's, then each continuation's
    last: float | None = None  # primary metric of the newest validation
    best: float | None = None
    stale: int = 0  # validations since the best
    seconds: float = 0.0  # in training steps so far


class Loop:
    def __init__(
        self,
        *,
        recipe: Recipe,
        step: Step,
        task: Task,
        preprocess: Preprocess,
        train: Feed,
        val: Feed,
        device: Device,
        classes: int,
        group: Group = ALONE,
        full_size: bool = False,
        local_only: bool = False,
    ) -> None:
        """`full_size`: every step sees full-size pictures, whatever the recipe says, so that all steps cost the same.
        `local_only`: the loop learns from this process's share of the batch without the other processes. Both are
        for measuring."""
        self.full_size, self.group, self._partners = full_size, group, ALONE if local_only else group
        self.recipe, self.compute, self.task = recipe, step, task
        self.preprocess, self.train_feed, self.val_feed = preprocess, train, val
        self.classes = classes
        self.device = torch.device(device.torch_name)
        self.order = Order(len(train), recipe.batch_size, recipe.seed)
        self.augment = compose(recipe.augment, preprocess.kind)
        self.class_weights = self._class_weights()
        self._places: torch.Tensor | None = None
        self._shares: tuple[float, ...] | None = None  # of which `_places` are
        self.runner = StepRunner(
            step, self._loss, clip_norm=recipe.clip_norm, group=self._partners, batch_size=self.order.batch_size
        )
        self.progress = Progress(segments=[recipe.epochs])
        self.ema = _copy(step.model) if recipe.ema_decay is not None else None
        self._own = step.model.state_dict()  # the tensors themselves: they stay the same while values change
        self._counted = [n for n, t in self._own.items() if not t.is_floating_point()]
        floats = [n for n, t in self._own.items() if t.is_floating_point()]
        self._averaged = [dtensor.local_part(self._own[n]) for n in floats]
        self._averages = [dtensor.local_part(self.ema[n]) for n in floats] if self.ema else []
        self.phase = "start"  # of a step: "input", "learn", "settle"; or what is done between two
        self.rate = 0.0  # the recipe's learning rate as the schedule has it now
        self._losses: list[torch.Tensor] = []
        self._judges = True  # its losses
        self._own_seed = (group.rank,) if group.rank else ()  # dropout draws for the examples here, not for all
        self._newest: deque[float] = deque(maxlen=CLIMBED[0])
        self._climbed = math.inf  # a loss from here on has climbed; known after the first one
        self._generator = torch.Generator(self.device)
        self._default_generators = [torch.default_generator]
        if self.device.type == "cuda":
            index = self.device.index if self.device.index is not None else torch.cuda.current_device()
            self._default_generators.append(torch.cuda.default_generators[index])
        elif self.device.type == "mps":
            self._default_generators.append(torch.mps._get_default_mps_generator())
        self._running: Iterator[float] | None = None

    @property
    def model(self) -> nn.Module:
        return self.compute.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self.compute.optimizer is not None
        return self.compute.optimizer

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(self._segment_steps())

    def full_size_steps(self, first: int, end: int) -> float:
        """Of the steps from `first` to before `end`, in steps at full size."""
        return full_size_steps(self.recipe.progressive_resizing, first, end, self._segment_steps()[0])

    @property
    def full_size_steps_left(self) -> float:
        """From here to the end, in steps at full size."""
        return self.full_size_steps(self.progress.step, self.steps)

    @property
    def places(self) -> torch.Tensor | None:
        """(n,) int64: the places of a batch that this process computes; None: all. Of each part in which a batch is
        computed it has its share, so that batch norms see the same parts however many processes there are.
        Raises UsageError for more processes than examples."""
        if self.group.is_alone:
            return None
        if self._places is None or self._shares != self.group.shares:
            parts = min(self.compute.micro_batches, self.order.batch_size)
            ends = [self.order.batch_size * i // parts for i in range(parts + 1)]
            own = [torch.arange(a, b)[self.group.batch_share(b - a)] for a, b in pairwise(ends)]
            self._places = torch.cat(own)
            self.runner.ends = [sum(map(len, own[:i])) for i in range(parts + 1)]
            self._shares = self.group.shares
        return self._places

    @property
    def batch_size(self) -> int:
        """Examples of a step that this process computes."""
        return self.order.batch_size if self.places is None else len(self.places)

    @property
    def epoch(self) -> float:
        return self.progress.step / self.order.steps_per_epoch

    # --- one step ---

    def run(self) -> Iterator[float]:
        """Trains from where it stands to the end; yields the loss of each step.

        The loss is the newest known one: on a GPU it lags by up to LOSSES_HELD steps. Raises
        Diverged at the first loss that is not finite, and where it climbs in the first tenth of the run.
        """
        positions = (self._positions(s) for s in range(self.progress.step, self.steps))
        batches = self.train_feed.batches(positions, read_ahead=self.compute.read_ahead)
        self.model.train()
        clock = self.runner.clock
        loss = math.nan
        while self.progress.step < self.steps:
            started = time.perf_counter()
            self.phase = "input"
            clock.begin()
            batch = self._inputs(*next(batches), 1.0 if self.full_size else self.image_scale(self.progress.step))
            clock.mark("input")
            self.phase = "learn"
            self._losses.append(self._learn(batch))
            self.progress.step += 1
            clock.end()
            self.phase = "settle"
            if self.device.type == "cpu" or len(self._losses) >= LOSSES_HELD:
                loss = self.read_losses()
            self.progress.seconds += time.perf_counter() - started
            yield loss
        self.phase = "end"

    def _positions(self, step: int) -> torch.Tensor:
        """In the split, of the examples that this process computes."""
        every = self.order.positions(step)
        return every if self.places is None else every[self.places]

    def image_scale(self, step: int) -> float:
        """Of each side of the pictures at this step, as the recipe wants it. A continuation sees them whole."""
        return scale_at(self.recipe.progressive_resizing, step, self._segment_steps()[0])

    def _inputs(self, rows: torch.Tensor, targets: torch.Tensor, index: torch.Tensor, scale: float) -> Batch:
        step = self.progress.step
        batch = Batch(
            inputs=self.preprocess.to_model(rows),
            targets=targets,
            index=index,
            epoch=self.order.epoch(step),
            classes=self.classes,
            global_positions=None if self.places is None else self.places[: len(index)].to(index.device),
            global_size=self.order.batch_size,
        )
        batch = self.augment(batch, self._generator.manual_seed(mix(self.recipe.seed, 3, step)))
        return batch if scale == 1 else replace(batch, inputs=shrink(batch.inputs, scale))

    def _learn(self, batch: Batch) -> torch.Tensor:
        """One step of the optimizer on a batch; its loss, not waited for."""
        step = self.progress.step
        self._seed(step)
        self._set_rate(step)
        loss = self.runner(batch.inputs, batch.targets)
        if self.ema is not None:
            self._average(step)
        return loss

    def _seed(self, step: int) -> None:
        """For dropout inside the model. `torch.manual_seed` asks every kind of device, which takes longer than the
        kernels of a small step."""
        for generator in self._default_generators:
            generator.manual_seed(mix(self.recipe.seed, 2, step, *self._own_seed))

    def advance(self) -> None:
        """The next step of `run`, waited for: what the planner times. A training that diverges takes as long as
        any other, so here nothing is said of it."""
        if self._running is None:
            self._judges = False
            self._running = self.run()
        next(self._running)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def first_batch(self, examples: int | None = None, scale: float = 1.0) -> Batch:
        """The batch of the first step, or some examples of it, as training augments it: for measuring. At full
        size, unless another is wanted."""
        positions = self._positions(0)[:examples]
        return self._inputs(*next(self.train_feed.batches(iter([positions]))), scale)

    def try_step(self, examples: int, *, whole: bool = False, scale: float = 1.0) -> None:
        """Forward and backward on some training examples, without a step: for measuring. `whole`: at once,
        even if the recipe computes in parts. Changes gradients and batch statistics, which the caller puts
        back."""
        self.model.train()
        batch = self.first_batch(examples, scale)
        self.runner.backward(batch.inputs, batch.targets, whole=whole)

    def compute_numbers(self) -> Numbers:
        """Trains one step on the first batch and tells what it computed."""
        self.model.train()
        batch = self.first_batch()
        self._seed(0)
        self._set_rate(self.progress.step)
        return self.runner.compute_numbers(batch.inputs, batch.targets)

    @contextmanager
    def preserve_weights(self) -> Iterator[None]:
        """Puts weights, statistics and gradients back to what they were before the block."""
        before = _copy(self.model)
        try:
            yield
        finally:
            self.model.load_state_dict(before)
            self.model.zero_grad(set_to_none=True)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.task.loss(
            logits, targets, label_smoothing=self.recipe.label_smoothing, class_weights=self.class_weights
        )

    def _set_rate(self, step: int) -> None:
        for steps in self._segment_steps():
            if step < steps:
                break
            step -= steps
        scale = lr_factor(self.recipe, step, steps, self.order.steps_per_epoch)
        self.rate = self.recipe.lr * scale
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(group["initial_lr"] * scale)
            else:
                group["lr"] = group["initial_lr"] * scale

    def _segment_steps(self) -> list[int]:
        return [max(1, round(e * self.order.steps_per_epoch)) for e in self.progress.segments]

    @torch.no_grad()
    def _average(self, step: int) -> None:
        assert self.ema is not None
        assert self.recipe.ema_decay is not None
        # Early averages forget faster, or the random start would linger.
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._averaged, 1 - decay)
        for name in self._counted:
            self.ema[name].copy_(self._own[name])

    def read_losses(self) -> float:
        """A collective: waits for the losses held back and returns the last. Raises Diverged."""
        if not self._losses:
            return math.nan
        losses = self._partners.sum(torch.stack(self._losses)).cpu() / self._partners.size
        first = self.progress.step - len(losses)
        self._losses.clear()
        if self._judges:
            self._judge(first, losses)
        return float(losses[-1])

    def _judge(self, first: int, losses: torch.Tensor) -> None:
        """Raises Diverged for losses, the first of them that of step `first`, that aren't finite or climb."""
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            step = first + int(bad[0]) + 1
            raise Diverged(f"The loss became {losses[bad[0]].item()} at step {step}.", fix=_DIVERGED_FIX)
        if first < EARLY * self.steps:
            self._refuse_climbing(losses.tolist())

    def _refuse_climbing(self, losses: list[float]) -> None:
        if self._climbed == math.inf:
            one_each = torch.arange(self.classes, device=self.device)
            guessing = self._loss(torch.zeros(self.classes, self.classes, device=self.device), one_each)
            self._climbed = CLIMBED[1] * max(losses[0], float(guessing))
        self._newest.extend(losses)
        if len(self._newest) == CLIMBED[0] and min(self._newest) > self._climbed:
            step, began = self.progress.step, self._climbed / CLIMBED[1]
            raise Diverged(f"The loss climbed from {began:.2g} to {losses[-1]:.2g} by step {step}.", fix=_DIVERGED_FIX)

    # --- validation ---

    def validate(self) -> dict[str, float]:
        """A collective: scores on the validation split with the weights that would be kept now. Every process
        answers for a stretch of it."""
        before, self.phase = self.phase, "validate"
        count, group = len(self.val_feed), self._partners
        mine = range(count)[group.even_share(count)]
        with self.use_averaged_weights():
            found = infer(self.compute, self.preprocess, self.task, self._validation_rows(mine))[: len(mine)]
        found = group.gather_rows(found, mine.start, count, self.classes)
        try:
            scores = self.task.scores(found.astype(np.float32), self.val_feed.split.targets)
        except Diverged as error:
            at = self.progress.step
            raise Diverged(f"The model's answers became NaN at step {at}.", fix=_DIVERGED_FIX) from error
        self.phase = before
        score, progress = scores[self.task.metric], self.progress
        progress.last = score
        if progress.best is None or score > progress.best:
            progress.best, progress.stale = score, 0
        else:
            progress.stale += 1
        return scores

    def _validation_rows(self, mine: range) -> Iterator[torch.Tensor]:
        """Batches of the examples that this process answers for. Where the weights are shared out each process must
        compute as many: one with less to do computes one more row, whose answer nobody wants."""
        size = validation_batch(self.recipe)
        for rows, _, _ in self.val_feed.in_order(size, mine):
            yield rows
        if self.compute.sharded:
            longest = -(-len(self.val_feed) // self.group.size)
            for _ in range(-(-longest // size) - -(-len(mine) // size)):
                yield self.val_feed.rows(torch.zeros(1, dtype=torch.int64))

    @property
    def should_stop_early(self) -> bool:
        return self.recipe.early_stop is not None and self.progress.stale >= self.recipe.early_stop

    @contextmanager
    def use_averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights while the block runs, where the recipe averages."""
        if self.ema is None:
            yield
            return
        with self.preserve_weights():
            self.model.load_state_dict(self.ema)
            yield

    @property
    def validation_score(self) -> float | None:
        """The primary metric on validation of the weights that are kept; None before a validation."""
        return self.progress.last if self.recipe.early_stop is None else self.progress.best

    # --- going on ---

    def extend(self, epochs: float) -> None:
        """Continue a finished loop for so many epochs, with a learning rate that rises and falls
        anew. Raises UsageError."""
        if not epochs > 0 or math.isinf(epochs):
            raise UsageError(f"--more-epochs can't be {epochs}.", fix="Give a number above 0.")
        if self.progress.step < self.steps:  # it stopped early: what was left is not owed
            self.progress.segments = [self.epoch]
        self.progress.segments.append(epochs)
        self.progress.stale = 0

    def state(self) -> tuple[checkpoint.Tensors, Json]:
        """A collective: everything that `restore` needs. Raises Diverged rather than give away broken weights."""
        self.read_losses()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        broken = [n for n, t in tensors.items() if t.is_floating_point() and not dtensor.local_part(t).isfinite().all()]
        if self.compute.sharded:  # no other process may see it, and all must know
            broken = [name for said in self.group.gather(broken[:1]) for name in said]
        if broken:
            raise Diverged(
                f"The weights {broken[0].removeprefix('model.')} became NaN at step {self.progress.step}.",
                fix=_DIVERGED_FIX,
            )
        if self.ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        optimizer_tensors, plain = checkpoint.optimizer_state(self.optimizer)
        values = {"loop": asdict(self.progress), "optimizer": plain, "scaler": self.runner.scaler.state_dict()}
        return tensors | optimizer_tensors, values

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Raises DamagedFile for a checkpoint of another network or optimizer."""
        tensors, plain = saved.tensors, saved.progress
        try:
            self.load_tensors(tensors, "model.")
            if self.ema is not None:
                self.load_tensors(tensors, "ema.", self.ema)
            checkpoint.load_optimizer(self.optimizer, tensors, plain["optimizer"])
            if self.runner.scaler.is_enabled() and plain.get("scaler"):
                self.runner.scaler.load_state_dict(plain["scaler"])
            self.progress = Progress(**plain["loop"])
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DamagedFile(
                f"The checkpoint {saved.path} is not one of this network and optimizer ({error}).",
                fix="Put their code back as it was, or train anew.",
            ) from error

    def load_tensors(
        self, stored: StoredTensors, prefix: str = "", into: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """The values of the network's tensors, or of others by these names, from a file; of those that are shared out
        this process's rows. Raises ValueError for another network's."""
        into = self.model.state_dict() if into is None else into
        names = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
        if names != into.keys():
            raise ValueError(f"it has {_some(names - into.keys())}, and lacks {_some(into.keys() - names)}")
        with torch.no_grad():
            for name, tensor in into.items():
                if stored.shape(prefix + name) != tensor.shape:
                    raise ValueError(f"{name} has shape {stored.shape(prefix + name)}, not {tuple(tensor.shape)}")
                dtensor.local_part(tensor).copy_(stored.rows(prefix + name, dtensor.local_rows(tensor)))

    def _class_weights(self) -> torch.Tensor | None:
        if self.recipe.class_weights == "none":
            return None
        counts = np.bincount(self.train_feed.split.targets, minlength=self.classes)
        # Inverse frequency, so that each class counts the same in the loss; an absent class not at all.
        weights = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1), 0.0)
        return torch.tensor(weights, dtype=torch.float32, device=self.device)


_DIVERGED_FIX = "Train again with a lower --lr, a longer warm-up (--set warmup_epochs=2), or --set clip_norm=1."


def validation_batch(recipe: Recipe) -> int:
    """A validation needs no gradients, so more fits; but small steps keep Ctrl-C quick."""
    return min(max(recipe.batch_size, 64), 512)


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _some(names: Collection[str]) -> str:
    return min(names, default="nothing") + (f" and {len(names) - 1} more" if len(names) > 1 else "")
