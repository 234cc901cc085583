"""Examples as people see them: the cached input, its geometry and its target, as plain values for a report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from suanli.core.answers import Answer
from suanli.core.schema import Arrays, Geometry, example_of
from suanli.core.task import Task
from suanli.core.types import Json, Preprocess, Preview, Split
from suanli.data.windows import input_of

FILE = "samples.json"
COUNT = 12


class PreviewValues(TypedDict):
    media_type: str
    base64: str


class AnswerValues(TypedDict):
    """The fields of an `Answer` that the report draws."""

    kind: str
    text: str
    values: Json


class View(TypedDict):
    """What a preview shows: a coordinate c of axis a of the input is c * scale[a] + shift[a] there."""

    size: Sequence[int]  # of the cached input
    scale: Sequence[float]
    shift: Sequence[float]


class Shown(TypedDict):
    view: View
    preview: PreviewValues


def show_input(preprocess: Preprocess, task: Task, inputs: Arrays, geometry: Geometry) -> Shown:
    """With more details where the task's answers are places."""
    size = next(iter(inputs.values())).shape[: len(geometry.size)]
    preview = preprocess.close_up(inputs) if task.shows_places else preprocess.preview(inputs)
    return {
        "view": {"size": size, "scale": geometry.scale, "shift": geometry.shift},
        "preview": preview_values(preview),
    }


def preview_values(preview: Preview) -> PreviewValues:
    return {"media_type": preview.media_type, "base64": base64.b64encode(preview.content).decode()}


def answer_values(answer: Answer) -> AnswerValues:
    return {"kind": answer.kind, "text": answer.text, "values": answer.values}


def choose(split: Split, count: int = COUNT) -> list[int]:
    """Positions of examples, the same in each call."""
    positions: list[int] = np.random.default_rng(0).permutation(len(split))[:count].tolist()
    return positions


def describe_target(task: Task, split: Split, position: int) -> Answer:
    geometry = Geometry.from_array(split.geometries[position])
    return task.describe_target(example_of(split.targets, position), geometry)


def list_samples(preprocess: Preprocess, task: Task, split: Split) -> list[dict[str, Json]]:
    """Some examples with their targets: `name`, `expected`, `view`, `preview`."""
    return [
        {
            "name": split.names[position],
            "expected": answer_values(describe_target(task, split, position)),
            **show_input(
                preprocess,
                task,
                input_of(split, position, preprocess),
                Geometry.from_array(split.geometries[position]),
            ),
        }
        for position in choose(split)
    ]
