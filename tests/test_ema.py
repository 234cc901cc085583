"""Averages of weights."""

from __future__ import annotations

import torch
from torch import nn

from suanli.training.ema import WeightAverage


def test_the_average_follows_tensors_that_a_plan_replaces() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average = WeightAverage(model, 0.75)
    before = average.tensors["0.weight"].clone()
    model.to(memory_format=torch.channels_last)  # the parameters have other memory from here on
    with torch.no_grad():
        model[0].weight += 4
        model[1].num_batches_tracked += 7
    average.update(10_000)
    torch.testing.assert_close(average.tensors["0.weight"], before + 1)
    assert average.tensors["1.num_batches_tracked"] == 7
