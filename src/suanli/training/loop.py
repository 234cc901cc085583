"""The training loop: one optimizer step at a time.

What a step computes depends only on the weights, the seed and the step's number. A loop that is restored to its state
after step n therefore goes on bit by bit as if it had never stopped. The loop knows no files and no progress bars:
`trainer.py` decides when to save, to validate and to stop.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from suanli.compute.infer import network_inputs
from suanli.compute.plan import switch_plan
from suanli.compute.step_runner import Numbers, StepRunner
from suanli.core.errors import DamagedFile, Diverged, UsageError
from suanli.core.schema import Tensors
from suanli.core.task import Metric, Task
from suanli.core.types import Batch, Device, Plan, Preprocess, Recipe, Step
from suanli.data.loader import Feed, Order, mix
from suanli.models.layers import Head
from suanli.parallel import dtensor
from suanli.parallel.group import ALIGNMENT, ALONE, Group
from suanli.training import checkpoint, divergence
from suanli.training.augment import AugmentationPipeline, compose
from suanli.training.divergence import DivergenceCheck
from suanli.training.ema import WeightAverage, copy_weights
from suanli.training.freezing import Freezing
from suanli.training.image_sizes import shrink
from suanli.training.schedule import lr_factor
from suanli.training.step_costs import StepCosts

TOTAL = "total of "  # a target of this name and a sum's is what that sum is divided by
READ_LOSSES_EVERY = 20  # steps: on a GPU, reading a loss waits for the device


@dataclass(kw_only=True)
class Progress:
    """The plain values that a loop remembers between steps."""

    step: int = 0
    segments: list[float]  # epochs: the recipe's, then those of each continuation
    last: float | None = None  # primary metric of the newest validation
    best: float | None = None
    stale: int = 0  # validations since the best
    seconds: float = 0.0  # in training steps so far
    # Where the plan changed between two steps: the first step of each plan, its speedups and threads.
    plans: list[tuple[int, list[str], int | None]] = field(default_factory=list)

    def add_score(self, score: float, metric: Metric) -> None:
        self.last = score
        if self.best is None or metric.gain(self.best, score) > 0:
            self.best, self.stale = score, 0
        else:
            self.stale += 1


class Loop:
    def __init__(
        self,
        *,
        recipe: Recipe,
        step: Step,
        plain: Step,
        plan: Plan,
        task: Task,
        preprocess: Preprocess,
        head: Head,
        train: Feed,
        val: Feed,
        device: Device,
        group: Group = ALONE,
        full_size: bool = False,
        local_only: bool = False,
    ) -> None:
        """`step` is the `plain` one, changed by `plan`; `head` names the network's output layer. `full_size`: every
        step sees full-size images, augmented like the first, and trains all layers, so that all steps cost the same.
        `local_only`: the loop learns from this process's share of the batch without the other processes. Both are for
        measuring. Raises UsageError for more processes than examples in a batch."""
        self.recipe, self.plan, self.task, self.preprocess = recipe, plan, task, preprocess
        self._plain, self._device = plain, device
        self.compute = step
        self.train_feed, self.val_feed = train, val
        self.device = torch.device(device.torch_name)
        self.group, self._step_group = group, ALONE if local_only else group
        self._full_size = full_size
        self.progress = Progress(segments=[recipe.epochs])
        self.phase = "start"  # of a step: "input", "compute", "loss"; or what happens between two steps
        self.lr = 0.0  # the recipe's learning rate, as the schedule has it now

        self.order = Order(len(train), recipe.batch_size, recipe.seed)
        self.augment, self.final_augment = (
            compose(specs, preprocess.roles, task.targets) for specs in (recipe.augment, recipe.final_augment)
        )
        self.runner = StepRunner(
            step,
            self.loss,
            clip_norm=recipe.clip_norm,
            group=self._step_group,
            batch_size=self.order.batch_size,
            loss_adds_up=task.has_counts,
        )
        self.divide_batch()
        self.freezing = Freezing(recipe, step.model, self.optimizer, head)
        self.ema = None if recipe.ema_decay is None else WeightAverage(step.model, recipe.ema_decay)

        self._losses: list[torch.Tensor] = []  # not read yet
        self._check: DivergenceCheck | None = DivergenceCheck(task.guessing_loss)
        self._generator = torch.Generator(self.device)  # of the augmentations
        self._model_generators = _default_generators(self.device)
        self._rank_seed = (group.rank,) if group.rank else ()  # dropout draws for this process's examples alone
        self._measured_run: Iterator[float] | None = None

    @property
    def model(self) -> nn.Module:
        return self.compute.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self.compute.optimizer is not None
        return self.compute.optimizer

    # --- how far it is ---

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(self._segment_steps())

    @property
    def epoch(self) -> float:
        return self.progress.step / self.order.steps_per_epoch

    def _segment_steps(self) -> list[int]:
        per_epoch = self.order.steps_per_epoch
        return [max(1, round(epochs * per_epoch)) if epochs else 0 for epochs in self.progress.segments]

    def _place_in_segment(self, step: int) -> tuple[int, int]:
        """The number of `step` in the recipe's epochs or in the continuation that it belongs to, and their steps."""
        for steps in self._segment_steps():
            if step < steps:
                break
            step -= steps
        return step, steps

    def _augmentation(self, step: int) -> AugmentationPipeline:
        """A continuation ends with the recipe's final epochs again."""
        step, steps = self._place_in_segment(step)
        final = round(self.recipe.final_epochs * self.order.steps_per_epoch)
        return self.augment if step < steps - final else self.final_augment

    @property
    def full_size_steps_left(self) -> float:
        """The work that is left, in steps on full-size images that train all layers."""
        return self.costs.total(self.progress.step, self.steps)

    @property
    def costs(self) -> StepCosts:
        return StepCosts(
            recipe=self.recipe,
            steps=self._segment_steps()[0],
            steps_per_epoch=self.order.steps_per_epoch,
            layers=self.freezing.layers,
        )

    @property
    def should_stop_early(self) -> bool:
        return self.recipe.early_stop is not None and self.progress.stale >= self.recipe.early_stop

    @property
    def validation_score(self) -> float | None:
        """The primary metric on validation of the weights that the run keeps; None before a validation."""
        return self.progress.last if self.recipe.early_stop is None else self.progress.best

    # --- which examples ---

    def divide_batch(self) -> None:
        """Gives this process its share of each batch; to be called again when the group's shares change.

        With accumulation it gets a share of each micro-batch, so that batch norms see the same examples however many
        processes there are. Raises UsageError for more processes than examples.
        """
        size = self.order.batch_size
        self.global_positions: torch.Tensor | None = None  # (n,) int64, positions of its share in a batch; None: all
        self.batch_size = size  # examples of a step that this process computes
        if self.group.is_alone:
            return
        parts = min(self.compute.micro_batches, size)
        alignment = max(ALIGNMENT, self.augment.neighbours, self.final_augment.neighbours)
        ends = [size * i // parts for i in range(parts + 1)]
        own = [torch.arange(a, b)[self.group.batch_share(b - a, alignment)] for a, b in pairwise(ends)]
        self.global_positions = torch.cat(own)
        self.batch_size = len(self.global_positions)
        self.runner.ends = [sum(map(len, own[:i])) for i in range(parts + 1)]

    def _split_positions(self, step: int) -> torch.Tensor:
        """Positions in the training split of this process's examples."""
        positions = self.order.positions(step)
        return positions if self.global_positions is None else positions[self.global_positions]

    # --- one step ---

    def run(self) -> Iterator[float]:
        """Trains from the current step to the end; yields a loss for each step.

        It is the newest that is known: on a GPU it lags by up to READ_LOSSES_EVERY steps. Raises Diverged for a loss
        that isn't finite, and for one that climbs in the first tenth of the run.
        """
        positions = (self._split_positions(step) for step in range(self.progress.step, self.steps))
        batches = self.train_feed.batches(positions, read_ahead=self.compute.read_ahead)
        self.model.train()
        clock = self.runner.clock
        loss = math.nan
        while self.progress.step < self.steps:
            started = time.perf_counter()
            self.phase = "input"
            clock.begin()
            scale = 1.0 if self._full_size else self.costs.image_scale(self.progress.step)
            batch = self._make_batch(*next(batches), scale)
            clock.mark("input")
            self.phase = "compute"
            self._losses.append(self._train_on(batch))
            self.progress.step += 1
            clock.end()
            self.phase = "loss"
            if self.device.type == "cpu" or len(self._losses) >= READ_LOSSES_EVERY:
                loss = self.read_losses()
            self.progress.seconds += time.perf_counter() - started
            yield loss
        self.phase = "end"

    def _make_batch(self, inputs: Tensors, targets: Tensors, index: torch.Tensor, scale: float) -> Batch:
        """From cached inputs to augmented inputs of the network."""
        step, positions = self.progress.step, self.global_positions
        batch = Batch(
            inputs=self.preprocess.to_model(inputs),
            targets=targets,
            index=index,
            epoch=self.order.epoch(step),
            classes=len(self.task.classes),
            global_positions=None if positions is None else positions[: len(index)].to(index.device),
            global_size=self.order.batch_size,
        )
        augment = self._augmentation(0 if self._full_size else step)
        batch = augment(batch, self._generator.manual_seed(mix(self.recipe.seed, 3, step)))
        return batch if scale == 1 else shrink(batch, scale)

    def _train_on(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; returns the loss without waiting for it."""
        step = self.progress.step
        self._seed_model(step)
        self._set_lr(step)
        if self.freezing.train(self.freezing.layers if self._full_size else self.costs.unfrozen_layers(step)):
            self.runner.follow_gradients()
        loss = self.runner(network_inputs(batch.inputs), self._add_totals(batch.targets))
        if self.ema is not None:
            self.ema.update(step)
        return loss

    def _seed_model(self, step: int) -> None:
        """Seeds dropout. `torch.manual_seed` would seed every kind of device, which takes longer than the kernels of
        a small step."""
        for generator in self._model_generators:
            generator.manual_seed(mix(self.recipe.seed, 2, step, *self._rank_seed))

    def _set_lr(self, step: int) -> None:
        step, steps = self._place_in_segment(step)
        factor = lr_factor(self.recipe, step, steps, self.order.steps_per_epoch)
        self.lr = self.recipe.lr * factor
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # a captured graph reads it anew at each replay
                group["lr"].fill_(group["initial_lr"] * factor)
            else:
                group["lr"] = group["initial_lr"] * factor

    def _add_totals(self, targets: Tensors) -> Tensors:
        """A collective where the task has counts: what the sums of the loss are divided by, which each example of a
        micro-batch carries."""
        if not self.task.has_counts:
            return targets
        counts, size = self.task.counts(targets), len(next(iter(targets.values())))
        totals = {TOTAL + name: self._step_group.sum(count.float()).expand(size) for name, count in counts.items()}
        return {**targets, **totals}

    def loss(self, outputs: Any, targets: Tensors) -> torch.Tensor:
        """The mean loss over the examples; where the task has counts, this part's share of the whole batch's loss."""
        sums = self.task.loss(outputs, targets)
        if self.task.has_counts:
            parts = [total / targets[TOTAL + name][0].clamp(min=1) for name, total in sums.items()]
        else:
            parts = [total / len(next(iter(targets.values()))) for total in sums.values()]
        return functools.reduce(torch.add, parts)

    def read_losses(self) -> float:
        """A collective: waits for the losses of the steps since the last call and returns the newest. Raises
        Diverged."""
        if not self._losses:
            return math.nan
        losses = self._step_group.sum(torch.stack(self._losses)).cpu() / self._step_group.size
        self._losses.clear()
        if self._check is not None:
            self._check.check(losses, self.progress.step - len(losses), self.steps)
        return float(losses[-1])

    # --- measuring ---

    def switch(self, plan: Plan) -> None:
        """Computes by another plan from the next step on. Raises ValueError for a speedup that can't be turned on or
        off between two steps, and MachineError for one that this step has no use for."""
        self.compute = self.runner.step = switch_plan(self.plan, plan, self._plain, self._device)
        self.plan = plan

    def advance(self) -> None:
        """Trains the next step and waits for the device: what the planner times. Losses aren't checked, since a
        training that diverges takes as long as any other. After the last step comes the first one again."""
        if self._measured_run is None or self.progress.step >= self.steps:
            self._check = None
            self.progress.step %= self.steps
            self._measured_run = self.run()
        next(self._measured_run)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def first_batch(self, examples: int | None = None, scale: float = 1.0) -> Batch:
        """The augmented batch of the first step, or its first `examples`, with each side multiplied by `scale`."""
        positions = self._split_positions(0)[:examples]
        return self._make_batch(*next(self.train_feed.batches(iter([positions]))), scale)

    def try_step(self, examples: int, *, whole: bool = False, scale: float = 1.0) -> None:
        """Forward and backward pass on some training examples, without an optimizer step. `whole`: as one batch, even
        if the recipe accumulates. Changes gradients and batch statistics: see `preserve_weights`."""
        self._begin_measuring()
        batch = self.first_batch(examples, scale)
        self.runner.backward(network_inputs(batch.inputs), self._add_totals(batch.targets), whole=whole)

    def compute_numbers(self, examples: int | None = None) -> Numbers:
        """Trains one step on the first batch, or on so many of its examples, and returns what it computed."""
        self._begin_measuring()
        batch = self.first_batch(examples)
        self._seed_model(0)
        self._set_lr(self.progress.step)
        return self.runner.compute_numbers(network_inputs(batch.inputs), self._add_totals(batch.targets))

    def _begin_measuring(self) -> None:
        """Whatever step comes next, all layers are trained."""
        self.model.train()
        self.freezing.train(self.freezing.layers)

    @contextmanager
    def preserve_weights(self) -> Iterator[None]:
        """Restores weights and batch statistics after the block, and clears gradients."""
        before = copy_weights(self.model)
        try:
            yield
        finally:
            self.model.load_state_dict(before)
            self.model.zero_grad(set_to_none=True)

    @contextmanager
    def use_averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights inside the block, where the recipe averages them."""
        if self.ema is None:
            yield
            return
        with self.preserve_weights():
            self.model.load_state_dict(self.ema.tensors)
            yield

    # --- saving and resuming ---

    def extend(self, epochs: float) -> None:
        """Continues a finished loop for so many epochs, with a learning rate that rises and falls anew. Raises
        UsageError."""
        if not epochs > 0 or math.isinf(epochs):
            raise UsageError(f"--more-epochs can't be {epochs}.", fix="Give a number above 0.")
        if self.progress.step < self.steps:  # it stopped early: the epochs that were left are dropped
            self.progress.segments = [self.epoch]
        self.progress.segments.append(epochs)
        self.progress.stale = 0

    def state(self) -> tuple[checkpoint.Tensors, dict[str, object]]:
        """A collective: all that `restore` needs. Raises Diverged rather than return weights that aren't finite."""
        self.read_losses()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        broken = [n for n, t in tensors.items() if t.is_floating_point() and not dtensor.local_part(t).isfinite().all()]
        if self.compute.sharded:  # perhaps only another process sees it, and all must know
            broken = [name for names in self.group.gather(broken[:1]) for name in names]
        if broken:
            name = broken[0].removeprefix("model.")
            raise Diverged(f"The weights {name} became NaN at step {self.progress.step}.", fix=divergence.FIX)
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.tensors.items()}
        optimizer_tensors, optimizer_values = checkpoint.optimizer_state(self.optimizer)
        scaler = self.runner.scaler.state_dict()
        values: dict[str, object] = {"loop": asdict(self.progress), "optimizer": optimizer_values, "scaler": scaler}
        return tensors | optimizer_tensors, values

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Raises DamagedFile for a checkpoint of another network or optimizer."""
        tensors, values = saved.tensors, saved.progress
        try:
            checkpoint.load_tensors(tensors, self.model.state_dict(), "model.")
            if self.ema is not None:
                checkpoint.load_tensors(tensors, self.ema.tensors, "ema.")
            checkpoint.load_optimizer(self.optimizer, tensors, values["optimizer"])
            if self.runner.scaler.is_enabled() and values.get("scaler"):
                self.runner.scaler.load_state_dict(values["scaler"])
            self.progress = Progress(**values["loop"])
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DamagedFile(
                f"The checkpoint {saved.path} is not one of this network and optimizer ({error}).",
                fix="Restore the code that wrote it, or train again.",
            ) from error


def _default_generators(device: torch.device) -> list[torch.Generator]:
    """Those that random layers of a network on this device draw from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        generators.append(torch.cuda.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    return generators
