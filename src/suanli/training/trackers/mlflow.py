"""MLflow: writes to MLFLOW_TRACKING_URI if the user has set it, else to files in `<run>/mlruns`.

It uses a client object, not MLflow's global current run, so two runs in one process don't mix. If a server fails during
the run, only MLflow loses metrics: training goes on, and they are all in metrics.jsonl.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from pathlib import Path

from suanli.core import console
from suanli.core.errors import MachineError, pip_install
from suanli.core.types import Tracker

_PARAM_LENGTH = 500  # of a value; MLflow refuses longer ones on old servers


class MLflow(Tracker):
    @classmethod
    def why_not(cls) -> str | None:
        return None if importlib.util.find_spec("mlflow") else pip_install("mlflow-skinny>=2.19")

    def __init__(self, run_path: Path, config: Mapping[str, object]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._failure: type[Exception] = MlflowException
        self._broken = False
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs the full package
            uri = (run_path / "mlruns").resolve().as_uri()
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = self._start(run_path.resolve().name)
            for name, value in config.items():
                self._client.log_param(self._run_id, name, str(value)[:_PARAM_LENGTH])
        except MlflowException as error:
            raise MachineError(
                f"MLflow can't write to {uri}: {_first_line(error)}.",
                fix="Check MLFLOW_TRACKING_URI, or train without --track mlflow.",
            ) from error

    def _start(self, run_name: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "suanli")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(experiment_id, run_name=run_name, tags={"mlflow.user": ""})
        return str(run.info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 1_000_000
        values = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        if self._broken or not values:
            return
        try:
            self._client.log_batch(self._run_id, metrics=values)
        except self._failure as error:
            self._broken = True
            console.warn(f"MLflow gets no more metrics of this run: {_first_line(error)}.")

    def close(self) -> None:
        if self._broken:
            return
        try:
            self._client.set_terminated(self._run_id)
        except self._failure as error:
            console.warn(f"MLflow doesn't know that the run has ended: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


TRACKER = MLflow
