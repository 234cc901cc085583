"""train: prepared data and a recipe become a run with a model inside.

A run directory as the subject goes on where it was interrupted. This file decides what is trained and
where; how it goes is in `training.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from suanli.compute import plan
from suanli.core.console import say
from suanli.core.errors import DataError, MachineError, UsageError
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.registry import load
from suanli.core.run import FINISHED, RUNS, Run, is_run, refuse_inside, refuse_occupied
from suanli.core.settings import parse_duration
from suanli.core.types import AnyPath, Device, Json, Plan, Recipe, Tracker
from suanli.data.cache import PreparedData
from suanli.machine import device as hardware
from suanli.machine.gpus import gpus
from suanli.models.model_folder import refuse_foreign_code, weights_of
from suanli.parallel import launch, preflight, submission
from suanli.parallel.group import Group, join, place, too_many
from suanli.parallel.launch import RESTARTS
from suanli.training import budget, checkpoint
from suanli.training.prepare import DataOptions, resolve
from suanli.training.session import Start
from suanli.training.trainer import HANG_S, Training

ENDING_S = 30.0  # that the process before may take to end


@dataclass(frozen=True, kw_only=True)
class _Where:
    """What doesn't decide what is learned."""

    device: Device
    group: Group
    threads: int | None
    balance: bool
    hang_s: float
    shard: bool
    wished: bool  # to shard, should there be several processes


def train(
    data: AnyPath,
    *,
    model: str | None = None,
    weights: AnyPath | None = None,
    recipe: str | Recipe | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    settings: Mapping[str, Json] | None = None,
    target_accuracy: float | None = None,
    time_budget: str | float | None = None,
    device: str = "auto",
    speedups: str = "auto",
    threads: int | None = None,
    nproc: str | int | None = None,
    balance: bool = False,
    shard: bool | None = None,
    max_restarts: int = RESTARTS,
    hang_timeout_s: float = HANG_S,
    out: AnyPath | None = None,
    more_epochs: float | None = None,
    checkpoint_every_s: float = 60.0,
    track: Sequence[str] = (),
    input_column: str | None = None,
    label_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
    trust_code: bool = False,
) -> Run:
    """Train a model and keep everything about it in a run directory.

    `data` is a data set (see `prepare`), or the directory of a run that was interrupted: then
    training goes on from its last checkpoint, bit by bit as if it had not stopped (on a CPU).
    `more_epochs` continues a finished run. `settings` sets any field of the recipe. Two options choose network and
    epochs: `target_accuracy` (a fraction) the cheapest that is known to reach it on this data, and `time_budget`
    (seconds, or "5m") the best that is done by then. Raises
    Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved; Diverged when the loss is no
    longer finite; OutOfMemory with a batch size that would fit. `nproc` processes on this machine ("auto": one for
    each GPU) share every batch, and what is learned doesn't depend on how many they are; started by torchrun or srun,
    this process is one of those. `balance` gives each a share that follows its measured speed, and `shard` a part of
    the network, for one that doesn't fit a device (None: as the run did that goes on). `trust_code` lets a saved run
    name code that is not suanli's own; a `model` that is named here is run anyway.
    """
    started = time.perf_counter()
    chosen = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    changes: dict[str, Json] = {k: v for k, v in chosen.items() if v is not None} | dict(settings or {})
    target = hardware.detect(_own_device(device))
    group = join(target.torch_name)
    if not group.alone and nproc is not None:
        raise UsageError("--nproc starts processes, and this is one of several.", fix="Leave it out.")
    count = launch.processes(nproc, target)
    joint = count > 1
    if joint and ":" in device:
        raise UsageError(f"{count} processes can't share {device}.", fix="Use --device cuda: each takes a GPU.")
    wished = _remembered(data) if shard is None else shard
    shard = wished and (joint or not group.alone)
    if wished and not shard:
        _refuse_one(asked_for=nproc, remembered=is_run(data))
    if shard and balance:
        raise UsageError(
            "--balance measures each process alone, and with --shard none can compute alone.", fix="Leave one out."
        )
    where = _Where(
        device=target,
        group=group,
        threads=threads,
        balance=balance,
        hang_s=hang_timeout_s,
        shard=shard,
        wished=wished,
    )
    computing: dict[str, Json] = {"device": device, "speedups": speedups, "threads": threads, "balance": balance}
    computing |= {"hang_timeout_s": hang_timeout_s, "checkpoint_every_s": checkpoint_every_s, "track": track}
    computing |= {"shard": shard if wished or is_run(data) else None}

    def train_together(run: Run, **more: Json) -> None:
        places = {"data_dir": data_dir, "cache_dir": cache_dir}
        launch.train_together(run, count, submission.arguments(computing | places | more), restarts=max_restarts)

    wanted = _trackers(track if group.first else ())
    if is_run(data):
        given = [
            *changes,
            *(["recipe"] if recipe else []),
            *(["out"] if out else []),
            *(["weights"] if weights else []),
            *(["target_accuracy"] if target_accuracy is not None else []),
            *(["time_budget"] if time_budget is not None else []),
        ]
        given += [n for n, v in (("input_column", input_column), ("label_column", label_column)) if v]
        run = Run(Run.open(data).path, writes=group.first)
        again = bool(group.restarts)
        if again and run.summary.get("status") not in FINISHED:
            more_epochs = None  # it has begun
        if again and more_epochs is None and run.summary.get("status") in FINISHED:
            return run  # one of the processes died when all was done
        with run.lock(ENDING_S if again else 0):
            _refuse_reopening(run, sorted(given), more_epochs, trust_code)
            if not joint:
                options = DataOptions.of_run(run, data_dir=data_dir, cache_dir=cache_dir)
                training = _reopen(run, options, where, speedups, more_epochs)
                training.seconds["prepare"] = time.perf_counter() - started
                training.run(run, wanted, checkpoint_every_s)
        if joint:
            train_together(run, more_epochs=more_epochs, trust_code=trust_code)
        return run
    if more_epochs is not None:
        raise UsageError("--more-epochs continues a run.", fix="Name the directory of a run, not a data set.")
    again = place() is not None or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    begun = again and bool(group.of_first(out is not None and is_run(out)))
    if out is not None and not begun:
        refuse_occupied(Path(out).expanduser())
    refuse_inside(data, out)
    network, preprocess = _start_from(weights, changes, trust_code)
    options = DataOptions.of(
        data,
        input_column=input_column,
        label_column=label_column,
        data_dir=data_dir,
        cache_dir=cache_dir,
        max_bad=max_bad,
        preprocess=preprocess,
    )
    budget_s = None if time_budget is None else parse_duration(time_budget)
    full, prepared = resolve(options, recipe=recipe, settings=network | changes)
    if target_accuracy is not None or budget_s is not None:
        _refuse_deciding_twice(full, changes, target_accuracy, budget_s)
    if target_accuracy is not None:
        full = budget.choose_for_score(full, prepared, target_accuracy)
    if budget_s is not None and begun:
        full = Run.open(str(out)).recipe  # it was chosen when the run began
    elif budget_s is not None:
        if group.first:
            full = budget.choose_for_time(full, prepared, target, threads, budget_s - (time.perf_counter() - started))
        full = Recipe.model_validate(group.of_first(full.model_dump(mode="json")))
    about = prepared.to_json() | {"source": options.subject, "options": asdict(options)}
    environment = hardware.environment(target)
    if joint:
        if count > full.batch_size:
            raise too_many(count, full.batch_size)
        run = Run.create(prepared.name, out, full, about, environment)
        run.write("summary.json", {"status": "running", "wanted_score": target_accuracy})
        train_together(run, trust_code=True)  # its code was named here
        return run
    if begun:
        # Started again by whoever starts the processes, with the same words: a job that was put back into its queue.
        run = Run(Run.open(str(out)).path, writes=group.first)
        if group.restarts and run.summary.get("status") in FINISHED:
            return run  # one of the processes died when all was done
        _refuse_another(run, full)
        with run.lock(ENDING_S):
            training = _reopen(run, options, where, speedups, None)
            training.run(run, wanted, checkpoint_every_s)
        return run
    processes = _meet(where, full, prepared, Path(out or RUNS))
    training = Training(
        Start(
            recipe=full,
            prepared=prepared,
            device=target,
            cache=cache_dir_of(options.cache_dir),
            requested=speedups,
            threads=threads,
            group=group,
            balance=balance,
            shard=shard,
        ),
        where.hang_s,
    )
    training.processes, training.shard = processes, wished
    training.seconds["prepare"] = time.perf_counter() - started
    training.wanted_score = target_accuracy
    # Only now: what can't be trained leaves no directory behind.
    made = Run.create(prepared.name, out, full, about, environment).path if group.first else None
    run = Run(group.of_first(None if made is None else str(made)), writes=group.first)
    with run.lock():
        training.run(run, wanted, checkpoint_every_s)
    return run


def _meet(where: _Where, recipe: Recipe, prepared: PreparedData, folder: Path) -> dict[str, Json] | None:
    """A collective: the processes that train together look at each other. None: there is one."""
    if where.group.alone:
        return None
    return preflight.check(
        where.group, where.device, folder=folder, recipe=recipe.digest, data=prepared.digest, shard=where.shard
    )


def _remembered(data: AnyPath) -> bool:
    """Whether the run that goes on shares its network out."""
    return is_run(data) and bool(Run.open(data).summary.get("shard"))


def _refuse_one(asked_for: str | int | None, *, remembered: bool) -> None:
    """One process has nobody to share a network with: an error where the user asked for no more than one."""
    if asked_for in (None, "1", 1) and place() is None and not remembered:
        raise UsageError("--shard shares a network out over processes, and this is one.", fix="Add --nproc 2, or more.")
    say("there is one process, so the network is not shared out")


def _refuse_another(run: Run, recipe: Recipe) -> None:
    own = run.recipe
    if any(before.get("began_again") for before in run.summary.get("fallbacks", [])):
        own = own.model_copy(update={"lr": recipe.lr})  # it went on with a lower one by itself
    if own.digest != recipe.digest:
        raise UsageError(f"{run.path} is a run with another recipe.", fix="Choose a new --out, or the same options.")
    if run.summary.get("status") in FINISHED:
        raise UsageError(f"{run.path} is finished.", fix="Choose a new --out.")


def _own_device(device: str) -> str:
    """Of several processes on one machine each has a GPU of its own."""
    here = place()
    if here is None or device not in ("auto", "cuda"):
        return device
    seen = [gpu.torch_name for gpu in gpus() if gpu.torch_name and gpu.torch_name.startswith("cuda")]
    if not seen:
        return device
    return "cuda:0" if len(seen) == 1 else f"cuda:{here.local_rank}"  # one: it was given to this process alone


def _start_from(weights: AnyPath | None, changes: Mapping[str, Json], trust_code: bool) -> tuple[dict[str, Json], Json]:
    """What given weights bring along: fields of the recipe, and the preprocessing that they learned
    with, which stays unless the user changes it."""
    if weights is None:
        return {}, None
    file, card = weights_of(Path(weights).expanduser())
    network: dict[str, Json] = {"weights": str(file)}
    if card is None:
        return network, None
    if "model" not in changes:
        if not trust_code:
            refuse_foreign_code(card["recipe"]["model"], file)
        network |= {name: card["recipe"][name] for name in ("model", "model_args")}
    own = any(name.partition(".")[0] == "preprocess" for name in changes)
    return network, None if own else card["preprocess"]


def _refuse_deciding_twice(
    recipe: Recipe, changes: Mapping[str, Json], target_accuracy: float | None, budget_s: float | None
) -> None:
    if target_accuracy is not None and budget_s is not None:
        raise UsageError("--target-accuracy and --time-budget both choose the training.", fix="Give one of them.")
    fields = {name.partition(".")[0] for name in changes}
    if target_accuracy is not None and (own := fields - {"seed"}):
        raise UsageError(
            f"--target-accuracy takes a recipe as it was measured, so {', '.join(sorted(own))} can't be changed.",
            fix="Leave one or the other out, or use --time-budget.",
        )
    if own := fields & budget.budget_fields(recipe):
        raise UsageError(f"--time-budget chooses {', '.join(sorted(own))} itself.", fix="Leave one or the other out.")


def _refuse_reopening(run: Run, given: Sequence[str], more_epochs: float | None, trust_code: bool) -> None:
    if any((run.path / name).exists() for name in ("bench.json", "scaling.json")):
        raise UsageError(
            f"{run.path} holds the figures of a bench, and no training to go on with.",
            fix="Name a run of suanli train, or train anew on the data set.",
        )
    if given:
        raise UsageError(
            f"{run.path} is a run; it goes on with its own recipe, so {', '.join(given)} can't be changed.",
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


def _reopen(run: Run, options: DataOptions, where: _Where, speedups: str, more_epochs: float | None) -> Training:
    """The training of a run, put back to the last checkpoint."""
    full, prepared = resolve(options, recipe=run.recipe, settings={})
    if prepared.digest != run.data["digest"]:
        raise DataError(
            f"The data of {run.path} has changed since it was trained.",
            fix="Put the data back as it was, or train anew.",
        )
    processes = _meet(where, full, prepared, run.path)
    summary = run.summary
    # Other ways of computing round differently: exactly the same goes on, unless the user insists.
    before = summary.get("plan")
    requested: str | Plan = speedups
    if speedups == "auto" and before is not None:
        requested = _plan_of(before, where.device, _threads(where, summary, before))
    saved = checkpoint.read_newest(run.checkpoints)
    steps = where.group.each(None if saved is None else saved.step)
    if len(set(steps)) > 1:
        raise MachineError(
            f"The processes see different checkpoints of {run.path}: of steps {', '.join(map(str, steps))}.",
            fix="Keep the run on storage that all hosts share.",
        )
    training = Training(
        Start(
            recipe=full,
            prepared=prepared,
            device=where.device,
            cache=cache_dir_of(options.cache_dir),
            requested=requested,
            threads=where.threads,
            saved=saved,
            more_epochs=more_epochs,
            group=where.group,
            balance=where.balance,
            shard=where.shard,
        ),
        where.hang_s,
    )
    training.processes, training.shard = processes, where.wished
    training.earlier_s = summary.get("seconds", {}).get("train", 0.0)
    training.wanted_score = summary.get("wanted_score")
    training.fallbacks = list(summary.get("fallbacks", []))
    return training


def _threads(where: _Where, summary: Mapping[str, Json], before: Mapping[str, Json]) -> int | None:
    """Those of the run, unless there are other processes now than there were."""
    were = len((summary.get("processes") or {}).get("each", [None]))
    if where.threads is not None or were != where.group.size:
        return where.threads
    threads: int | None = before.get("threads")
    return threads


def _plan_of(before: Mapping[str, Json], device: Device, threads: int | None) -> Plan:
    """The plan that a run began with. Raises MachineError for a speedup that is unusable on this machine."""
    found = plan.named(",".join(before["speedups"]) or "none", device, threads)
    origin = before.get("origin", found.origin)
    return replace(found, origin=origin, dropped=before.get("dropped", {}))


def _trackers(wanted: Sequence[str]) -> list[type[Tracker]]:
    found = []
    for name in wanted:
        tracker: type[Tracker] = load("trackers", name)
        reason = tracker.why_not()
        if reason is not None:
            raise UsageError(f"The tracker {name!r} needs its package: {reason}", fix="Or leave --track out.")
        found.append(tracker)
    return found
