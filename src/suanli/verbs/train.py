"""train: prepared data and a recipe become a run with a model inside.

A run directory as the subject goes on where it was interrupted. This file decides when to save,
validate and stop; what a step does is in `loop.py`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from suanli import building, checkpoint, hardware, planning
from suanli.cache import Prepared
from suanli.console import Progress, duration, say
from suanli.data import Feed, mix
from suanli.errors import DataError, Interrupted, UsageError
from suanli.forecast import Forecast, forecast, out_of_memory
from suanli.loop import Loop
from suanli.plugins import load
from suanli.rundir import Run, is_run, measurement
from suanli.saved import save_model
from suanli.types import AnyPath, Device, Json, Plan, Recipe, Step, Tracker
from suanli.verbs.prepare import DataOptions, resolve

INITIALIZE_EXAMPLES = 2000  # training inputs that a data-dependent initialisation sees
LOG_EVERY_S = 1.0


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
    out: AnyPath | None = None,
    more_epochs: float | None = None,
    checkpoint_every_s: float = 60.0,
    track: Sequence[str] = (),
    input_column: str | None = None,
    label_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
) -> Run:
    """Train a model and keep everything about it in a run directory.

    `data` is a data set (see `prepare`), or the directory of a run that was interrupted: then
    training goes on from its last checkpoint, bit by bit as if it had not stopped (on a CPU).
    `more_epochs` continues a finished run. `settings` sets any field of the recipe. Raises
    Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved; Diverged when the loss is no
    longer finite; OutOfMemory with a batch size that would fit.
    """
    started = time.perf_counter()
    chosen = {
        "model": model,
        "weights": weights,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    changes = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items() if v is not None}
    changes |= dict(settings or {})
    target = hardware.detect(device)
    plan = planning.choose(speedups, target)
    trackers = _trackers(track)
    if is_run(data):
        if changes or recipe or out:
            given = sorted([*changes, *(["recipe"] if recipe else []), *(["out"] if out else [])])
            raise UsageError(
                f"{data} is a run; it goes on with its own recipe, so {', '.join(given)} can't be changed.",
                fix="Leave these options out, or train anew on the data set.",
            )
        run = Run.open(data)
        full, prepared = resolve(DataOptions(**run.data["options"]), recipe=run.recipe, settings={})
        if prepared.digest != run.data["digest"]:
            raise DataError(
                f"The data of {run.path} has changed since it was trained.",
                fix="Put the data back as it was, or train anew.",
            )
    else:
        if more_epochs is not None:
            raise UsageError("--more-epochs continues a run.", fix="Name the directory of a run, not a data set.")
        options = DataOptions.of(
            data,
            input_column=input_column,
            label_column=label_column,
            data_dir=data_dir,
            cache_dir=cache_dir,
            max_bad=max_bad,
        )
        full, prepared = resolve(options, recipe=recipe, settings=changes)
        about = prepared.to_json() | {"source": options.subject, "options": asdict(options)}
        run = Run.create(prepared.name, out, full, about, hardware.environment(target))
    with run.lock():
        run.write("check.json", prepared.findings)
        timing = {"prepare": time.perf_counter() - started}
        _Training(run, full, prepared, target, plan, checkpoint_every_s, timing).run(more_epochs, trackers)
    return run


class _Training:
    """One training in one run directory, from the first or the last saved step to the model."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        prepared: Prepared,
        device: Device,
        plan: Plan,
        checkpoint_every_s: float,
        seconds: dict[str, float],
    ) -> None:
        self.directory, self.recipe, self.prepared = run, recipe, prepared
        self.device, self.plan, self.seconds = device, plan, seconds
        self.checkpoint_every_s = checkpoint_every_s
        self.forecast: Forecast | None = None

    def run(self, more_epochs: float | None, trackers: Sequence[type[Tracker]]) -> None:
        self.loop = self._build()
        self._resume(more_epochs)
        self.forecast = forecast(self.loop, self.device)
        say(f"{self._title()}: {self.forecast}")
        self.directory.write("summary.json", {"status": "running", "forecast": self.forecast.to_json()})
        with ExitStack() as stack:
            self.trackers = [t(self.directory.path, self.recipe.model_dump(mode="json")) for t in trackers]
            for tracker in self.trackers:
                stack.callback(tracker.close)
            signals = stack.enter_context(_signals())
            started = time.perf_counter()
            try:
                status = self._steps(signals)
            except (RuntimeError, MemoryError) as error:
                if not hardware.out_of_memory(error):
                    raise
                raise out_of_memory(
                    self.loop, self.forecast.memory_bytes, None, self.loop.order.batch_size // 2
                ) from error
            self.seconds["train"] = time.perf_counter() - started
        self._finish(status)

    # --- before the first step ---

    def _build(self) -> Loop:
        recipe, prepared = self.recipe, self.prepared
        torch.manual_seed(mix(recipe.seed, 0))
        module = building.build(recipe, prepared.preprocess, len(prepared.classes))
        head = building.head_of(module, building.resolve(recipe.model))
        if recipe.weights is not None:
            say(str(building.load_weights(module, Path(recipe.weights), head)))
        train, val = (Feed(prepared.splits[s], self.device) for s in ("train", "val"))
        module.to(self.device.torch_name)
        initialize = getattr(module, "initialize", None)
        if recipe.weights is None and callable(initialize):
            spread = torch.from_numpy(np.random.default_rng(recipe.seed).permutation(len(train))[:INITIALIZE_EXAMPLES])
            initialize(prepared.preprocess.to_model(train.rows(spread)))
        step = planning.apply(self.plan, Step(model=module), self.device)
        optimizer = load("optimizers", recipe.optimizer).build(
            list(module.named_parameters()),
            head=head,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            backbone_lr_scale=recipe.backbone_lr_scale,
            fused=step.fused_optimizer,
            **recipe.optimizer_args,
        )
        return Loop(
            recipe=recipe,
            step=step,
            optimizer=optimizer,
            task=load("tasks", recipe.task)(),
            preprocess=prepared.preprocess,
            train=train,
            val=val,
            device=self.device,
            classes=len(prepared.classes),
        )

    def _resume(self, more_epochs: float | None) -> None:
        saved = checkpoint.newest(self.directory.checkpoints)
        if saved is not None:
            self.loop.restore(saved)
            say(f"going on from step {self.loop.progress.step}")
        finished = self.directory.summary.get("status") in ("finished", "stopped early")
        if more_epochs is not None:
            if not finished:
                raise UsageError(
                    "--more-epochs continues a finished run, and this one isn't.",
                    fix=f"First let it finish: suanli train {self.directory.path}",
                )
            if more_epochs <= 0:
                raise UsageError(f"--more-epochs can't be {more_epochs}.", fix="Give a number above 0.")
            done = self.loop.progress.step / self.loop.order.steps_per_epoch
            if self.loop.progress.step < self.loop.steps:  # it stopped early: what was left is not owed
                self.loop.progress.segments = [done]
            self.loop.progress.segments.append(more_epochs)
            self.loop.progress.stale = 0
        elif finished:
            raise UsageError(
                f"{self.directory.path} is finished.",
                fix=f"To train it further: suanli train {self.directory.path} --more-epochs 5",
            )

    def _title(self) -> str:
        recipe = self.recipe
        parameters = sum(p.numel() for p in self.loop.model.parameters())
        how = "+".join(self.plan.speedups) or "plain PyTorch"
        return f"{recipe.model} ({parameters / 1e6:.1f} M parameters), recipe {recipe.name}, {self.device.name}, {how}"

    # --- the steps ---

    def _steps(self, stopped: _Stopped) -> str:
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
                best = "" if loop.progress.best is None else f"  {loop.task.headline} {loop.progress.best:.1%}"
                bar.update(step, note + best)
                if stopped.by is not None:
                    self._save()
                    self._interrupt(stopped.by)
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
        best = f", validation {loop.task.headline} {loop.progress.best:.2%}" if loop.progress.best is not None else ""
        took = duration(self.seconds["train"])
        say(f"{status} after {loop.progress.step} steps in {took} ({rate:,.0f} examples/s){best}")

    def _summarise(self, status: str) -> None:
        loop = self.loop
        seconds = loop.progress.seconds
        rate = loop.progress.step * loop.order.batch_size / seconds if seconds else None
        share = min(1.0, loop.input_s / seconds) if seconds else None
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
                "forecast": self.forecast.to_json() if self.forecast else None,
                "plan": asdict(self.plan),
            },
        )
        if status != "interrupted" and rate is not None:
            self.directory.record(
                measurement(
                    "examples_per_s",
                    rate,
                    "1/s",
                    environment=environment,
                    recipe=self.recipe,
                    variant="+".join(self.plan.speedups) or "none",
                    scores={f"val_{loop.task.headline}": loop.progress.best} if loop.progress.best else {},
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
            raise UsageError(f"The tracker {name!r} is not usable: {reason}", fix="Install it or leave --track out.")
        found.append(tracker)
    return found


class _Stopped:
    by: int | None = None  # the signal that asked to stop


@contextmanager
def _signals() -> Iterator[_Stopped]:
    """Ctrl-C and SIGTERM ask to stop after the step; a second Ctrl-C stops at once."""
    stopped = _Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread may handle signals
        return

    def handle(number: int, _: FrameType | None) -> None:
        if stopped.by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped.by is None:
            stopped.by = number
            os.write(2, b"\nstopping after this step, saving the checkpoint ...\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
