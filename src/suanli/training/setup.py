"""What is trained, before it is decided how to compute it: network, optimizer, and splits on the device.

`Setup.loop` makes the loop that trains; `Setup.trial` makes loops on copies, as many as the planner needs.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch

from suanli.compute.plan import apply_plan
from suanli.core.console import plural, say
from suanli.core.errors import UsageError
from suanli.core.registry import load
from suanli.core.types import Device, Plan, Pretrained, Recipe, Step
from suanli.data import loader
from suanli.data.cache import PreparedData
from suanli.data.loader import Feed, mix
from suanli.machine import peak
from suanli.models import adapters, feature_maps, weights
from suanli.models import build as building
from suanli.models.layers import Head
from suanli.parallel import fsdp
from suanli.parallel.group import ALONE, Group
from suanli.parallel.sync_batchnorm import batch_norms, synchronize_batch_norms
from suanli.training.frozen_head import FrozenHead
from suanli.training.loop import Loop

INITIALIZE_EXAMPLES = 2000  # training inputs that a data-dependent initialisation sees

# What decides how long a step takes; a plan holds for every recipe that agrees in these.
_COMPUTED = (
    *("model", "model_args", "task", "task_args", "augment", "batch_size", "accumulate", "optimizer", "optimizer_args"),
    *("backbone_lr_scale", "clip_norm", "ema_decay"),
)
# Left out of a key where they have their defaults, so that plans of before are still found.
_COMPUTED_TOO = ("layer_lr_decay", "unfreeze_epochs", "fixed_norms", "lora_rank", "final_augment")


class Setup:
    """Raises UsageError for a name or argument in the recipe that doesn't exist or fit.

    With `fresh=False` a checkpoint will replace every weight, so none is loaded or initialised from data. `given` are
    the weights that the recipe names, where they are found already. `frozen` is the head to begin with: what fitted it
    has said already which weights were taken. With `shard` the network is sharded over the processes: then making a
    Setup is a collective, and there are no trials.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: PreparedData,
        device: Device,
        *,
        fresh: bool = True,
        group: Group = ALONE,
        shard: bool = False,
        given: Pretrained | None = None,
        frozen: FrozenHead | None = None,
    ) -> None:
        self.group, self.sharded = group, shard
        self.recipe, self.prepared, self.device = recipe, prepared, device
        if shard:
            refuse_sharded(recipe)
        settled = type(prepared.task).of(prepared.task.classes, recipe.task_args)
        self.task = settled.fit(prepared.splits["train"].targets)
        module = self._build_module(on_meta=shard and not group.is_first)
        model = building.resolve(recipe.model)
        self.head = building.head_of(module, model)
        self._new_layers: Head = self.head  # that no weights of other data are for
        if model.backbone:
            self._new_layers = tuple(name for name, _ in module.named_children() if name != model.backbone)
        if fresh and recipe.weights is not None:
            found = given or weights.find(recipe.weights)
            other_classes = found.classes is not None and found.classes != prepared.task.classes
            report = feature_maps.load_weights(module, found.file, self.head, new_head=other_classes, model=model)
            if frozen is None:
                say(str(report))
        if fresh and frozen is not None:
            frozen.load_into(module.state_dict())
        if recipe.lora_rank:
            self._add_adapters(module, announce=fresh)
        fits = device.type != "cpu" and loader.fits(prepared.splits["train"], device)
        self.can_reside = all(group.gather(fits))  # or one plan would not do for all
        self._feed = cache(lambda split, resident: Feed(prepared.splits[split], device, resident=resident))
        if not shard:
            module.to(device.torch_name)
        initialize = getattr(module, "initialize", None)
        if fresh and recipe.weights is None and callable(initialize):
            train: Feed = self._feed("train", False)
            spread = np.random.default_rng(recipe.seed).permutation(len(train))[:INITIALIZE_EXAMPLES]
            inputs = prepared.preprocess.to_model(train.inputs(torch.from_numpy(spread)))
            initialize(*inputs.values())
        if shard:  # only now, and from main memory: no device has to hold all of it
            fsdp.shard(module, group, torch.device(device.torch_name))
        self.module = module
        self.optimizer: torch.optim.Optimizer = load("optimizers", recipe.optimizer).build(
            list(module.named_parameters()),
            head=self._new_layers,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            backbone_lr_scale=recipe.backbone_lr_scale,
            layer_lr_decay=recipe.layer_lr_decay,
            **recipe.optimizer_args,
        )

    def _add_adapters(self, module: torch.nn.Module, *, announce: bool) -> None:
        count = adapters.add_adapters(
            module, self.recipe.lora_rank, head=self._new_layers, seed=mix(self.recipe.seed, 5)
        )
        learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if announce:
            what = plural(count, "matrix", "matrices")
            say(f"adapters of rank {self.recipe.lora_rank} for {what}: {learning:,} values learn")

    def _build_module(self, *, on_meta: bool) -> torch.nn.Module:
        """A collective where the network is sharded. The first process builds it with values, since the memory of a
        host has room for one; the others build it on the meta device, unless the two then differ."""
        torch.manual_seed(mix(self.recipe.seed, 0))
        build = partial(building.build, self.recipe, self.prepared.preprocess, self.task)
        module = build(on_meta=on_meta)
        if not self.sharded:
            return module
        facts = building.describe_tensors(module)
        first = self.group.broadcast(facts)
        return build() if on_meta and facts != first else module

    @property
    def step(self) -> Step:
        """How plain PyTorch computes it."""
        return Step(
            model=self.module,
            optimizer=self.optimizer,
            memory_format=torch.contiguous_format,  # or the layout of the cached rows would go on through the network
            micro_batches=self.recipe.accumulate,
            reads_cache=True,
            can_reside=self.can_reside,
            distributed=not self.group.is_alone,
            communicates=not self.group.is_alone and bool(batch_norms(self.module)),
            sharded=self.sharded,
            unfreezes=self.recipe.unfreeze_epochs > 0,
        )

    def loop(self, plan: Plan) -> Loop:
        """A collective: the loop that trains the network itself. Only one is allowed, as a speedup may change the
        network for good."""
        if not self.group.is_alone:
            synchronize_batch_norms(self.module, self.group)
        return self._loop(self.step, plan)

    def trial(self, plan: Plan) -> Loop:
        """A loop that trains a copy from the same start, for measuring, with pictures of full size."""
        model, optimizer = copy.deepcopy((self.module, self.optimizer))
        return self._loop(replace(self.step, model=model, optimizer=optimizer), plan, measuring=True)

    def _loop(self, plain: Step, plan: Plan, *, measuring: bool = False) -> Loop:
        step = apply_plan(plan, plain, self.device)
        return Loop(
            recipe=self.recipe,
            step=step,
            plain=plain,
            plan=plan,
            task=self.task,
            preprocess=self.prepared.preprocess,
            head=self._new_layers,
            train=self._feed("train", step.resident),
            val=self._feed("val", step.resident and loader.fits(self.prepared.splits["val"], self.device)),
            device=self.device,
            group=self.group,
            full_size=measuring,
            local_only=measuring,
        )

    @property
    def family(self) -> str:
        """A digest of the network and the machine, whatever the sizes."""
        facts = [self.recipe.model, peak.fingerprint(self.device)]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=10).hexdigest()

    @property
    def key(self) -> str:
        """A digest of all that decides which plan is the best: what is computed, on what, with which software."""
        recipe, usual = self.recipe.model_dump(mode="json"), Recipe().model_dump(mode="json")
        facts: list[object] = [
            {name: recipe[name] for name in _COMPUTED},
            [self.prepared.preprocess.kind, self.prepared.preprocess.model_args, self.prepared.preprocess.input_shape],
            self.task.model_args,
            peak.fingerprint(self.device),
        ]
        if changed := {name: recipe[name] for name in _COMPUTED_TOO if recipe[name] != usual[name]}:
            facts.append(changed)
        if not self.group.is_alone:  # a share of the batch, and no speedup that the processes have no use for
            facts.append(self.group.size)
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def refuse_sharded(recipe: Recipe) -> None:
    """Raise UsageError for what a sharded network can't learn by."""
    for field, reason in (
        ("unfreeze_epochs", "which of its weights get gradients is decided once, when it is divided"),
        ("lora_rank", "an adapter needs the whole weight that it is added to"),
    ):
        if getattr(recipe, field):
            raise UsageError(
                f"{field} isn't for a sharded network: {reason}.", fix=f"Train without --shard, or set {field}=0."
            )
