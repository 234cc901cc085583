"""One training in one run directory: when to log, validate, save and stop, and what is left at the end.

`loop.py` makes a step, `session.py` gets the training ready, `runs.py` finds data, recipe and directory.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, cast

from suanli.compute.plan_cache import PlanCache
from suanli.compute.step_runner import AppliedSettings
from suanli.core.console import Progress, duration, plural, say, warn
from suanli.core.errors import Diverged, Interrupted, LostProcess, UsageError, first_line
from suanli.core.run import Run
from suanli.core.signals import StopRequest, catch_stop_signals, signal_name
from suanli.core.task import Task
from suanli.core.types import Plan, Recipe, Tracker
from suanli.engines import store
from suanli.machine import device
from suanli.models.model_folder import save_model
from suanli.parallel import dtensor, preflight
from suanli.parallel.group import is_lost_process
from suanli.parallel.watchdog import Watchdog
from suanli.training import checkpoint, precision_check, unfreezing, utilization
from suanli.training.checkpoint_writer import ShardWriter, Writer
from suanli.training.diagnose import Diagnosis, Watch
from suanli.training.divergence import EARLY
from suanli.training.forecast import out_of_memory_error
from suanli.training.frozen_head import FILE as FROZEN
from suanli.training.frozen_head import FrozenHead
from suanli.training.loop import READ_LOSSES_EVERY, Loop
from suanli.training.options import TrainerOptions
from suanli.training.rate_log import RateLog
from suanli.training.session import UNPLANNED, Session
from suanli.training.summary import Summary, describe, describe_planning
from suanli.training.validation import calibrate, validate

ASKED_S = 5.0  # until a stop that another process was asked for comes to this one, too
FEW_STEPS = 20  # to begin again after so few costs nothing


class Trainer:
    """Trains an open session in a run directory. In the first of several processes it writes, in the others not."""

    def __init__(self, session: Session, run: Run, options: TrainerOptions) -> None:
        self.session, self.directory, self.options = session, run, options
        self.prepared, self.device, self.group = session.spec.prepared, session.device, session.group
        self.summary = Summary(session, run, options)
        self.writer = ShardWriter(self.group) if session.spec.shard else Writer()
        self.trackers: list[Tracker] = []
        self.watch: Watch | None = None

    @property
    def loop(self) -> Loop:
        return self.session.loop

    @property
    def plan(self) -> Plan:
        return self.session.plan

    @property
    def recipe(self) -> Recipe:
        return self.session.recipe

    @property
    def _diagnosis(self) -> Diagnosis | None:
        return self.watch.current if self.watch else None

    def train(self) -> None:
        """A collective. Raises Interrupted, with the checkpoint saved; Diverged; OutOfMemory; LostProcess."""
        self._announce()
        if (processes := self.summary.processes) is not None:
            first = processes["each"][0]  # the process that writes
            preflight.refuse_full_disk(first["host"], first["disk_bytes"], self.session.forecast.disk_bytes)
        self.prepared.copy_to(self.directory)
        if self.session.spec.more_epochs is not None:
            self._save()  # from here on the run is a longer one
        if self.summary.frozen is not None and self.session.spec.checkpoint is None:
            self._keep_frozen_head(self.summary.frozen)
        self.summary.write_running()
        with ExitStack() as stack:
            for tracker in self.options.trackers:
                self.trackers.append(tracker(self.directory.path, self.recipe.model_dump(mode="json")))
                stack.callback(self.trackers[-1].close)
            stop = stack.enter_context(catch_stop_signals())
            watchdog = Watchdog(self.group, lambda: self.session.position, self.options.hang_s)
            watchdog.start()
            stack.callback(watchdog.stop)
            self.summary.started = time.perf_counter()
            status = self._train_to_the_end(stop)
            self._finish(status)
        self.group.finish()  # what follows may read what the first has written

    def _keep_frozen_head(self, head: FrozenHead) -> None:
        """A collective where the network is sharded: the run has a model from here on, with this head."""
        self.directory.write(FROZEN, head.to_json())
        if head.scores:
            score = head.scores[self.loop.task.metric.name]
            self.loop.progress.add_score(score, self.loop.task.metric)
            if not self.directory.validation_scores:  # it was stopped here before
                self.directory.log(step=0, epoch=0.0, seconds=0.0, split="val", scores=head.scores)
        self._save_model(head.calibrate(self.loop.task))

    def _save_model(self, task: Task) -> None:
        """A collective where the network is sharded."""
        if not self.group.is_first and not self.loop.compute.sharded:
            return
        save_model(
            self.directory.model_path,
            self.loop.model,
            recipe=self.recipe,
            preprocess=self.prepared.preprocess,
            task=task,
            data=self.prepared.to_json() | {"cache": None},
            pretrained=self.directory.weights,
            writes=self.group.is_first,
        )

    def _announce(self) -> None:
        session = self.session
        if not self.loop.steps:
            say(describe(session))
            return
        if session.spec.checkpoint is not None:
            say(f"going on from step {self.loop.progress.step}")
        if (sentence := describe_planning(session.plan)) is not None:
            say(sentence)
        say(f"{describe(session)}: {session.forecast}")
        if self.group.shares:
            say("shares of a batch: " + ", ".join(f"{share:.0%}" for share in self.group.shares))

    def _train_to_the_end(self, stop: StopRequest) -> str:
        """Make all steps. Where a plan fails and the user leaves the choice, a weaker one goes on."""
        while True:
            try:
                with AppliedSettings(self.loop.compute) as settings:
                    return self._steps(stop, settings)
            except Exception as error:  # noqa: BLE001  # compilers and kernel libraries may raise anything
                self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Get ready to go on after `error`, or raise it, in words that help the user where there are such."""
        self.writer.discard()
        failed_at = self.loop.progress.step
        if not self.group.is_alone:
            self._explain_loss(error, failed_at)
        change = self.session.fall_back(error, self.directory.checkpoints)
        begin_again = change is None and isinstance(error, Diverged) and self._may_begin_again(failed_at)
        if begin_again:
            change = self._begin_again(cast(Diverged, error))
        if change is None:
            self._give_up(error)
        # A divergence says itself at which step it was; on a GPU it is noticed some steps later.
        warn(f"{change}." if isinstance(error, Diverged) else f"Step {failed_at + 1} failed: {change}.")
        now = {"speedups": list(self.plan.speedups), "began_again": begin_again}
        self.summary.fallbacks.append({"step": failed_at, "said": change, **now})
        self.summary.write_running()

    def _explain_loss(self, error: Exception, failed_at: int) -> None:
        """Raise what an error means that only several processes see."""
        if "finished reduction" in str(error):  # in the words of DistributedDataParallel
            raise UsageError(
                f"Some weights of {self.recipe.model!r} get no gradient, so several processes can't share it.",
                fix="Freeze them with requires_grad_(False), or train with one process.",
            ) from error
        if is_lost_process(error):
            raise LostProcess(
                f"Process {self.group.rank} has lost another one at step {failed_at}: {first_line(error, 200)}",
                fix=f"To go on from the last checkpoint: suanli train {self.directory.path}",
            ) from error

    def _begin_again(self, error: Diverged) -> str:
        # Without its checkpoints first: a run that is cut short now must not go on from them.
        if self.group.is_first:
            checkpoint.remove_all(self.directory.checkpoints)
        change = f"{error.message.rstrip('.')}; {self.session.begin_again()}"
        self.directory.write("recipe.json", self.recipe.model_dump(mode="json"))
        return change

    def _give_up(self, error: Exception) -> NoReturn:
        if device.is_out_of_memory(error):
            half = self.loop.order.batch_size // 2
            raise out_of_memory_error(self.loop, self.session.forecast.memory_bytes, None, half) from error
        if isinstance(error, Diverged):
            self.summary.write("diverged", self._diagnosis)
            self.group.barrier()
            saved = checkpoint.last_step(self.directory.checkpoints)
            kept = f"The last good checkpoint is kept (step {saved})." if saved else "No checkpoint was due yet."
            raise Diverged(f"{error.message} {kept}", fix=error.fix) from error
        raise error

    def _may_begin_again(self, failed_at: int) -> bool:
        """Once, in the first tenth of a run: later it would cost too much, and the rate has proven itself."""
        loop = self.loop
        noticed_late = 0 if self.device.type == "cpu" else READ_LOSSES_EVERY
        early = failed_at <= max(FEW_STEPS, EARLY * loop.steps) + noticed_late
        again = any(before.get("began_again") for before in self.summary.fallbacks)
        return early and not again and len(loop.progress.segments) == 1

    # --- the steps ---

    def _steps(self, stop: StopRequest, settings: AppliedSettings) -> str:
        loop, every_s = self.loop, self.options.checkpoint_every_s
        validate_every = max(1, round(self.recipe.validate_every * loop.order.steps_per_epoch))
        saved_at = time.monotonic()
        log = RateLog(loop)
        self.watch = Watch(loop.runner.clock, self.session.facts, loop.steps)
        self.session.start(settings)
        with Progress("Training", loop.steps) as bar:
            before_s = loop.progress.seconds
            for loss in loop.run():
                step = loop.progress.step
                if (news := self.session.after_step(loop.progress.seconds - before_s, settings)) is not None:
                    self.summary.plan_changes.append({"step": step, "said": news, "speedups": list(loop.plan.speedups)})
                    say(news)
                before_s = loop.progress.seconds
                if (diagnosis := self.watch.after_step(step)) is not None:
                    say(str(diagnosis))
                last, validates = step == loop.steps, step % validate_every == 0
                if log.is_due() or validates or last or step == 1:
                    self._log(loss, log.take(loss))
                if validates or last:
                    self._validate()
                metric = loop.task.metric
                score = "" if loop.progress.last is None else f"  {metric.name} {metric.format(loop.progress.last)}"
                bar.update(step, log.note + score)
                signal_number, save_is_due = self._agree(stop.signal, time.monotonic() - saved_at >= every_s, last)
                if signal_number:
                    self._save()
                    self._interrupt(signal_number, stop)
                if loop.should_stop_early:
                    self._save()
                    return "stopped early"
                if save_is_due:
                    self._save(beside=True)
                    saved_at = time.monotonic()
        self._save()
        return "finished"

    def _agree(self, signal_number: int | None, save_is_due: bool, last: bool) -> tuple[int, bool]:
        """A collective: the signal that any process got (0: none), and whether a checkpoint is due by the clock of the
        first one. On a GPU only as often as losses are read, since asking means waiting for the device."""
        group, step = self.group, self.loop.progress.step
        if group.is_alone:
            return signal_number or 0, save_is_due
        if self.device.type != "cpu" and step % READ_LOSSES_EVERY and not last:
            return 0, False
        most = group.max(signal_number or 0, float(save_is_due and group.is_first), float(self.writer.is_writing))
        if self.writer.uncommitted and not most[2]:
            self.writer.commit()
        return int(most[0]), bool(most[1])

    def _log(self, loss: float, rate: float) -> None:
        loop = self.loop
        values = {"loss": loss, "lr": loop.lr, "examples_per_s": rate}
        if math.isnan(loss):  # on a GPU, not known yet
            del values["loss"]
        self.directory.log(step=loop.progress.step, epoch=loop.epoch, seconds=loop.progress.seconds, **values)
        for tracker in self.trackers:
            tracker.log(values, loop.progress.step)

    def _validate(self) -> None:
        loop = self.loop
        scores = validate(loop)
        self.directory.log(
            step=loop.progress.step,
            epoch=loop.epoch,
            seconds=loop.progress.seconds,
            split="val",
            scores=scores,
        )
        for tracker in self.trackers:
            tracker.log({f"val/{name}": value for name, value in scores.items()}, loop.progress.step)
        here = self.group.is_first or loop.compute.sharded
        if self.recipe.early_stop is not None and loop.progress.stale == 0 and here:
            with loop.use_averaged_weights():
                tensors = dict(loop.model.state_dict())
                checkpoint.write(self._best, tensors, {"step": loop.progress.step}, writes=self.group.is_first)

    @property
    def _best(self) -> Path:
        return self.directory.checkpoints / "best.safetensors"

    def _save(self, *, beside: bool = False) -> None:
        """A collective. `beside` the next steps, where there is memory for a copy of everything; else it is done
        when this returns."""
        before, self.loop.phase = self.loop.phase, "save"
        tensors, progress = self.loop.state()
        if self.group.is_first or self.loop.compute.sharded:
            size_bytes = sum(t.numel() * t.element_size() for t in map(dtensor.local_part, tensors.values()))
            writers = self.group.local_size if self.loop.compute.sharded else 1
            room = device.available_memory_bytes(device.detect("cpu"), writers)
            copied = beside and (room is None or room >= size_bytes)
            self.writer.save(
                self.directory.checkpoints, self.loop.progress.step, tensors, progress, in_background=copied
            )
            if not beside:
                self.writer.commit()
        self.loop.phase = before

    def _interrupt(self, number: int, stop: StopRequest) -> None:
        self.summary.write("interrupted", self._diagnosis)
        self.loop.phase = "end"
        self.group.barrier()  # nobody ends, and ends the others, before the checkpoint is on disk
        if not self.group.is_alone:
            stop.wait(ASKED_S)  # one that ends before it is asked to would count as having failed
        raise Interrupted(
            f"Stopped by {signal_name(number)} at step {self.loop.progress.step} of {self.loop.steps}; "
            "the checkpoint is saved.",
            fix=f"Go on with: suanli train {self.directory.path}",
        )

    # --- after the last step ---

    def _finish(self, status: str) -> None:
        self.loop.phase = "end"
        if not self.group.is_first and not self.loop.compute.sharded:
            return
        loop = self.loop
        if self.recipe.early_stop is not None and any(self._ask_writers(self._best.exists())):
            checkpoint.load_tensors(checkpoint.read(self._best).tensors, loop.model.state_dict())
        if not self._keeps_frozen_head():
            self._replace_model()
        if loop.steps:
            roofline = utilization.measure_roofline(loop, self.device, self.session.ceilings)
            self.directory.write("roofline.json", roofline.to_json())
        if self.group.is_first:
            self.summary.write(status, self._diagnosis)
            self._announce_end(status)

    def _keeps_frozen_head(self) -> bool:
        """Whether the model that the training began with stays the run's."""
        head, loop = self.summary.frozen, self.loop
        if head is None or not head.kept:
            return False
        return not loop.steps or not unfreezing.is_better(loop.task.metric, head, loop.validation_score)

    def _replace_model(self) -> None:
        """A collective where the network is sharded: the weights as they are now become the run's model."""
        if self.summary.frozen is not None:
            self.summary.frozen = replace(self.summary.frozen, kept=False)
        if self.group.is_first:
            self._remove_outdated()
        with self.loop.use_averaged_weights() if self.recipe.early_stop is None else ExitStack():
            self._compare_with_float32()
            self._save_model(calibrate(self.loop))

    def _remove_outdated(self) -> None:
        """Remove what speaks of the model that is replaced now."""
        path, engines = self.directory.path, self.directory.model_path / store.FOLDER
        shutil.rmtree(path / "evaluation", ignore_errors=True)
        for name in ("report.html", "README.md"):
            (path / name).unlink(missing_ok=True)
        if engines.exists():
            say(f"{engines} is removed: its engines are of the previous model. For new ones: suanli optimize {path}")
            shutil.rmtree(engines, ignore_errors=True)

    def _announce_end(self, status: str) -> None:
        loop, target, head = self.loop, self.options.target_score, self.summary.frozen
        metric, reached = loop.task.metric, loop.validation_score
        if head is not None and not loop.steps:
            say(unfreezing.offer(self.recipe, head, len(loop.train_feed), self.directory.path))
        else:
            score = "" if reached is None else f", validation {metric.name} {metric.format(reached)}"
            took, rate = duration(self.summary.seconds["train"]), self.directory.summary["examples_per_s"]
            say(f"{status} after {plural(loop.progress.step, 'step')} in {took} ({rate:,.0f} examples/s){score}")
        if head is not None and loop.steps and head.scores:
            which = "the model with frozen features is kept" if head.kept else "before it, with frozen features"
            say(f"{which}: validation {metric.name} {metric.format(head.scores[metric.name])}")
            reached = head.scores[metric.name] if head.kept else reached
        if target is not None and reached is not None and metric.gain(target, reached) < 0:
            warn(f"The {metric.name} on validation is worse than the {metric.format(target)} that was asked for.")

    def _ask_writers(self, value: bool) -> list[bool]:
        """A collective where the network is sharded, since then all processes finish together."""
        return self.group.gather(value) if self.loop.compute.sharded else [value]

    def _compare_with_float32(self) -> None:
        """Compare the final score as the plan computes it with float32's, on the same weights and validation inputs.
        The next plan does without what costs more than the task tolerates."""
        rounding = precision_check.low_precision_speedups(self.plan)
        if not rounding or (comparison := precision_check.compare_with_float32(self.loop)) is None:
            return
        difference, examples, allowed = comparison
        metric = self.loop.task.metric
        refused = difference.exceeds(allowed)
        self.summary.gate = difference.to_json() | {"examples": examples, "refused": refused, "speedups": rounding}
        if refused and self.plan.origin not in UNPLANNED and self.group.is_first:
            reason = f"validation {metric.describe(difference)} against float32"
            session = self.session
            PlanCache(session.spec.cache, session.key, session.threads).refuse(dict.fromkeys(rounding, reason))
            warn(f"Computed with {'+'.join(rounding)}, the score is worse: {reason}. The next plan does without.")
