"""The number of threads: measured once, then kept, so that a repeat rounds the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import suanli
from suanli.threads import threads


@pytest.fixture
def two_threads() -> None:  # type: ignore[misc]
    with threads(2):
        yield


def plans() -> list[Path]:
    return sorted(Path("cache/plans").glob("*.json"))


@pytest.mark.usefixtures("two_threads")
def test_the_choice_is_measured_once(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    first = suanli.train(root, epochs=1)
    (plan,) = plans()
    measured = json.loads(plan.read_text())
    assert set(measured["step_s"]) == {"1", "2"}
    assert first.summary["plan"]["threads"] == measured["threads"]
    plan.write_text(json.dumps(measured | {"threads": 3 - measured["threads"]}))
    assert suanli.train(root, epochs=1).summary["plan"]["threads"] == 3 - measured["threads"]
    assert torch.get_num_threads() == 2  # as it was before


@pytest.mark.usefixtures("two_threads")
def test_a_damaged_choice_is_measured_again(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    suanli.train(root, epochs=1)
    plans()[0].write_text('{"threads": ')
    assert suanli.train(root, epochs=1).summary["plan"]["threads"] in (1, 2)
    assert json.loads(plans()[0].read_text())["threads"] in (1, 2)


def test_what_the_user_says_is_used_and_kept_on_resume(picture_folder: Callable[..., Path]) -> None:
    run = suanli.train(picture_folder(), epochs=1, threads=2)
    assert run.summary["plan"]["threads"] == 2
    assert plans() == []
    assert suanli.train(run, more_epochs=1).summary["plan"]["threads"] == 2
    with pytest.raises(suanli.UsageError, match="--threads can't be 0"):
        suanli.train(picture_folder("other"), threads=0)
