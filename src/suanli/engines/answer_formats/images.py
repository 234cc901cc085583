"""Images with the answers drawn on them, in their own size."""

from __future__ import annotations

from suanli.core.types import Preprocess, Raw
from suanli.engines.answer_format import AnswerFormat, Classes
from suanli.engines.predictor import Prediction


def file(prediction: Prediction, raw: Raw, kind: type[Preprocess], classes: Classes) -> tuple[str, bytes]:
    assert prediction.answer is not None
    drawn = kind.draw(raw, prediction.answer, classes)
    return f".{drawn.media_type.partition('/')[2].replace('jpeg', 'jpg')}", drawn.content


ANSWER_FORMAT = AnswerFormat(name="images", title="images with answers drawn on them", file=file)
