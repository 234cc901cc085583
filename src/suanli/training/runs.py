"""The three ways into a training: a new run, a run that is resumed, and a process that joins a run which has begun.

This file decides what is trained, where, and by how many processes; `trainer.py` trains it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.compute.plan import check_request, plan_of_names
from suanli.core.console import say
from suanli.core.errors import Interrupted, MachineError, UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.registry import load
from suanli.core.run import FINISHED, RUNS, Run, is_run, refuse_occupied
from suanli.core.types import AnyPath, Device, Json, Plan, Recipe, Tracker
from suanli.data.cache import PreparedData
from suanli.machine.device import detect, environment
from suanli.machine.gpus import gpus
from suanli.models.model_folder import refuse_foreign_code
from suanli.parallel import launch, preflight, submission
from suanli.parallel.group import Group, join_group, process_place, too_many_processes
from suanli.training import checkpoint
from suanli.training.frozen_head import FILE as FROZEN
from suanli.training.frozen_head import FrozenHead
from suanli.training.options import ComputeOptions, RecipeOptions, TrainerOptions
from suanli.training.prepare import DataOptions, move_data, resolve_run
from suanli.training.session import Session, TrainingSpec
from suanli.training.setup import refuse_sharded
from suanli.training.start import Start, keep_weights, prepare_start
from suanli.training.trainer import Trainer

ENDING_S = 30.0  # that an earlier process of the same run may take to end


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The device and the processes that compute, as the options and this machine decide."""

    options: ComputeOptions
    device: Device
    group: Group
    count: int  # processes that this one starts to train; 1: it trains itself
    shard: bool  # the network is sharded now
    shard_requested: bool  # it is sharded wherever there are several processes
    trackers: Sequence[type[Tracker]]

    def prepare_start(
        self, data: DataOptions, learned: RecipeOptions, *, out: AnyPath | None, trust_code: bool, begun: Run | None
    ) -> Start:
        """A collective: as `start.prepare_start`."""
        return prepare_start(
            data,
            learned,
            device=self.device,
            group=self.group,
            threads=self.options.threads,
            out=out,
            trust_code=trust_code,
            begun=begun,
        )

    def train(self, session: Session, run: Run, options: TrainerOptions) -> None:
        ours = self.options
        options = replace(
            options,
            trackers=self.trackers,
            checkpoint_every_s=ours.checkpoint_every_s,
            hang_s=ours.hang_timeout_s,
            shard=self.shard_requested,
        )
        with _resumable(run):
            Trainer(session, run, options).train()

    def start_processes(self, run: Run, data: DataOptions, *, resumed: bool, **more: object) -> None:
        """Train `run` by processes of this machine, each `suanli train RUN`."""
        names = ("device", "speedups", "threads", "balance", "hang_timeout_s", "checkpoint_every_s", "track")
        values = {name: getattr(self.options, name) for name in names}
        values["shard"] = self.shard if self.shard_requested or resumed else None
        values |= {"data_dir": data.data_dir, "cache_dir": data.cache_dir} | more
        launch.launch_training(run, self.count, submission.train_arguments(values), restarts=self.options.max_restarts)


@contextmanager
def _resumable(run: Run) -> Iterator[None]:
    """Reports a Ctrl-C that the trainer doesn't handle: one while it isn't training, or the second one."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("Stopped.", fix=f"Go on with: suanli train {run.path}") from error


def find_resources(options: ComputeOptions, run: Run | None) -> Resources:
    """A collective, where others started this process. `run` is the one that is resumed. Raises UsageError and
    MachineError for what this machine can't do."""
    device = detect(_own_device(options.device))
    group = join_group(device.torch_name)
    if not group.is_alone and options.nproc is not None:
        raise UsageError("--nproc starts processes, and this is one of several.", fix="Leave it out.")
    count = launch.process_count(options.nproc, device)
    if count > 1 and ":" in options.device:
        raise UsageError(f"{count} processes can't share {options.device}.", fix="Use --device cuda: each takes a GPU.")
    check_request(options.speedups, device, options.threads)
    requested = bool(run is not None and run.summary.get("shard")) if options.shard is None else options.shard
    shard = requested and (count > 1 or not group.is_alone)
    if requested and not shard:
        _check_one_process(options.nproc, resumed=run is not None)
    if shard and options.balance:
        raise UsageError(
            "--balance measures each process alone, and with --shard none can compute alone.", fix="Leave one out."
        )
    return Resources(
        options=options,
        device=device,
        group=group,
        count=count,
        shard=shard,
        shard_requested=requested,
        trackers=_find_trackers(options.track if group.is_first else ()),
    )


# --- the three ways --------------------------------------------------------------------------


def start_run(
    data: DataOptions, learned: RecipeOptions, resources: Resources, *, out: AnyPath | None, trust_code: bool
) -> Run:
    """Train a new run in `out` (None: a new folder below `runs/`). What can't be trained leaves no folder behind."""
    started = time.perf_counter()
    if out is not None:
        refuse_occupied(Path(out).expanduser())
    ready = resources.prepare_start(data, learned, out=out, trust_code=trust_code, begun=None)
    data, recipe, prepared = ready.data, ready.recipe, ready.splits
    about = data.describe(prepared)
    group, count = resources.group, resources.count
    if resources.shard:
        refuse_sharded(recipe)
    if count > 1:
        if count > recipe.batch_size:
            raise too_many_processes(count, recipe.batch_size)
        run = Run.create(prepared.name, out, recipe, about, environment(resources.device))
        keep_weights(run, recipe, ready.given)
        run.write("summary.json", {"status": "running", "wanted_score": learned.target_accuracy})
        if ready.head is not None:
            run.write(FROZEN, ready.head.to_json())
        resources.start_processes(run, data, resumed=False, trust_code=True)  # its code was named here
        return run
    processes = _preflight(resources, recipe, prepared, Path(out or RUNS))
    session = Session(replace(training_spec(recipe, prepared, data, resources), given=ready.given, frozen=ready.head))
    options = TrainerOptions(
        target_score=learned.target_accuracy, processes=processes, prepare_s=time.perf_counter() - started
    )
    path: str | None = None
    if group.is_first:
        path = str(Run.create(prepared.name, out, recipe, about, environment(resources.device)).path)
    run = Run(group.broadcast(path), writes=group.is_first)
    with run.lock():
        keep_weights(run, recipe, ready.given)
        resources.train(session, run, options)
    return run


def resume_run(
    run: Run,
    data: DataOptions,
    resources: Resources,
    *,
    given: Sequence[str],
    more_epochs: float | None,
    moved_to: AnyPath | None,
    trust_code: bool,
) -> Run:
    """Go on with a run: from its last checkpoint, or, where it is finished, for `more_epochs`. Of `data` only the two
    directories count; `moved_to` is where the data is now. `given` are the options that the user gave and that a run
    can't change."""
    started = time.perf_counter()
    run = Run(run.path, writes=resources.group.is_first)
    restarted = bool(resources.group.restarts)
    finished = run.summary.get("status") in FINISHED
    if restarted and not finished:
        more_epochs = None  # these have begun
    if restarted and finished and more_epochs is None:
        return run  # one of the processes died when all was done
    with _resumable(run), run.lock(ENDING_S if restarted else 0):
        _refuse_resuming(run, given, more_epochs, trust_code)
        own = DataOptions.of_run(run, subject=moved_to, data_dir=data.data_dir, cache_dir=data.cache_dir)
        if moved_to is not None:
            move_data(run, own, verb="train")
        if resources.count == 1:
            data = own
            _resume(run, data, resources, more_epochs, started=started)
    if resources.count > 1:
        resources.start_processes(run, data, resumed=True, more_epochs=more_epochs, trust_code=True)
    return run


def join_run(data: DataOptions, learned: RecipeOptions, resources: Resources, *, out: AnyPath, trust_code: bool) -> Run:
    """Go on with the run in `out`, which an earlier start of the same command has begun: a job that a cluster put back
    into its queue, or one of several processes that were started again."""
    run = Run(Run.open(out).path, writes=resources.group.is_first)
    ready = resources.prepare_start(data, learned, out=out, trust_code=trust_code, begun=run)
    if resources.group.restarts and run.summary.get("status") in FINISHED:
        return run  # one of the processes died when all was done
    _refuse_another(run, ready.recipe)
    with run.lock(ENDING_S):
        _resume(run, ready.data, resources, None)
    return run


def has_begun(out: AnyPath | None, group: Group) -> bool:
    """A collective: whether this process was started again, by a launcher or a cluster, after its run had begun."""
    again = process_place() is not None or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return again and bool(group.broadcast(out is not None and is_run(out)))


# --- steps that they share -------------------------------------------------------------------


def _resume(
    run: Run, data: DataOptions, resources: Resources, more_epochs: float | None, *, started: float | None = None
) -> None:
    """A collective: train a run from its newest checkpoint. `started`: when preparing began, to keep in the summary."""
    recipe = run.recipe
    # One that has just begun was announced by the process that began it.
    announce = resources.group.is_alone or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))
    prepared = resolve_run(run, data, recipe, verb="train", announce=announce)
    processes = _preflight(resources, recipe, prepared, run.path)
    spec = training_spec(recipe, prepared, data, resources)
    saved = checkpoint.read_newest(run.checkpoints)
    steps = resources.group.gather(None if saved is None else saved.step)
    if len(set(steps)) > 1:
        raise MachineError(
            f"The processes see different checkpoints of {run.path}: of steps {', '.join(map(str, steps))}.",
            fix="Keep the run on storage that all hosts share.",
        )
    summary = run.summary
    session = Session(
        replace(
            spec,
            requested=plan_to_resume(summary, resources),
            checkpoint=saved,
            more_epochs=more_epochs,
            frozen=FrozenHead.of_run(run),
        )
    )
    options = TrainerOptions(
        target_score=summary.get("wanted_score"),
        processes=processes,
        prepare_s=None if started is None else time.perf_counter() - started,
        earlier_s=summary.get("seconds", {}).get("train", 0.0),
        fallbacks=summary.get("fallbacks", []),
    )
    resources.train(session, run, options)


def training_spec(
    recipe: Recipe, prepared: PreparedData, data: DataOptions, resources: Resources, plan: str | Plan | None = None
) -> TrainingSpec:
    """`plan` replaces the speedups that the user asked for."""
    return TrainingSpec(
        recipe=recipe,
        prepared=prepared,
        device=resources.device,
        cache=cache_dir_of(data.cache_dir),
        requested=plan or resources.options.speedups,
        threads=resources.options.threads,
        group=resources.group,
        balance=resources.options.balance,
        shard=resources.shard,
    )


def _preflight(resources: Resources, recipe: Recipe, prepared: PreparedData, folder: Path) -> dict[str, Json] | None:
    """A collective: what the processes that train together know of each other. None: there is one."""
    if resources.group.is_alone:
        return None
    return preflight.check(
        resources.group,
        resources.device,
        folder=folder,
        recipe=recipe.digest,
        data=prepared.digest,
        shard=resources.shard,
    )


def plan_to_resume(summary: Mapping[str, Json], resources: Resources) -> str | Plan:
    """The plan that the run began with, unless the user names another: other ways of computing round differently.
    Raises MachineError for a speedup that this machine can't use."""
    before, speedups = summary.get("plan"), resources.options.speedups
    if speedups != "auto" or before is None:
        return speedups
    threads = resources.options.threads
    processes_before = len((summary.get("processes") or {}).get("each", [None]))
    if threads is None and processes_before == resources.group.size:
        threads = before.get("threads")
    plan = plan_of_names(",".join(before["speedups"]) or "none", resources.device, threads)
    return replace(plan, origin=before.get("origin", plan.origin), dropped=before.get("dropped", {}))


def _own_device(device: str) -> str:
    """Of several processes on one machine each has a GPU of its own."""
    here = process_place()
    if here is None or device not in ("auto", "cuda"):
        return device
    visible = [gpu.torch_name for gpu in gpus() if gpu.torch_name and gpu.torch_name.startswith("cuda")]
    if not visible:
        return device
    return "cuda:0" if len(visible) == 1 else f"cuda:{here.local_rank}"  # one: it was given to this process alone


def _find_trackers(names: Sequence[str]) -> list[type[Tracker]]:
    trackers = []
    for name in names:
        tracker: type[Tracker] = load("trackers", name)
        reason = tracker.why_not()
        if reason is not None:
            raise UsageError(f"The tracker {name!r} needs its package: {reason}", fix="Or leave --track out.")
        trackers.append(tracker)
    return trackers


# --- what is refused -------------------------------------------------------------------------


def _check_one_process(nproc: str | int | None, *, resumed: bool) -> None:
    """One process can't shard a network. Raises UsageError where the user asked for no more than one."""
    if nproc in (None, "1", 1) and process_place() is None and not resumed:
        raise UsageError("--shard divides a network between processes, and this is one.", fix="Add --nproc 2, or more.")
    say("there is one process, so the network is not sharded")


def _refuse_another(run: Run, recipe: Recipe) -> None:
    before = run.recipe
    if any(fallback.get("began_again") for fallback in run.summary.get("fallbacks", [])):
        before = before.model_copy(update={"lr": recipe.lr})  # suanli lowered it
    if before.digest != recipe.digest:
        raise UsageError(f"{run.path} is a run with another recipe.", fix="Choose a new --out, or the same options.")
    if run.summary.get("status") in FINISHED:
        raise UsageError(f"{run.path} is finished.", fix="Choose a new --out.")


def _refuse_resuming(run: Run, given: Sequence[str], more_epochs: float | None, trust_code: bool) -> None:
    if any((run.path / name).exists() for name in ("bench.json", "scaling.json")):
        raise UsageError(
            f"{run.path} holds the figures of a bench, and no training to go on with.",
            fix="Name a run of suanli train, or train anew on the data set.",
        )
    if given:
        raise UsageError(
            f"{run.path} is a run; it goes on with its own recipe, so {', '.join(sorted(given))} can't be changed.",
            fix="Leave these options out, or train anew on the data set.",
        )
    finished = run.summary.get("status") in FINISHED
    if finished and more_epochs is None:
        raise UsageError(
            f"{run.path} is finished.", fix=f"To train it further: suanli train {run.path} --more-epochs 5"
        )
    if more_epochs is not None and not finished:
        raise UsageError(
            "--more-epochs continues a finished run, and this one isn't.",
            fix=f"First let it finish: suanli train {run.path}",
        )
    if not trust_code:
        refuse_foreign_code(run.recipe.model, run.path)
