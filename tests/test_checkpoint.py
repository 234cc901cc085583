"""Checkpoints are restored bit by bit, and a damaged one is never mistaken for an intact one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core.errors import DamagedFile, StorageError
from suanli.training import checkpoint

TENSORS = {"model.weight": torch.randn(3, 4), "model.count": torch.tensor(7), "ema.weight": torch.randn(3, 4)}


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save_step(tmp_path, 12, TENSORS, {"loop": {"step": 12, "best": None}})
    saved = checkpoint.read(path)
    assert saved.step == 12
    assert saved.progress == {"loop": {"step": 12, "best": None}}
    assert all(torch.equal(saved.tensors[k], v) for k, v in TENSORS.items())


def test_tied_weights_are_stored(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    path = checkpoint.save_step(tmp_path, 1, {"model.a": weight, "model.b": weight, "model.c": weight.T}, {})
    assert torch.equal(checkpoint.read(path).tensors["model.c"], weight.T)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save_step(tmp_path, step, TENSORS, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002.safetensors", "step-00000003.safetensors"]


def test_a_checkpoint_of_a_later_step_is_removed(tmp_path: Path) -> None:
    for step in (10, 30, 20):
        checkpoint.save_step(tmp_path, step, TENSORS, {})
    assert checkpoint.read_newest(tmp_path).step == 20  # type: ignore[union-attr]


@given(cut=st.floats(0, 0.999))
def test_any_truncation_is_noticed_and_the_checkpoint_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, cut: float
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save_step(folder, 1, TENSORS, {})
    newest = checkpoint.save_step(folder, 2, TENSORS, {})
    newest.write_bytes(newest.read_bytes()[: int(newest.stat().st_size * cut)])
    saved = checkpoint.read_newest(folder)
    assert saved is not None
    assert saved.step == 1


def test_only_damaged_checkpoints_are_an_error_but_none_is_not(tmp_path: Path) -> None:
    assert checkpoint.read_newest(tmp_path / "nowhere") is None
    path = checkpoint.save_step(tmp_path, 1, TENSORS, {})
    path.write_bytes(b"rubbish")
    with pytest.raises(DamagedFile, match="is damaged"):
        checkpoint.read_newest(tmp_path)


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoint.save_step(tmp_path, 1, TENSORS, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        checkpoint.save_step(tmp_path / "file", 2, TENSORS, {})
    assert checkpoint.read_newest(tmp_path).step == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
])  # fmt: skip
def test_an_optimizer_resumes_exactly(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def steps(weight: torch.Tensor, optimizer: torch.optim.Optimizer, count: int) -> None:
        for i in range(count):
            optimizer.zero_grad()
            ((weight - i) ** 2).sum().backward()
            optimizer.step()

    straight = torch.nn.Parameter(torch.arange(6.0))
    steps(straight, make([straight]), 3)
    broken = torch.nn.Parameter(torch.arange(6.0))
    optimizer = make([broken])
    steps(broken, optimizer, 3)
    tensors, plain = checkpoint.optimizer_state(optimizer)
    saved = checkpoint.read(checkpoint.save_step(tmp_path, 3, tensors, {"optimizer": plain}))
    fresh = make([broken])
    checkpoint.load_optimizer(fresh, saved.tensors, saved.progress["optimizer"])
    whole = make([straight])
    whole.load_state_dict(optimizer.state_dict())
    steps(straight, whole, 4)
    steps(broken, fresh, 4)
    assert torch.equal(straight, broken)
