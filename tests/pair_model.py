"""A network with two inputs and two outputs, of a kind of data and a task that a test registers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registered import forget
from suanli.core import registry
from suanli.core.types import Recipe
from suanli.models.model_folder import save_model

PREPROCESS = """
from dataclasses import dataclass
from suanli.core.schema import Column
from suanli.core.types import Preprocess

@dataclass(frozen=True, kw_only=True)
class Pair(Preprocess):
    kind = "pair"
    inputs = {
        "image": Column(shape=(8, 8, 1), dtype="uint8", role="image"),
        "tokens": Column(shape=(5,), dtype="int32", role="tokens", limit=20),
    }
    input_shape, model_args = (1, 8, 8), {}
    def to_model(self, inputs):
        return {"image": inputs["image"].permute(0, 3, 1, 2).float() / 255, "tokens": inputs["tokens"]}
    fit = encode = measure = preview = find_inputs = None

PREPROCESS = Pair
"""
TASK = """
from dataclasses import dataclass
import numpy as np
from suanli.core.schema import Column
from suanli.core.task import Metric, Task

@dataclass(frozen=True, kw_only=True)
class Place(Task):
    name = annotation = "place"
    metric = Metric(name="mae", tolerance=0.02, relative=True, higher_is_better=False, unit="")
    model_args = targets = {}
    outputs = {
        "price": Column(shape=(), dtype="float32", role="value"),
        "boxes": Column(shape=(2, 4), dtype="float32", role="boxes"),
    }
    def predict(self, outputs):
        features, price = outputs
        boxes = features.reshape(-1, 2, 4) @ features.new_ones(4, 4)  # a product that must stay in float32
        return {"price": 300_000 + 50_000 * price.float().squeeze(1), "boxes": boxes.float()}
    def drift(self, expected, answered):
        parts = [np.abs(answered[n] - expected[n]).reshape(len(answered[n]), -1).mean(1) / np.ptp(expected[n])
                 for n in self.outputs]
        return np.mean(parts, axis=0)
    answer = count_targets = describe_target = encode = errors = guessing_loss = loss = records = scores = None

TASK = Place
"""
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.again = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.words = nn.Embedding(20, 16)
        self.boxes, self.price = nn.Linear(16, 8), nn.Linear(16, 1)

    def forward(self, image, tokens):
        features = self.again(self.conv(image).relu()).relu().mean((2, 3)) + self.words(tokens).mean(1)
        return self.boxes(features), self.price(features)

def build():
    torch.manual_seed(0)
    return Net()
"""


@contextmanager
def saved_pair(folder: Path) -> Iterator[Path]:
    """`folder`, with the network in `model`. Inside, kind and task are registered, in this process and those that it
    starts. Loading it needs `trust_code`."""
    code = ""
    with pytest.MonkeyPatch.context() as patched:
        for package, name, text in (("data.preprocess", "pair", PREPROCESS), ("tasks", "place", TASK)):
            place = folder / package
            place.mkdir()
            (place / f"{name}.py").write_text(text)
            module = importlib.import_module(f"suanli.{package}")
            code += f"import suanli.{package}\nsuanli.{package}.__path__ = {[*module.__path__, str(place)]!r}\n"
            patched.setattr(module, "__path__", [*module.__path__, str(place)])
        (folder / "pair_network.py").write_text(NETWORK)
        (folder / "sitecustomize.py").write_text(code)  # read by every Python process that has the folder on its path
        patched.syspath_prepend(folder)
        registry.names.cache_clear()
        recipe = Recipe(model="pair_network:build", task="place")
        preprocess, task = registry.load("preprocess", "pair")(), registry.load("tasks", "place")()
        network = importlib.import_module("pair_network").build()
        save_model(folder / "model", network, recipe=recipe, preprocess=preprocess, task=task, data={})
        yield folder
    forget("tasks", ["place"])
    forget("preprocess", ["pair"])
