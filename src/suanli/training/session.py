"""A training made ready for its first step: it fits, it is planned, it is forecast; and made ready again with a
weaker plan when that fails on the way.

Nothing is written here but the plan in the cache directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from suanli.compute import plan as planning
from suanli.compute import planner
from suanli.compute.plan_cache import Store
from suanli.core.errors import DamagedFile, Diverged, MachineError, OutOfMemory, SuanliError
from suanli.core.registry import names
from suanli.core.types import Device, Json, Plan, Recipe, Trial
from suanli.data.cache import PreparedData
from suanli.machine import peak
from suanli.machine.device import is_out_of_memory
from suanli.parallel import group as distributed
from suanli.parallel.group import ALONE, Group
from suanli.training import checkpoint, utilization
from suanli.training.forecast import (
    Forecast,
    check_memory,
    estimate_memory,
    explain_out_of_memory,
    forecast,
    measure_step_s,
)
from suanli.training.loop import Loop
from suanli.training.setup import Setup

CHECKPOINTING = "activation_checkpointing"
UNPLANNED = ("named", planning.PLAIN)  # origins of plans that the user insists on
LOWER_RATE = 1 / 3  # of the recipe's, after it was too high


@dataclass(kw_only=True)
class Start:
    """What is trained, where, and how it is computed at present."""

    recipe: Recipe
    prepared: PreparedData
    device: Device
    cache: Path
    requested: str | Plan  # "auto", "none", names, or the plan of a run that goes on
    threads: int | None = None
    saved: checkpoint.Checkpoint | None = None
    more_epochs: float | None = None
    group: Group = ALONE
    balance: bool = False  # the shares of a batch follow the measured speed of each process
    shard: bool = False  # each process holds a part of the network

    loop: Loop = None  # type: ignore[assignment]  # made by `ready`
    plan: Plan = None  # type: ignore[assignment]
    first_plan: Plan = None  # type: ignore[assignment]  # before anything failed
    forecast: Forecast = None  # type: ignore[assignment]
    key: str = ""
    ceilings: peak.Ceilings | None = None  # as measured before; None: they weren't
    ideal_step_s: float | None = None  # that a step would take at the device's measured ceiling

    def ready(self) -> None:
        """A collective. Raises UsageError for a recipe that can't be trained and OutOfMemory for one that doesn't
        fit."""
        planning.check_threads(self.threads)
        if self.threads is None and not self.group.alone and self.device.type == "cpu":
            self.threads = distributed.threads(self.group)
        needed = self._ready_sharded() if self.shard else self._ready_whole()
        self.ceilings = peak.read_cached(self.device, self.cache)
        if self.ceilings is not None and not self.shard:
            self.ideal_step_s = utilization.ideal_step_s(self.loop, self.device, self.ceilings)
        timed = [t.step_s for t in self.plan.trials if t.kept and t.step_s is not None]
        self.forecast = forecast(self.loop, needed, timed[-1] if timed else None)

    def _ready_whole(self) -> int:
        """A collective: a loop on the network as a whole, by a plan that is measured on copies of it. Gives the memory
        that this takes, in bytes."""
        with explain_out_of_memory(self.device):
            setup = self._setup(fresh=self.saved is None)
        self.key = setup.key
        with explain_out_of_memory(self.device):
            plain = setup.trial(planning.plain(self.device, self.threads))
        self._put_back(plain, self.saved)
        steps = round(plain.full_size_steps_left)
        failed: OutOfMemory | None = None
        try:
            memory = check_memory(plain, self.device)
        except OutOfMemory as error:
            failed = error
        if any(self.group.each(failed is not None)):
            other = OutOfMemory("Another process has too little memory.", fix="Choose a smaller --batch-size.")
            memory, self.plan = self._smaller(setup, failed or other)
            if not self.group.alone:
                self.plan = _plan_from(self.group.of_first(asdict(self.plan)), self.device)
        else:
            del plain  # the planner wants the room
            self.plan = self._planned(setup, steps)
        self.first_plan = self.plan
        with explain_out_of_memory(self.device):
            self.loop = setup.loop(self.plan)
        self._put_back(self.loop, self.saved)
        if self.balance and not self.group.alone:
            self._share_by_speed(memory)
        return memory

    def _ready_sharded(self) -> int:
        """A collective: a loop on a network that is shared out. It may fit nowhere else, so nothing is tried on copies:
        the plan is the usual one, with recomputed activations where it needs too much memory otherwise. Gives what it
        takes, in bytes."""
        tries = ((), (CHECKPOINTING,)) if self.requested == "auto" else ((),)
        for extra in tries:
            with explain_out_of_memory(self.device):
                setup = self._setup(fresh=self.saved is None)
                found = planner.unmeasured(setup, self.requested, threads=self.threads, extra=extra)
                self.plan = self.first_plan = _plan_from(self.group.of_first(asdict(found)), self.device)
                self.loop = setup.loop(self.plan)
            self.key = setup.key
            del setup  # its memory is needed
            self._put_back(self.loop, self.saved)
            needed, refusal = estimate_memory(self.loop, self.device)
            if not any(self.group.each(refusal is not None)):
                return needed
            self.loop = None  # type: ignore[assignment]
            planner.free(self.device)
        raise refusal or OutOfMemory("Another process has too little memory.", fix="Choose a smaller --batch-size.")

    def _setup(self, *, fresh: bool) -> Setup:
        return Setup(self.recipe, self.prepared, self.device, fresh=fresh, group=self.group, shard=self.shard)

    def _planned(self, setup: Setup, steps: int) -> Plan:
        """The first process plans for all: they must compute alike."""
        if isinstance(self.requested, Plan):
            return self.requested
        found: Plan | None = None
        if self.group.first:
            with explain_out_of_memory(self.device):
                found = planner.plan(setup, self.requested, steps=steps, threads=self.threads, cache=self.cache)
        if self.group.alone:
            assert found is not None
            return found
        return _plan_from(self.group.of_first(asdict(found) if found else None), self.device)

    def _smaller(self, setup: Setup, error: OutOfMemory) -> tuple[int, Plan]:
        """A plan that fits where plain PyTorch doesn't: with half-precision activations, then with recomputed
        ones too. Raises `error` where none does, or where the user insists on another plan."""
        if self.requested != "auto":
            plan = self.requested if isinstance(self.requested, Plan) else None
            plan = plan or planning.named(str(self.requested), self.device, self.threads)
            return check_memory(setup.trial(plan), self.device), plan
        usual = planner.short_list(setup, self.threads)
        for extra in ((), (CHECKPOINTING,)):
            plan = replace(usual, speedups=planning.in_order((*usual.speedups, *extra)))
            try:
                return check_memory(setup.trial(plan), self.device), plan
            except (OutOfMemory, MachineError):
                continue
        raise error

    def _share_by_speed(self, memory_bytes: int) -> None:
        """A collective: all compute at once, as they will in training, without waiting for each other."""
        self.group.wait()
        rates = self.group.each(self.loop.batch_size / measure_step_s(self.loop, memory_bytes))
        self.group.shares = tuple(rate / sum(rates) for rate in rates)

    def _put_back(self, loop: Loop, saved: checkpoint.Checkpoint | None) -> None:
        if saved is not None:
            loop.restore(saved)
        if self.more_epochs is not None and (saved is None or loop.progress.step >= loop.steps):
            loop.extend(self.more_epochs)

    # --- when a plan fails on the way ---

    def fall_back(self, error: Exception, checkpoints: Path) -> str | None:
        """One step back from a plan that has failed with `error`, from the last good state: its step is then the
        loop's. Gives what was changed, in words; None where no change can help, or the user wants no other plan."""
        if self.plan.origin in UNPLANNED or (isinstance(error, SuanliError) and not isinstance(error, Diverged)):
            return None
        if not self.group.alone and not isinstance(error, Diverged):
            return None  # what failed here did not fail in every process
        risk, what = _risk(error)
        found = planner.weaker(self.plan, risk)
        if found is not None:
            plan, dropped = found
            change = f"without {dropped}"
            plan = replace(plan, dropped={**plan.dropped, dropped: f"it failed in training: {what}"})
            if risk != "numerics":  # a rate that is too high gives NaN with any plan
                Store(self.cache, self.key, self.threads).refuse({dropped: f"it failed in training: {what}"})
        elif risk == "memory" and CHECKPOINTING not in self.plan.speedups and CHECKPOINTING in names("speedups"):
            plan = replace(self.plan, speedups=planning.in_order((*self.plan.speedups, CHECKPOINTING)))
            change = f"with {CHECKPOINTING}"
        else:
            return None
        self.group.wait()  # the first process may still be writing
        try:
            saved = checkpoint.read_newest(checkpoints)
        except DamagedFile:
            return None
        self.loop = None  # type: ignore[assignment]  # its memory is needed
        planner.free(self.device)
        try:
            self.loop = self._setup(fresh=saved is None).loop(plan)
        except MachineError:  # checkpointing has nothing to act on
            self.loop = self._setup(fresh=saved is None).loop(self.plan)
            return None
        self._put_back(self.loop, saved)
        self.plan = plan
        return f"{what}; going on from step {self.loop.progress.step} {change}"

    def begin_again(self) -> str:
        """From the first step with a lower rate; gives that in words. The plan is again what it was at first: it
        was not to blame."""
        self.recipe = self.recipe.model_copy(update={"lr": self.recipe.lr * LOWER_RATE})
        self.plan, self.saved = self.first_plan, None
        self.loop = None  # type: ignore[assignment]  # its memory is needed
        planner.free(self.device)
        self.loop = self._setup(fresh=True).loop(self.plan)
        return f"beginning again at a learning rate of {self.recipe.lr:.2g}"


def _plan_from(values: Mapping[str, Json], device: Device) -> Plan:
    """The first process's plan, for this one's device."""
    trials = tuple(Trial(**t) for t in values["trials"])
    return Plan(**{**values, "device": device.torch_name, "speedups": tuple(values["speedups"]), "trials": trials})


def _risk(error: Exception) -> tuple[str, str]:
    """Which risk of a speedup has come true, and what to call it."""
    if is_out_of_memory(error):
        return "memory", "memory ran out"
    if isinstance(error, Diverged):
        return "numerics", error.message.rstrip(".")
    return "backend", planner.first_line(error)
