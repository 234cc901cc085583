"""train: prepared data and a recipe become a run with a model inside.

A run directory as the subject goes on where it was interrupted. This file decides when to save,
validate and stop; what a step does is in `loop.py`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from suanli import checkpoint, hardware, planning
from suanli.assembly import build_loop
from suanli.cache import Prepared
from suanli.console import Progress, duration, say
from suanli.data import cache_dir as cache_dir_of
from suanli.errors import DataError, Diverged, Interrupted, UsageError
from suanli.forecast import enough_memory, forecast, out_of_memory, refuse_too_big
from suanli.plugins import load
from suanli.rundir import Run, is_run, measurement, refuse_inside, refuse_occupied
from suanli.saved import refuse_foreign_code, save_model, weights_of
from suanli.stopping import Stop, stop_requests
from suanli.threads import choose as choose_threads
from suanli.threads import threads as use_threads
from suanli.types import AnyPath, Device, Json, Plan, Recipe, Tracker
from suanli.verbs.prepare import DataOptions, resolve

LOG_EVERY_S = 1.0
FINISHED = ("finished", "stopped early")


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
    device: str = "auto",
    speedups: str = "auto",
    threads: int | None = None,
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
    `more_epochs` continues a finished run. `settings` sets any field of the recipe. Raises
    Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved; Diverged when the loss is no
    longer finite; OutOfMemory with a batch size that would fit. `trust_code` lets a saved run name
    code that is not suanli's own; a `model` that is named here is run anyway.
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
    target = hardware.detect(device)
    wanted = _trackers(track)
    if is_run(data):
        given = [
            *changes,
            *(["recipe"] if recipe else []),
            *(["out"] if out else []),
            *(["weights"] if weights else []),
        ]
        given += [n for n, v in (("input_column", input_column), ("label_column", label_column)) if v]
        run = Run.open(data)
        with run.lock():
            _refuse_reopening(run, sorted(given), more_epochs, trust_code)
            options = DataOptions.of_run(run, data_dir=data_dir, cache_dir=cache_dir)
            training = _reopen(run, options, target, speedups, threads, more_epochs)
            training.seconds["prepare"] = time.perf_counter() - started
            training.run(run, wanted, checkpoint_every_s)
        return run
    if more_epochs is not None:
        raise UsageError("--more-epochs continues a run.", fix="Name the directory of a run, not a data set.")
    if out is not None:
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
    full, prepared = resolve(options, recipe=recipe, settings=network | changes)
    training = _Training(full, prepared, target, planning.choose(speedups, target), threads, options)
    training.seconds["prepare"] = time.perf_counter() - started
    # Only now: what can't be trained leaves no directory behind.
    about = prepared.to_json() | {"source": options.subject, "options": asdict(options)}
    run = Run.create(prepared.name, out, full, about, hardware.environment(target))
    with run.lock():
        training.run(run, wanted, checkpoint_every_s)
    return run


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


def _refuse_reopening(run: Run, given: Sequence[str], more_epochs: float | None, trust_code: bool) -> None:
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


def _reopen(
    run: Run, options: DataOptions, device: Device, speedups: str, threads: int | None, more_epochs: float | None
) -> _Training:
    """The training of a run, put back to the last checkpoint."""
    full, prepared = resolve(options, recipe=run.recipe, settings={})
    if prepared.digest != run.data["digest"]:
        raise DataError(
            f"The data of {run.path} has changed since it was trained.",
            fix="Put the data back as it was, or train anew.",
        )
    # Other ways of computing round differently: exactly the same goes on, unless the user insists.
    before = run.summary.get("plan", {})
    if speedups == "auto" and "speedups" in before:
        speedups = ",".join(before["speedups"]) or "none"
    threads = threads or before.get("threads")
    saved = checkpoint.newest(run.checkpoints)
    training = _Training(
        full, prepared, device, planning.choose(speedups, device), threads, options, saved, more_epochs
    )
    training.earlier_s = run.summary.get("seconds", {}).get("train", 0.0)
    return training


class _Training:
    """One training, from the first or the last saved step to the model. Nothing is written before
    `run`."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        device: Device,
        plan: Plan,
        threads: int | None,
        options: DataOptions,
        saved: checkpoint.Checkpoint | None = None,
        more_epochs: float | None = None,
    ) -> None:
        self.recipe, self.prepared, self.device = recipe, prepared, device
        self.seconds: dict[str, float] = {}
        self.earlier_s = 0.0  # of training before an interruption
        with enough_memory(device):
            self.loop = build_loop(recipe, prepared, device, plan, fresh=saved is None)
        if saved is not None:
            self.loop.restore(saved)
            say(f"going on from step {self.loop.progress.step}")
        if more_epochs is not None:
            self.loop.extend(more_epochs)
        memory = refuse_too_big(self.loop, device)
        with enough_memory(device):
            count = choose_threads(self.loop, device, threads, cache_dir_of(options.cache_dir))
        self.plan = replace(plan, threads=count)
        with use_threads(count):
            self.forecast = forecast(self.loop, memory)
        say(f"{self._title()}: {self.forecast}")

    def run(self, run: Run, trackers: Sequence[type[Tracker]], checkpoint_every_s: float) -> None:
        self.directory, self.checkpoint_every_s = run, checkpoint_every_s
        run.write("check.json", self.prepared.findings)
        run.write(
            "summary.json",
            {"status": "running", "plan": asdict(self.plan), "forecast": self.forecast.to_json()},
        )
        with ExitStack() as stack:
            self.trackers = [t(run.path, self.recipe.model_dump(mode="json")) for t in trackers]
            for tracker in self.trackers:
                stack.callback(tracker.close)
            stack.enter_context(use_threads(self.plan.threads))
            stop = stack.enter_context(stop_requests())
            started = time.perf_counter()
            try:
                status = self._steps(stop)
            except (RuntimeError, MemoryError) as error:
                if not hardware.out_of_memory(error):
                    raise
                half = self.loop.order.batch_size // 2
                raise out_of_memory(self.loop, self.forecast.memory_bytes, None, half) from error
            except Diverged as error:
                self._summarise("diverged")
                saved = checkpoint.last_step(run.checkpoints)
                kept = f"The last good checkpoint is kept (step {saved})." if saved else "No checkpoint was due yet."
                raise Diverged(f"{error.message} {kept}", fix=error.fix) from error
            finally:
                self.seconds["train"] = self.earlier_s + time.perf_counter() - started
        self._finish(status)

    def _title(self) -> str:
        recipe = self.recipe
        parameters = sum(p.numel() for p in self.loop.model.parameters())
        how = "+".join(self.plan.speedups) or "plain PyTorch"
        if self.plan.threads is not None:
            how += f", {self.plan.threads} thread{'s' * (self.plan.threads > 1)}"
        size = f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters:,}"
        return f"{recipe.model} ({size} parameters), recipe {recipe.name}, {self.device.name}, {how}"

    # --- the steps ---

    def _steps(self, stop: Stop) -> str:
        loop, per_epoch = self.loop, self.loop.order.steps_per_epoch
        every = max(1, round(self.recipe.validate_every * per_epoch))
        saved_at = logged_at = time.monotonic()
        since, since_step = loop.progress.seconds, loop.progress.step
        note = ""
        with Progress("Training", loop.steps) as bar:
            for loss in loop.run():
                step, now = loop.progress.step, time.monotonic()
                last = step == loop.steps
                if now - logged_at >= LOG_EVERY_S or step % every == 0 or last or step == 1:
                    rate = (step - since_step) * loop.order.batch_size / max(loop.progress.seconds - since, 1e-9)
                    self._log(loss, rate)
                    note = f"{rate:,.0f}/s  loss {loss:.3f}"
                    logged_at, since, since_step = now, loop.progress.seconds, step
                if step % every == 0 or last:
                    self._validate()
                score = "" if loop.progress.last is None else f"  {loop.task.headline} {loop.progress.last:.1%}"
                bar.update(step, note + score)
                if stop.by is not None:
                    self._save()
                    self._interrupt(stop.by)
                if loop.should_stop:
                    self._save()
                    return "stopped early"
                if now - saved_at >= self.checkpoint_every_s:
                    self._save()
                    saved_at = time.monotonic()
        self._save()
        return "finished"

    def _log(self, loss: float, rate: float) -> None:
        loop = self.loop
        values = {"loss": loss, "lr": loop.rate, "examples_per_s": rate}
        if math.isnan(loss):  # on a GPU, not known yet
            del values["loss"]
        self.directory.log(step=loop.progress.step, epoch=loop.epoch, seconds=loop.progress.seconds, **values)
        for tracker in self.trackers:
            tracker.log(values, loop.progress.step)

    def _validate(self) -> None:
        loop = self.loop
        scores = loop.validate()
        self.directory.log(
            step=loop.progress.step,
            epoch=loop.epoch,
            seconds=loop.progress.seconds,
            split="val",
            scores=scores,
        )
        for tracker in self.trackers:
            tracker.log({f"val/{name}": value for name, value in scores.items()}, loop.progress.step)
        if self.recipe.early_stop is not None and loop.progress.stale == 0:
            with loop.kept_weights():
                tensors = dict(loop.model.state_dict())
                checkpoint.write(self._best, tensors, {"step": loop.progress.step})

    @property
    def _best(self) -> Path:
        return self.directory.checkpoints / "best.safetensors"

    def _save(self) -> None:
        tensors, progress = self.loop.state()
        checkpoint.save_step(self.directory.checkpoints, self.loop.progress.step, tensors, progress)

    def _interrupt(self, number: int) -> None:
        self._summarise("interrupted")
        raise Interrupted(
            f"Stopped by {signal.Signals(number).name} at step {self.loop.progress.step} of {self.loop.steps}; "
            "the checkpoint is saved.",
            fix=f"Go on with: suanli train {self.directory.path}",
        )

    # --- after the last step ---

    def _finish(self, status: str) -> None:
        loop, prepared = self.loop, self.prepared
        if self.recipe.early_stop is not None and self._best.exists():
            loop.model.load_state_dict(checkpoint.read(self._best).tensors)
        # They speak of the model that is replaced now.
        path = self.directory.path
        for outdated in (*(path / "evaluation").glob("*.json"), path / "report.html", path / "README.md"):
            outdated.unlink(missing_ok=True)
        with loop.kept_weights() if self.recipe.early_stop is None else ExitStack():
            save_model(
                self.directory.model_path,
                loop.model,
                recipe=self.recipe,
                preprocess=prepared.preprocess,
                classes=prepared.classes,
                data=prepared.to_json() | {"cache": None},
            )
        self._summarise(status)
        rate = self.directory.summary["examples_per_s"]
        score = "" if loop.kept_score is None else f", validation {loop.task.headline} {loop.kept_score:.2%}"
        took = duration(self.seconds["train"])
        say(f"{status} after {loop.progress.step} steps in {took} ({rate:,.0f} examples/s){score}")

    def _summarise(self, status: str) -> None:
        loop = self.loop
        seconds = loop.progress.seconds
        rate = loop.progress.step * loop.order.batch_size / seconds if seconds else None
        share = min(1.0, loop.progress.input_s / seconds) if seconds else None
        environment = hardware.environment(self.device)
        self.directory.write(
            "summary.json",
            {
                "status": status,
                "steps": loop.progress.step,
                "epochs": loop.epoch,
                "parameters": sum(p.numel() for p in loop.model.parameters()),
                "seconds": self.seconds,
                "examples_per_s": rate,
                "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
                "input_share": share,
                "limited_by": _limited_by(share, loop.train_feed.resident),
                "forecast": self.forecast.to_json(),
                "plan": asdict(self.plan),
            },
        )
        if status in FINISHED and rate is not None:
            self.directory.record(
                measurement(
                    "examples_per_s",
                    rate,
                    "1/s",
                    environment=environment,
                    recipe=self.recipe,
                    variant="+".join(self.plan.speedups) or "none",
                    scores={f"val_{loop.task.headline}": loop.kept_score} if loop.kept_score is not None else {},
                    count=loop.progress.step,
                )
            )


def _limited_by(share: float | None, resident: bool) -> str | None:
    if share is None:
        return None
    if share < 0.2:
        return f"limited by computing: only {share:.0%} of the time goes into inputs"
    where = "augmentation of the batch" if resident else "reading and augmentation"
    return f"limited by input: {share:.0%} of the time goes into {where}"


def _trackers(wanted: Sequence[str]) -> list[type[Tracker]]:
    found = []
    for name in wanted:
        tracker: type[Tracker] = load("trackers", name)
        reason = tracker.why_not()
        if reason is not None:
            raise UsageError(f"The tracker {name!r} needs its package: {reason}", fix="Or leave --track out.")
        found.append(tracker)
    return found
