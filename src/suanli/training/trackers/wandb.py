"""Weights & Biases: writes offline files to `<run>/wandb`, which the user may send with `wandb sync`.

It goes online only if the user has set WANDB_MODE: being logged in doesn't mean that this run may be sent. Host name,
user name, code and git state are never collected.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from suanli.core import console
from suanli.core.errors import MachineError, pip_install
from suanli.core.types import Tracker


class WeightsAndBiases(Tracker):
    @classmethod
    def why_not(cls) -> str | None:
        return None if importlib.util.find_spec("wandb") else pip_install("wandb>=0.19")

    def __init__(self, run_path: Path, config: Mapping[str, object]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        chosen = "WANDB_MODE" in os.environ
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "suanli"),
                name=run_path.resolve().name,
                dir=str(run_path),
                mode=None if chosen else "offline",
                config=dict(config),
                reinit="finish_previous",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    disable_code=True,
                    disable_job_creation=True,
                    x_disable_meta=True,
                    host="localhost",  # else the name of the machine goes into the record
                    x_disable_stats=True,
                ),
            )
        except wandb.errors.Error as error:
            raise MachineError(
                f"Weights & Biases can't start: {error}.",
                fix="Unset WANDB_MODE to write offline, or train without --track wandb.",
            ) from error
        if not chosen:
            console.say(f"Weights & Biases writes offline; to send it: wandb sync {self._run.settings.sync_dir}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKER = WeightsAndBiases
