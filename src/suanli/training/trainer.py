"""One training in one run directory: when to log, validate, save and stop, and what is left at the end.

What a step does is in `loop.py`; which data, recipe and directory it is about, in `verbs/train.py`.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from suanli.compute.plan import usable
from suanli.compute.plan_cache import Store
from suanli.compute.planner import SHARDED
from suanli.compute.step_runner import active
from suanli.core.console import Progress, duration, plural, say, warn
from suanli.core.errors import Diverged, Interrupted, LostProcess, UsageError, first_line
from suanli.core.run import FINISHED, Run, measurement
from suanli.core.signals import StopRequest, catch_stop_signals
from suanli.core.types import Json, Plan, Recipe, Tracker
from suanli.engines import store
from suanli.machine import device
from suanli.models.model_folder import save_model
from suanli.parallel import dtensor, preflight
from suanli.parallel.group import lost
from suanli.parallel.watchdog import Watchdog
from suanli.training import checkpoint, precision_check, utilization
from suanli.training.diagnose import Facts, Watch
from suanli.training.forecast import out_of_memory_error
from suanli.training.loop import EARLY, LOSSES_HELD, Loop
from suanli.training.session import UNPLANNED, Start

LOG_EVERY_S = 1.0
HANG_S = 300.0  # without a step, until processes that wait for each other are ended
ASKED_S = 5.0  # until a stop that another process was asked for comes to this one, too
FEW_STEPS = 20  # to begin again after so few costs nothing


class Training:
    """Ready for its first step, or for the one after the last saved. Nothing is written before `run`.

    Raises UsageError for a recipe that can't be trained and OutOfMemory for one that doesn't fit.
    """

    def __init__(self, start: Start, hang_s: float = HANG_S) -> None:
        self.start = start
        self.prepared, self.device, self.group = start.prepared, start.device, start.group
        self.seconds: dict[str, float] = {}
        self.earlier_s = 0.0  # of training before an interruption
        self.fallbacks: list[dict[str, Json]] = []
        self.wanted_score: float | None = None  # that the user named
        self.writer = checkpoint.ShardWriter(self.group) if start.shard else checkpoint.Writer()
        self.hang_s = hang_s
        self.shard = start.shard  # wanted, also where there is one process now
        self.processes: dict[str, Json] | None = None  # that train together, as found before the first step
        self.gate: dict[str, Json] | None = None  # the final score against float32
        self.watch: Watch | None = None
        start.ready()
        if start.saved is not None:
            say(f"going on from step {self.loop.progress.step}")
        if (told := _planning(start.plan)) is not None:
            say(told)
        say(f"{self._title()}: {start.forecast}")
        if self.group.shares:
            say("shares of a batch: " + ", ".join(f"{share:.0%}" for share in self.group.shares))

    @property
    def loop(self) -> Loop:
        return self.start.loop

    @property
    def plan(self) -> Plan:
        return self.start.plan

    @property
    def recipe(self) -> Recipe:
        return self.start.recipe

    def run(self, run: Run, trackers: Sequence[type[Tracker]], checkpoint_every_s: float) -> None:
        """A collective; the first process writes."""
        self.directory, self.checkpoint_every_s = run, checkpoint_every_s
        if self.processes is not None:
            self.processes["shares"] = list(self.group.shares) or None
            preflight.refuse_full_disk(self.processes["each"][0], self.start.forecast.disk_bytes)
        run.write("check.json", self.prepared.findings)
        if self.start.more_epochs is not None:
            self._save()  # from here on the run is a longer one
        self._write_running()
        with ExitStack() as stack:
            self.trackers = [t(run.path, self.recipe.model_dump(mode="json")) for t in trackers]
            for tracker in self.trackers:
                stack.callback(tracker.close)
            stop = stack.enter_context(catch_stop_signals())
            watchdog = Watchdog(self.group, self._position, self.hang_s)
            watchdog.start()
            stack.callback(watchdog.stop)
            self.started = time.perf_counter()
            status = self._through(stop)
            self._finish(status)
        self.group.finish()  # what follows may read what the first has written

    def _position(self) -> tuple[int, str]:
        """The step and the phase in it; asked from another thread."""
        loop: Loop | None = self.loop
        return (0, "start") if loop is None else (loop.progress.step, loop.phase)

    def _write_running(self) -> None:
        """What a run that is cut short goes on with."""
        values: dict[str, Json] = {
            "plan": asdict(self.plan),
            "fallbacks": self.fallbacks,
            "wanted_score": self.wanted_score,
        }
        values |= {"processes": self.processes, "shard": self.shard}
        forecast = self.start.forecast.to_json()
        self.directory.write("summary.json", {"status": "running", "forecast": forecast, **values})

    def _through(self, stop: StopRequest) -> str:
        """All steps; a plan that fails is followed by a weaker one, where the user leaves the choice."""
        while True:
            try:
                with active(self.loop.compute):
                    return self._steps(stop)
            except Exception as error:  # noqa: BLE001  # compilers and kernel libraries may raise anything; judged there
                self._go_on_or_raise(error)

    def _go_on_or_raise(self, error: Exception) -> None:
        self.writer.abandon()
        failed_at = self.loop.progress.step
        if not self.group.alone and "finished reduction" in str(error):  # so DistributedDataParallel says it
            raise UsageError(
                f"Some weights of {self.recipe.model!r} get no gradient, so several processes can't share it.",
                fix="Freeze them with requires_grad_(False), or train with one process.",
            ) from error
        if not self.group.alone and lost(error):
            raise LostProcess(
                f"Process {self.group.rank} has lost another one at step {failed_at}: {first_line(error, 200)}",
                fix=f"To go on from the last checkpoint: suanli train {self.directory.path}",
            ) from error
        said = self.start.fall_back(error, self.directory.checkpoints)
        begins = False
        if said is None and isinstance(error, Diverged) and self._may_begin_again(failed_at):
            begins = True
            # Without its checkpoints first: a run that is cut short now must not go on from them.
            if self.group.first:
                checkpoint.remove_all(self.directory.checkpoints)
            said = f"{error.message.rstrip('.')}; {self.start.begin_again()}"
            self.directory.write("recipe.json", self.recipe.model_dump(mode="json"))
        if said is not None:
            warn(f"Step {failed_at + 1} failed: {said}.")
            now = {"speedups": list(self.plan.speedups), "began_again": begins}
            self.fallbacks.append({"step": failed_at, "said": said, **now})
            self._write_running()
            return
        if device.is_out_of_memory(error):
            half = self.loop.order.batch_size // 2
            raise out_of_memory_error(self.loop, self.start.forecast.memory_bytes, None, half) from error
        if isinstance(error, Diverged):
            self._summarise("diverged")
            self.group.wait()
            saved = checkpoint.last_step(self.directory.checkpoints)
            kept = f"The last good checkpoint is kept (step {saved})." if saved else "No checkpoint was due yet."
            raise Diverged(f"{error.message} {kept}", fix=error.fix) from error
        raise error

    def _may_begin_again(self, failed_at: int) -> bool:
        """Once, in the first tenth of a run: later it would cost too much, and the rate has proven itself."""
        loop = self.loop
        noticed_late = 0 if self.device.type == "cpu" else LOSSES_HELD
        early = failed_at <= max(FEW_STEPS, EARLY * loop.steps) + noticed_late
        again = any(before.get("began_again") for before in self.fallbacks)
        return early and not again and len(loop.progress.segments) == 1

    def _title(self) -> str:
        recipe = self.recipe
        parameters = sum(p.numel() for p in self.loop.model.parameters())
        how = "+".join(self.plan.speedups) or "plain PyTorch"
        if self.plan.threads is not None:
            how += f", {plural(self.plan.threads, 'thread')}"
        size = f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters:,}"
        return f"{recipe.model} ({size} parameters), recipe {recipe.name}, {self.device.name}, {how}"

    # --- the steps ---

    def _steps(self, stop: StopRequest) -> str:
        loop, per_epoch = self.loop, self.loop.order.steps_per_epoch
        every = max(1, round(self.recipe.validate_every * per_epoch))
        saved_at = logged_at = time.monotonic()
        since, since_step = loop.progress.seconds, loop.progress.step
        note = ""
        self.watch = Watch(loop.learner.clock, self._facts, loop.steps)
        with Progress("Training", loop.steps) as bar:
            for loss in loop.run():
                step, now = loop.progress.step, time.monotonic()
                if (found := self.watch.after_step(step)) is not None:
                    say(str(found))
                last = step == loop.steps
                if now - logged_at >= LOG_EVERY_S or step % every == 0 or last or step == 1:
                    rate = (step - since_step) * loop.order.batch_size / max(loop.progress.seconds - since, 1e-9)
                    self._log(loss, rate)
                    note = f"{rate:,.0f}/s  loss {loss:.3f}"
                    logged_at, since, since_step = now, loop.progress.seconds, step
                if step % every == 0 or last:
                    self._validate()
                score = "" if loop.progress.last is None else f"  {loop.task.metric} {loop.progress.last:.1%}"
                bar.update(step, note + score)
                asked, due = self._agreed(stop.signal, now - saved_at >= self.checkpoint_every_s, last)
                if asked:
                    self._save()
                    self._interrupt(asked, stop)
                if loop.should_stop_early:
                    self._save()
                    return "stopped early"
                if due:
                    self._save(beside=True)
                    saved_at = time.monotonic()
        self._save()
        return "finished"

    def _agreed(self, asked: int | None, due: bool, last: bool) -> tuple[int, bool]:
        """A collective: the signal that asked any process to stop, and whether the first one's clock says that it is
        time to save. On a GPU only as often as losses are read, since to ask means to wait."""
        group, step = self.group, self.loop.progress.step
        if group.alone:
            return asked or 0, due
        if self.device.type != "cpu" and step % LOSSES_HELD and not last:
            return 0, False
        most = group.most(asked or 0, float(due and group.first), float(self.writer.busy))
        if self.writer.unfinished and not most[2]:
            self.writer.complete()
        return int(most[0]), bool(most[1])

    def _facts(self) -> Facts:
        step, plan = self.loop.compute, self.plan
        possible = {n: s for n, s in usable(self.device)[0].items() if s.needless(step, self.device) is None}
        groups = {possible[n].group for n in plan.speedups if n in possible}
        untried = (n for n, s in possible.items() if n not in plan.speedups and n not in plan.dropped)
        sized = "size" in self.prepared.preprocess.settings() or self.prepared.preprocess.kind == "image"
        return Facts(
            device_type=self.device.type,
            batch_size=self.loop.batch_size,
            cores=max(1, device.cores() // self.group.local_size),
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
        least = self.start.ideal_step_s
        progress = self.loop.progress
        if least is None or not progress.seconds:
            return None
        return least * self.loop.full_size_steps(0, progress.step) / progress.seconds

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
        here = self.group.first or loop.compute.sharded
        if self.recipe.early_stop is not None and loop.progress.stale == 0 and here:
            with loop.use_averaged_weights():
                tensors = dict(loop.model.state_dict())
                checkpoint.write(self._best, tensors, {"step": loop.progress.step}, writes=self.group.first)

    @property
    def _best(self) -> Path:
        return self.directory.checkpoints / "best.safetensors"

    def _save(self, *, beside: bool = False) -> None:
        """A collective. `beside` the next steps, where there is memory for a copy of everything; else it is done
        when this returns."""
        before, self.loop.phase = self.loop.phase, "save"
        tensors, progress = self.loop.state()
        if self.group.first or self.loop.compute.sharded:
            size_bytes = sum(t.numel() * t.element_size() for t in map(dtensor.local, tensors.values()))
            writers = self.group.local_size if self.loop.compute.sharded else 1
            room = device.available_memory_bytes(device.detect("cpu"), writers)
            copied = beside and (room is None or room >= size_bytes)
            self.writer.save(self.directory.checkpoints, self.loop.progress.step, tensors, progress, beside=copied)
            if not beside:
                self.writer.complete()
        self.loop.phase = before

    def _interrupt(self, number: int, stop: StopRequest) -> None:
        self._summarise("interrupted")
        self.loop.phase = "end"
        self.group.wait()  # nobody ends, and ends the others, before the checkpoint is on disk
        if not self.group.alone:
            stop.wait(ASKED_S)  # one that ends before it is asked to would count as having failed
        raise Interrupted(
            f"Stopped by {signal.Signals(number).name} at step {self.loop.progress.step} of {self.loop.steps}; "
            "the checkpoint is saved.",
            fix=f"Go on with: suanli train {self.directory.path}",
        )

    # --- after the last step ---

    def _finish(self, status: str) -> None:
        self.loop.phase = "end"
        if not self.group.first and not self.loop.compute.sharded:
            return
        loop, prepared = self.loop, self.prepared
        if self.recipe.early_stop is not None and any(self._of_all(self._best.exists())):
            loop.load_tensors(checkpoint.read(self._best).tensors)
        if self.group.first:  # they speak of the model that is replaced now
            path = self.directory.path
            for outdated in (*(path / "evaluation").glob("*.json"), path / "report.html", path / "README.md"):
                outdated.unlink(missing_ok=True)
            shutil.rmtree(self.directory.model_path / store.FOLDER, ignore_errors=True)
        with loop.use_averaged_weights() if self.recipe.early_stop is None else ExitStack():
            self._hold_against_plain()
            save_model(
                self.directory.model_path,
                loop.model,
                recipe=self.recipe,
                preprocess=prepared.preprocess,
                classes=prepared.classes,
                data=prepared.to_json() | {"cache": None},
                writes=self.group.first,
            )
        self.directory.write(
            "roofline.json", utilization.measure_roofline(loop, self.device, self.start.ceilings).to_json()
        )
        if not self.group.first:
            return
        self._summarise(status)
        rate = self.directory.summary["examples_per_s"]
        reached = loop.validation_score
        score = "" if reached is None else f", validation {loop.task.metric} {reached:.2%}"
        took = duration(self.seconds["train"])
        say(f"{status} after {loop.progress.step} steps in {took} ({rate:,.0f} examples/s){score}")
        if self.wanted_score is not None and reached is not None and reached < self.wanted_score:
            warn(f"The {loop.task.metric} on validation is below the {self.wanted_score:.2%} that was wanted.")

    def _of_all(self, value: bool) -> list[bool]:
        """A collective where the weights are shared out, since then all finish together."""
        return self.group.each(value) if self.loop.compute.sharded else [value]

    def _hold_against_plain(self) -> None:
        """The final score as the plan computes it against float32, with the same weights on the same validation
        inputs. What costs more than the task tolerates is refused from the next plan on."""
        rounding = precision_check.low_precision_speedups(self.plan)
        if not rounding or (found := precision_check.compare_with_float32(self.loop)) is None:
            return
        difference, examples = found
        task = self.loop.task
        refused = difference.exceeds(task.tolerance)
        self.gate = difference.to_json() | {"examples": examples, "refused": refused, "speedups": rounding}
        if refused and self.plan.origin not in UNPLANNED and self.group.first:
            reason = f"it cost {-difference.median:.1%} of validation {task.metric} against float32"
            Store(self.start.cache, self.start.key, self.start.threads).refuse(dict.fromkeys(rounding, reason))
            warn(f"Computed with {'+'.join(rounding)}, the score is worse: {reason}. The next plan does without.")

    def _summarise(self, status: str) -> None:
        loop = self.loop
        seconds = loop.progress.seconds
        self.seconds["train"] = self.earlier_s + time.perf_counter() - self.started
        rate = loop.progress.step * loop.order.batch_size / seconds if seconds else None
        diagnosis = self.watch.current if self.watch else None
        self.directory.write(
            "summary.json",
            {
                "status": status,
                "steps": loop.progress.step,
                "epochs": loop.epoch,
                "parameters": sum(p.numel() for p in loop.model.parameters()),
                "seconds": self.seconds,
                "examples_per_s": rate,
                "peak_memory_bytes": device.peak_memory_bytes(self.device),
                "limited_by": diagnosis.verdict if diagnosis else None,
                "diagnosis": diagnosis.to_json() if diagnosis else None,
                "forecast": self.start.forecast.to_json(),
                "plan": asdict(self.plan),
                "fallbacks": self.fallbacks,
                "wanted_score": self.wanted_score,
                "gate": self.gate,
                "processes": self.processes,
                "shard": self.shard,
            },
        )
        if status in FINISHED and rate is not None:
            self.directory.record(
                measurement(
                    "examples_per_s",
                    rate,
                    "1/s",
                    environment=device.environment(self.device),
                    recipe=self.recipe,
                    variant="+".join(self.plan.speedups) or "none",
                    scores={} if loop.validation_score is None else {f"val_{loop.task.metric}": loop.validation_score},
                    count=loop.progress.step,
                )
            )


def _planning(plan: Plan) -> str | None:
    """What planning has found, in a sentence; None where nothing was measured."""
    if plan.origin == SHARDED and plan.speedups:
        return "plan: the usual speedups; a network that is shared out has no copies to measure more on"
    if plan.origin == "short list":
        return "plan: the usual speedups; the run is too short to measure more"
    if plan.origin != "measured":
        return None
    kept = [t for t in plan.trials if t.kept and t.ratio is not None]
    times = math.prod(t.ratio for t in kept if t.ratio is not None)
    how = f"{times:.2f} times as fast as plain PyTorch" if kept else "nothing was faster than plain PyTorch"
    return f"plan: {how}; {plural(len(plan.trials), 'change')} tried in {duration(plan.seconds)}"
