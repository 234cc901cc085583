"""The model card that every finished run carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import suanli


def test_the_card_tells_score_use_and_command(picture_folder: Callable[..., Path]) -> None:
    run = suanli.run(picture_folder(), epochs=2, out="made")
    card = (run.path / "README.md").read_text()
    assert f"accuracy: {100 * run.scores['accuracy']:.1f} %" in " ".join(card.split())
    assert card.count("(95 % interval") == len(run.scores)
    assert "suanli predict made" in card
    assert "class0, class1" in card
    assert "image = ImageOps.exif_transpose(Image.open(path)).convert('RGB')" in card


def test_a_class_name_stays_text(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    (root / "class0").rename(root / "<b>a|b`c*")
    run = suanli.run(root, epochs=1, out="made")
    card = (run.path / "README.md").read_text()
    assert r"\<b\>a\|b\`c\*" in card


def test_without_an_evaluation_it_says_so(picture_folder: Callable[..., Path]) -> None:
    run = suanli.train(picture_folder(), epochs=1, out="made")
    suanli.report(run)
    assert "Not evaluated on the test split yet" in (run.path / "README.md").read_text()
