"""YOLO: a text for each image with a line for each box, and data.yaml, which names the classes.

A line is the class's number, the middle of the box and its sides as shares of the image's, and the probability. An
image without boxes has an empty text. Put the images into images/ beside labels/, and it is a data set.
"""

from __future__ import annotations

import json

from suanli.core.types import Preprocess, Raw
from suanli.engines.answer_format import AnswerFormat, Classes
from suanli.engines.predictor import Prediction


def file(prediction: Prediction, raw: Raw, kind: type[Preprocess], classes: Classes) -> tuple[str, bytes]:
    height, width = kind.size_of(raw)
    lines = []
    for box in prediction.values["boxes"]:
        left, top, right, bottom = box["box"]
        shares = (
            (left + right) / 2 / width,
            (top + bottom) / 2 / height,
            (right - left) / width,
            (bottom - top) / height,
        )
        numbers = " ".join(f"{share:.6f}" for share in (*shares, box["probability"]))
        lines.append(f"{classes.index(box['label'])} {numbers}\n")
    return ".txt", "".join(lines).encode()


def describe(classes: Classes) -> dict[str, bytes]:
    """Names in quotes, as JSON has them, are YAML whatever they hold."""
    names = "".join(f"  {i}: {json.dumps(name, ensure_ascii=False)}\n" for i, name in enumerate(classes))
    text = f"path: .\ntrain: images\nval: images\nnc: {len(classes)}\nnames:\n{names}"
    return {"data.yaml": text.encode(errors="backslashreplace")}


ANSWER_FORMAT = AnswerFormat(name="yolo", title="YOLO", kinds=("boxes",), file=file, folder="labels", beside=describe)
