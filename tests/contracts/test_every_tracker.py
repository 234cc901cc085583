"""The contract of every tracker: it says how to install it, takes what a run logs, and needs no network."""

import math
from pathlib import Path

import pytest

from suanli.core import registry
from suanli.core.types import Recipe, Tracker

pytestmark = [
    # Their own deprecated calls are not ours to fix; ours would name a file of suanli.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!suanli)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(?!suanli)"),
]


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=registry.names("trackers"))
def tracker(request: pytest.FixtureRequest) -> type[Tracker]:
    loaded = registry.load("trackers", request.param)
    assert issubclass(loaded, Tracker)
    return loaded


@pytest.fixture
def installed(tracker: type[Tracker]) -> type[Tracker]:
    if command := tracker.why_not():
        pytest.skip(f"needs: {command}")
    return tracker


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_missing_package_is_reported_with_its_install_command(tracker: type[Tracker]) -> None:
    reason = tracker.why_not()
    assert reason is None or " -m pip install " in reason


def test_writes_below_the_run_only(installed: type[Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, elsewhere = tmp_path / "digits-1", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    writer = installed(run, Recipe(name="contract").model_dump(mode="json"))
    writer.log({"loss": 1.5, "examples_per_s": 1e5}, step=1)
    writer.log({"loss": 0.5, "val/accuracy": 0.9}, step=2)
    writer.close()
    assert sum(files(run).values()) > 0
    assert not files(elsewhere)


def test_takes_a_diverged_loss_and_nothing_at_all(installed: type[Tracker], tmp_path: Path) -> None:
    writer = installed(tmp_path, {})
    writer.log({}, step=0)
    writer.log({"loss": math.nan, "peak": math.inf}, step=1)
    writer.close()


def test_a_resumed_run_logs_the_same_step_again(installed: type[Tracker], tmp_path: Path) -> None:
    for _ in range(2):
        writer = installed(tmp_path, {"lr": 0.1})
        writer.log({"loss": 1.0}, step=5)
        writer.close()
    assert files(tmp_path)
