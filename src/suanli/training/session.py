"""A training that is ready for its next step: it fits the device, has a plan and a forecast. Where the plan fails on
the way, the session goes back to the last checkpoint with a weaker one.

Nothing is written here but the plan in the cache directory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter

from suanli.compute import planner
from suanli.compute.plan import PLAIN, check_threads, plain_plan, plan_of_names, sort_speedups, usable_speedups
from suanli.compute.plan_cache import PlanCache
from suanli.compute.plan_trial import first_line, free_memory
from suanli.compute.step_runner import AppliedSettings
from suanli.core.errors import DamagedFile, Diverged, MachineError, OutOfMemory, SuanliError
from suanli.core.registry import names
from suanli.core.types import Device, Plan, Pretrained, Recipe
from suanli.data.cache import PreparedData
from suanli.machine import peak
from suanli.machine.device import cores, is_out_of_memory
from suanli.parallel import group as distributed
from suanli.parallel.group import ALONE, Group
from suanli.training import checkpoint, utilization
from suanli.training.diagnose import Facts
from suanli.training.forecast import check_memory, estimate_memory, explain_out_of_memory, forecast, measure_step_s
from suanli.training.frozen_head import FrozenHead
from suanli.training.head_fitting import fit_for_all
from suanli.training.live_plan import MANY_STEPS, LivePlan, can_change
from suanli.training.loop import Loop
from suanli.training.setup import Setup

CHECKPOINTING = "activation_checkpointing"
UNPLANNED = ("named", PLAIN)  # origins of plans that the user insists on
LOWER_RATE = 1 / 3  # of the recipe's, after it was too high


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What to train, on which device, and how to compute it."""

    recipe: Recipe
    prepared: PreparedData
    device: Device
    cache: Path
    requested: str | Plan  # "auto", "none", names, or the plan of a run that is resumed
    threads: int | None = None
    checkpoint: checkpoint.Checkpoint | None = None  # to go on from
    more_epochs: float | None = None
    group: Group = ALONE
    balance: bool = False  # a process's share of a batch follows its measured speed
    shard: bool = False  # each process holds a part of the network
    given: Pretrained | None = None  # the weights of the recipe, where they are found already
    frozen: FrozenHead | None = None  # where it is fitted already; None: it is fitted now, where the recipe wants one


class Session:
    """Opening one is a collective. Raises UsageError for a recipe that can't be trained and OutOfMemory for one that
    doesn't fit."""

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec, self.recipe, self.group, self.device = spec, spec.recipe, spec.group, spec.device
        check_threads(spec.threads)
        self.threads = spec.threads
        if self.threads is None and not self.group.is_alone and self.device.type == "cpu":
            self.threads = distributed.threads_per_process(self.group)
        self.frozen = spec.frozen or self._fit_head()
        self._loop: Loop | None = None
        self._live: LivePlan | None = None  # None: the plan stays
        self._race_steps = 0  # in which plans may race
        self.plan, needed_bytes, self.key = self._open_sharded() if spec.shard else self._open_whole()
        self._first_plan = self.plan  # before anything failed
        self.ceilings = peak.read_cached(self.device, spec.cache)  # None: they weren't measured
        self.ideal_step_s: float | None = None  # that a step would take at the device's measured ceiling
        if self.ceilings is not None and not spec.shard and self.loop.steps:
            self.ideal_step_s = utilization.ideal_step_s(self.loop, self.device, self.ceilings)
        timed = [t.step_s for t in self.plan.trials if t.kept and t.step_s is not None]
        step_s = None if self.loop.steps else 0.0
        self.forecast = forecast(self.loop, needed_bytes, timed[-1] if timed else step_s)

    @property
    def loop(self) -> Loop:
        assert self._loop is not None, "there is no loop between two plans"
        return self._loop

    @property
    def position(self) -> tuple[int, str]:
        """The step and the phase in it; other threads may ask at any time."""
        loop = self._loop
        return (0, "start") if loop is None else (loop.progress.step, loop.phase)

    def _fit_head(self) -> FrozenHead | None:
        """A collective: the head that the recipe wants to begin with."""
        if not self.recipe.frozen_views or self.spec.checkpoint is not None:
            return None
        spec = self.spec
        return fit_for_all(self.group, self.recipe, spec.prepared, self.device, spec.cache, given=spec.given)

    def _open_whole(self) -> tuple[Plan, int, str]:
        """A collective: a loop on the network as a whole, by a plan that is measured on copies of it. Gives the plan,
        the memory that it takes in bytes, and the key of the plan in the cache."""
        with explain_out_of_memory(self.device):
            setup = self._setup(fresh=self.spec.checkpoint is None)
        plan, needed_bytes = self._choose_plan(setup)
        if self._may_change(plan):
            with explain_out_of_memory(self.device):
                steps = 0 if isinstance(self.spec.requested, Plan) else self._race_steps
                self._live = LivePlan(setup, plan, cache=self.spec.cache, threads=self.threads, race_steps=steps)
        with explain_out_of_memory(self.device):
            self._loop = setup.loop(plan)
        self._restore(self._loop, self.spec.checkpoint)
        if self.spec.balance and not self.group.is_alone:
            self._share_by_speed(needed_bytes)
        return plan, needed_bytes, setup.key

    def _may_change(self, plan: Plan) -> bool:
        """Whether the training may go over to another plan between two steps."""
        return self.group.is_alone and plan.origin not in UNPLANNED and can_change(plan, self.device)

    def _choose_plan(self, setup: Setup) -> tuple[Plan, int]:
        """A collective: the plan, and the memory that it takes in bytes."""
        with explain_out_of_memory(self.device):
            plain = setup.trial(plain_plan(self.device, self.threads))
        self._restore(plain, self.spec.checkpoint)
        if not plain.steps:  # the head alone is trained, and that is done
            return plain.plan, 0
        steps = round(plain.full_size_steps_left)
        self._race_steps = plain.costs.equal_steps(
            plain.progress.step, min(plain.steps, plain.progress.step + MANY_STEPS)
        )
        refusal: OutOfMemory | None = None
        try:
            needed_bytes = check_memory(plain, self.device)
        except OutOfMemory as error:
            refusal = error
        if not any(self.group.gather(refusal is not None)):
            del plain  # the planner needs its memory
            return self._plan(setup, steps), needed_bytes
        other = OutOfMemory("Another process has too little memory.", fix="Choose a smaller --batch-size.")
        plan, needed_bytes = self._plan_smaller(setup, refusal or other)
        return self._share(plan), needed_bytes

    def _plan(self, setup: Setup, steps: int) -> Plan:
        """A collective: the first process plans for all, since they must compute alike."""
        spec = self.spec
        if isinstance(spec.requested, Plan):
            return spec.requested
        plan: Plan | None = None
        if self.group.is_first:
            with explain_out_of_memory(self.device):
                plan = planner.plan(
                    setup,
                    spec.requested,
                    steps=steps,
                    threads=self.threads,
                    cache=spec.cache,
                    races_in_training=self.group.is_alone and self.device.type == "cpu",
                )
        return self._share(plan)

    def _plan_smaller(self, setup: Setup, error: OutOfMemory) -> tuple[Plan, int]:
        """A plan that fits where plain PyTorch doesn't, and its memory in bytes: with half-precision activations, then
        with recomputed ones too. Raises `error` where none fits, or where the user insists on another plan."""
        requested = self.spec.requested
        if requested != "auto":
            named = requested if isinstance(requested, Plan) else None
            plan = named or plan_of_names(str(requested), self.device, self.threads)
            return plan, check_memory(setup.trial(plan), self.device)
        usual = planner.short_list(setup, self.threads, self.spec.cache)
        for extra in ((), (CHECKPOINTING,)):
            plan = replace(usual, speedups=sort_speedups((*usual.speedups, *extra)))
            try:
                return plan, check_memory(setup.trial(plan), self.device)
            except (OutOfMemory, MachineError):
                continue
        raise error

    def _open_sharded(self) -> tuple[Plan, int, str]:
        """As `_open_whole`, for a sharded network. It may fit nowhere else, so nothing is tried on copies: the plan is
        the usual one, with recomputed activations where it needs too much memory otherwise."""
        tries = ((), (CHECKPOINTING,)) if self.spec.requested == "auto" else ((),)
        for extra in tries:
            with explain_out_of_memory(self.device):
                setup = self._setup(fresh=self.spec.checkpoint is None)
                unmeasured = planner.plan_without_trials(
                    setup, self.spec.requested, threads=self.threads, cache=self.spec.cache, extra=extra
                )
                plan = self._share(unmeasured)
                self._loop = setup.loop(plan)
            key = setup.key
            del setup  # its memory is needed
            self._restore(self._loop, self.spec.checkpoint)
            needed_bytes, refusal = estimate_memory(self._loop, self.device)
            if not any(self.group.gather(refusal is not None)):
                return plan, needed_bytes, key
            self._free()
        raise refusal or OutOfMemory("Another process has too little memory.", fix="Choose a smaller --batch-size.")

    def _setup(self, *, fresh: bool) -> Setup:
        return Setup(
            self.recipe,
            self.spec.prepared,
            self.device,
            fresh=fresh,
            group=self.group,
            shard=self.spec.shard,
            given=self.spec.given,
            frozen=self.frozen,
        )

    def _share(self, plan: Plan | None) -> Plan:
        """A collective: the first process's plan, for this one's device."""
        if self.group.is_alone:
            assert plan is not None
            return plan
        values = self.group.broadcast(asdict(plan) if plan else None)
        return replace(TypeAdapter(Plan).validate_python(values), device=self.device.torch_name)

    def _share_by_speed(self, memory_bytes: int) -> None:
        """A collective: all compute at once, as they will in training, without waiting for each other."""
        self.group.barrier()
        rates = self.group.gather(self.loop.batch_size / measure_step_s(self.loop, memory_bytes))
        self.group.shares = tuple(rate / sum(rates) for rate in rates)
        self.loop.divide_batch()

    def _restore(self, loop: Loop, saved: checkpoint.Checkpoint | None) -> None:
        if saved is not None:
            loop.restore(saved)
        more_epochs = self.spec.more_epochs
        if more_epochs is not None and (saved is None or loop.progress.step >= loop.steps):
            loop.extend(more_epochs)

    def _free(self) -> None:
        self._loop = None  # its memory is needed
        free_memory(self.device)

    def facts(self) -> Facts:
        """What a diagnosis of the loop's times needs to know."""
        step, plan = self.loop.compute, self.plan
        possible = {n: s for n, s in usable_speedups(self.device)[0].items() if s.needless(step, self.device) is None}
        groups = {possible[n].group for n in plan.speedups if n in possible}
        untried = (n for n, s in possible.items() if n not in plan.speedups and n not in plan.dropped)
        sized = "image" in self.spec.prepared.preprocess.roles
        return Facts(
            device_type=self.device.type,
            batch_size=self.loop.batch_size,
            cores=max(1, cores() // self.group.local_size),
            processes=self.group.size,
            threads=plan.threads or torch.get_num_threads(),
            speedups=plan.speedups,
            dropped={n: r for n, r in plan.dropped.items() if n in possible},
            offered=tuple(n for n in untried if possible[n].group is None or possible[n].group not in groups),
            resident=step.resident or self.device.type == "cpu",
            augment=self.recipe.augment,
            share_of_ceiling=self._share_of_ceiling(),
            size_setting="preprocess.size" if sized else None,
        )

    def _share_of_ceiling(self) -> float | None:
        """Of what the device was measured to reach; None: it wasn't measured."""
        least = self.ideal_step_s
        progress = self.loop.progress
        if least is None or not progress.seconds:
            return None
        return least * self.loop.costs.total(0, progress.step) / progress.seconds

    # --- between two steps ---

    def start(self, settings: AppliedSettings) -> None:
        """The first step comes."""
        if self._live is not None:
            self._live.start(self.loop, settings)

    @property
    def is_racing(self) -> bool:
        """Whether plans race on the steps that come."""
        return self._live is not None and self._live.is_racing

    def after_step(self, seconds: float, settings: AppliedSettings) -> str | None:
        """The last step took so long. Goes over to another plan where that is faster, and says so in a sentence."""
        if self._live is None:
            return None
        news = self._live.after_step(self.loop, seconds, settings)
        self.plan = self._live.plan
        return news

    # --- when a plan fails on the way ---

    def fall_back(self, error: Exception, checkpoints: Path) -> str | None:
        """Replace a plan that failed with `error` by a weaker one, from the last good checkpoint. Gives what changed,
        in words; None where no change can help, or the user wants no other plan."""
        if self.plan.origin in UNPLANNED or (isinstance(error, SuanliError) and not isinstance(error, Diverged)):
            return None
        if not self.group.is_alone and not isinstance(error, Diverged):
            return None  # what failed here did not fail in every process
        self._live = None
        self.plan = replace(self.plan, speedups=self.loop.plan.speedups, threads=self.loop.plan.threads)
        risk, reason = _risk(error)
        weaker = self._weaken(risk, reason)
        if weaker is None:
            return None
        plan, change = weaker
        self.group.barrier()  # the first process may still be writing
        try:
            saved = checkpoint.read_newest(checkpoints)
        except DamagedFile:
            return None
        self._free()
        try:
            self._loop = self._setup(fresh=saved is None).loop(plan)
        except MachineError:  # checkpointing has nothing to act on
            self._loop = self._setup(fresh=saved is None).loop(self.plan)
            return None
        self._restore(self._loop, saved)
        self.plan = plan
        return f"{reason}; going on from step {self.loop.progress.step} {change}"

    def _weaken(self, risk: str, reason: str) -> tuple[Plan, str] | None:
        """A plan without the speedup that is most likely to blame, or with less memory; and the change in words."""
        weaker = planner.drop_risky_speedup(self.plan, risk)
        if weaker is not None:
            plan, dropped = weaker
            refusal = {dropped: f"it failed in training: {reason}"}
            if risk != "numerics":  # a rate that is too high gives NaN with any plan
                PlanCache(self.spec.cache, self.key, self.threads).refuse(refusal)
            return replace(plan, dropped={**plan.dropped, **refusal}), f"without {dropped}"
        if risk == "memory" and CHECKPOINTING not in self.plan.speedups and CHECKPOINTING in names("speedups"):
            speedups = sort_speedups((*self.plan.speedups, CHECKPOINTING))
            return replace(self.plan, speedups=speedups), f"with {CHECKPOINTING}"
        return None

    def begin_again(self) -> str:
        """Go back to the first step with a lower learning rate; gives that in words. The plan is the first one again:
        it was not to blame."""
        self.recipe = self.recipe.model_copy(update={"lr": self.recipe.lr * LOWER_RATE})
        self.plan, self._live = self._first_plan, None
        self._free()
        self._loop = self._setup(fresh=True).loop(self.plan)
        return f"beginning again at a learning rate of {self.recipe.lr:.2g}"


def _risk(error: Exception) -> tuple[str, str]:
    """Which risk of a speedup has come true, and what to call it."""
    if is_out_of_memory(error):
        return "memory", "memory ran out"
    if isinstance(error, Diverged):
        return "numerics", error.message.rstrip(".")
    return "backend", first_line(error)
