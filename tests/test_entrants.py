"""Which plans race: by what each precision was measured to reach on this machine, and what was best before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import suanli
from suanli.compute.entrants import MOST, combinations, cost
from suanli.compute.plan_cache import CachedPlan, PlanCache
from suanli.core import registry
from suanli.core.types import Plan
from suanli.machine import peak, precisions
from suanli.machine.device import detect
from suanli.machine.precisions import Precisions

HERE = detect("cpu")
RACED = {n: registry.load("speedups", n) for n in ("channels_last", "bf16", "onednn_bf16", "allocator")}


def test_precisions_are_measured_once_for_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    rates = precisions.measure(HERE, tmp_path)
    assert torch.get_num_threads() == threads
    assert rates.products["float32"] > 0
    assert rates.gain("float32", convolves=True) == rates.gain("float32", convolves=False) == 1
    assert rates.gain("float64", convolves=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(precisions, "_measure", lambda _: pytest.fail("it was measured before"))
        assert precisions.measure(HERE, tmp_path) == rates
    (kept,) = (tmp_path / "probe").glob("precisions-*.json")
    kept.write_text("{")
    assert precisions.measure(HERE, tmp_path).products["float32"] > 0  # what is damaged is measured again


def test_a_limit_on_the_instructions_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak.fingerprint(HERE)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert peak.fingerprint(HERE) != before


def test_those_that_promise_most_come_first() -> None:
    field = combinations(("fused_optimizer",), RACED, {"bf16": 3.0, "onednn_bf16": 1.3})
    assert len(field) == len(set(field)) == 2 * 2 * 3 + 1
    assert field[0] == ("allocator", "channels_last", "bf16", "fused_optimizer")
    assert field[-1] == ()  # plain PyTorch, without the speedups that all others have
    assert not any({"bf16", "onednn_bf16"} <= set(names) for names in field)
    slow = combinations((), RACED, {"bf16": 0.9, "onednn_bf16": 0.95})
    assert slow[0] == ("allocator", "channels_last")
    assert cost(slow, RACED, {"bf16": 0.9}) > cost(field, RACED, {"bf16": 3.0})


def test_what_was_best_for_similar_trainings_comes_first_and_the_field_is_limited() -> None:
    known = ("channels_last", "onednn_bf16")
    assert combinations((), RACED, {"bf16": 3.0}, [known])[0] == known
    more = ("fused_optimizer", "read_ahead", "whole_batch", "cudnn_benchmark")
    many = RACED | {n: replace(registry.load("speedups", n), raced=True, switchable=True) for n in more}
    assert len(combinations((), many, {})) <= MOST


def speed_up_plan(cache: Path) -> Plan:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2))
    batch = torch.randn(4, 3, 8, 8), torch.arange(4) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy
    step, plan = suanli.speed_up(model, optimizer, loss, batch, steps=20, cache_dir=cache)
    step.close()
    return plan


@pytest.mark.skipif("bfloat16" not in HERE.fast_dtypes, reason="this processor has no bfloat16")
@pytest.mark.parametrize(("rate", "used"), [(4e11, True), (1.05e11, False), (0.5e11, False)])
def test_a_precision_that_isnt_faster_here_is_in_no_short_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, used: bool
) -> None:
    rates = {"float32": 1e11, "bfloat16": rate}
    monkeypatch.setattr(precisions, "measure", lambda *_: Precisions(products=rates, convolutions=rates))
    plan = speed_up_plan(tmp_path)
    assert plan.origin == "short list"
    assert ("bf16" in plan.speedups) == used
    assert "channels_last" in plan.speedups
    if rate < 1e11:
        assert plan.dropped["bf16"] == "measured here, bfloat16 is 0.50 times as fast as float32"


def test_plans_of_the_same_family_are_known(tmp_path: Path) -> None:
    def store(key: str, family: str, *speedups: str) -> None:
        plan = Plan(device="cpu", speedups=speedups)
        PlanCache(tmp_path, key, None, family).write(CachedPlan(plan=plan, complete=True))

    store("a", "resnets", "channels_last")
    store("b", "others", "bf16")
    store("c", "resnets", "allocator", "channels_last")
    mine = PlanCache(tmp_path, "c", None, "resnets")
    assert mine.similar() == [("channels_last",)]  # of the others, and not its own
    assert PlanCache(tmp_path, "new", None, "resnets").similar(most=1) != []
    assert PlanCache(tmp_path, "new", None, "unknown").similar() == []
    (tmp_path / "plans" / "a.json").write_text("[")
    assert mine.similar() == []
