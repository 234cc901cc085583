"""Trains one recipe repeatedly in one process, each time with another seed. What the first training captures and
compiles serves the others, so their seconds are those of a warm start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sides import plan_of, settler
from splits import classes_of
from suanli.compute.infer import infer
from suanli.compute.step_runner import apply_settings
from suanli.core.types import Device, Recipe
from suanli.data.cache import PreparedData
from suanli.data.loader import Order
from suanli.training.loop import Progress
from suanli.training.recipe import change
from suanli.training.setup import Setup

EVALUATED = 2000  # examples at a time


@dataclass(frozen=True, kw_only=True)
class Trained:
    start_s: float  # of the data-dependent initialisation before the first step
    train_s: float
    single: float  # accuracy with one view
    views: float  # with the views of the recipe's augmentations
    examine_s: float  # the one with all views


class Warm:
    def __init__(self, recipe: Recipe, prepared: PreparedData, device: Device, speedups: list[str]) -> None:
        self.recipe, self.prepared, self.device = recipe, prepared, device
        setup = Setup(recipe, prepared, device)
        self.plan = plan_of(speedups, setup)
        self.loop = setup.loop(self.plan)
        self._settle: Callable[[], None] = settler(device) or (lambda: None)

    def train(self, seed: int) -> Trained:
        """Trains from a new start and evaluates it on validation. The weights change in place: a captured graph refers
        to them."""
        recipe, loop = change(self.recipe, {"seed": seed}), self.loop
        fresh = Setup(recipe, self.prepared, self.device).module
        with torch.no_grad():
            for own, new in zip(loop.model.state_dict().values(), fresh.state_dict().values(), strict=True):
                own.copy_(new)
            for entries in loop.optimizer.state.values():
                for value in entries.values():
                    value.zero_()
        if loop.ema is not None:
            for name, value in loop.model.state_dict().items():
                loop.ema.tensors[name].copy_(value)
        loop.recipe, loop.progress = recipe, Progress(segments=[recipe.epochs])
        loop.order = Order(len(loop.train_feed), recipe.batch_size, seed)
        start_s = self._fit(fresh)
        began = self._now()
        with apply_settings(loop.compute):
            for _ in loop.run():
                pass
            loop.read_losses()
        train_s = self._now() - began
        single, _ = self._evaluate(views=False)
        several, examine_s = self._evaluate(views=True)
        return Trained(start_s=start_s, train_s=train_s, single=single, views=several, examine_s=examine_s)

    def _fit(self, fresh: torch.nn.Module) -> float:
        """Seconds of the network's data-dependent initialisation, repeated on a network that isn't used."""
        inputs = self.loop.train_feed.inputs(torch.arange(min(2000, len(self.loop.train_feed))))
        began = self._now()
        if callable(initialize := getattr(fresh, "initialize", None)):
            initialize(*self.prepared.preprocess.to_model(inputs).values())
        return self._now() - began

    def _evaluate(self, *, views: bool) -> tuple[float, float]:
        """Accuracy, and the seconds that it took."""
        loop = self.loop
        feed = loop.val_feed
        began = self._now()
        with loop.use_averaged_weights(), apply_settings(loop.compute):
            batches = (inputs for inputs, _, _ in feed.in_order(EVALUATED))
            shown_views = loop.augment.views if views else None
            answers = infer(loop.compute, loop.preprocess, loop.task, batches, views=shown_views)
        took = self._now() - began
        return float((answers["probabilities"].argmax(1) == classes_of(feed.split)).mean()), took

    def _now(self) -> float:
        self._settle()
        return time.perf_counter()
