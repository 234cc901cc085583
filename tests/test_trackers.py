"""Reads what each tracker wrote, with the tracker's own reader."""

import getpass
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from suanli.core import registry
from suanli.core.errors import MachineError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!suanli)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(?!suanli)"),
]
LOGGED = [({"loss": 1.5}, 1), ({"loss": 0.5, "val/accuracy": 0.875}, 2)]


def write(name: str, run: Path) -> None:
    tracker = registry.load("trackers", name)
    if command := tracker.why_not():
        pytest.skip(f"needs: {command}")
    run.mkdir(exist_ok=True)
    writer = tracker(run, {"lr": 0.1, "augment": ["flip"]})
    for metrics, step in LOGGED:
        writer.log(metrics, step)
    writer.close()


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    write("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("val/accuracy")] == [(2, 0.875)]
    assert b'"lr": 0.1' in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


@pytest.fixture
def no_mlflow_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.mark.usefixtures("no_mlflow_settings")
def test_mlflow_reads_it_back(tmp_path: Path) -> None:
    write("mlflow", tmp_path / "run")
    _check_mlflow((tmp_path / "run" / "mlruns").as_uri())


@pytest.mark.usefixtures("no_mlflow_settings")
def test_mlflow_follows_the_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (tmp_path / "chosen").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", chosen)
    write("mlflow", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    _check_mlflow(chosen)


def _check_mlflow(uri: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("suanli")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {"lr": "0.1", "augment": "['flip']"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.5), (2, 0.5)]


def test_mlflow_that_cannot_start_fails_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    with pytest.raises(MachineError, match=r"gopher://nowhere.*--track mlflow"):
        write("mlflow", tmp_path / "run")


def test_wandb_is_offline_and_sends_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write("wandb", tmp_path / "run")
    import wandb

    wandb.teardown()  # ends its writing process, so that the file is whole
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    content = record.read_bytes()
    assert b"val/accuracy" in content
    assert b"0.875" in content
    strings = set(re.findall(rb"[\w.-]{2,}", content))
    assert b"localhost" in strings
    assert not {platform.node().encode(), getpass.getuser().encode()} & strings


def test_listing_trackers_imports_none_of_them() -> None:
    code = (
        "import sys, json; from suanli.core import registry as plugins;"
        "[tracker.why_not() for tracker in plugins.load_all('trackers').values()];"
        "print(json.dumps(sorted({'torch', 'mlflow', 'wandb', 'tensorboard'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
