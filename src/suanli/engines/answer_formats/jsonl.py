"""JSON Lines: an object for each input, as `--json` gives it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from suanli.core.storage import json_bytes
from suanli.engines.answer_format import AnswerFormat, Classes
from suanli.engines.predictor import Prediction


def lines(predictions: Iterable[Prediction], classes: Classes, annotations: Path | None) -> Iterator[str]:  # noqa: ARG001
    for prediction in predictions:
        yield json_bytes(prediction.to_json()).decode().rstrip()


ANSWER_FORMAT = AnswerFormat(name="jsonl", title="JSON Lines", lines=lines)
