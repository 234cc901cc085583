"""Weights to start from, by name: what `--weights` takes."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path

from suanli.core import registry
from suanli.core.console import say, warn
from suanli.core.errors import UsageError, nearest
from suanli.core.types import AnyPath, Json, Pretrained, WeightsSource

HERE_ONLY = ("file", "preprocess", "fitted_preprocess", "classes", "model_args")  # fields that no reader of a run needs
FORMS = "imagenet, timm:NAME, hf:ORG/NAME, or a run, a model/ folder or a .safetensors file"


def find(name: AnyPath) -> Pretrained:
    """What `--weights` names. Raises UsageError for a name that no source knows, and what the sources raise."""
    text = os.fspath(name)  # of a run, too
    for source in _sources():
        if (found := source.find(text)) is not None:
            return found
    near = nearest(text, ["imagenet", *present()], count=3)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        near.append(f"hf:{text}")
    mean = f"Did you mean {' or '.join(near)}? " if near else ""
    if Path(text).suffix or "/" in text or "\\" in text:
        raise UsageError(f"There is nothing at {text}.", fix=f"{mean}Check the path, or give {FORMS}.")
    raise UsageError(f"There are no weights {text!r}.", fix=f"{mean}Give {FORMS}.")


def present() -> list[str]:
    """The names of all weights that are on this machine already."""
    return [name for source in _sources() for name in source.present()]


def announce(found: Pretrained) -> None:
    """Says what these weights are and who may use them, before they are trained further."""
    facts = [found.title or found.name]
    if found.accuracy is not None:
        facts.append(f"{found.accuracy:.1%} on ImageNet-1k, says its publisher")
    if found.licence:
        facts.append(f"licence {found.licence}")
    elif found.homepage:
        facts.append("no licence stated")
    say(f"weights: {', '.join(facts)}")
    if found.commercial is None and found.homepage:
        say(f"whether that allows commercial use isn't known: read the terms at {found.homepage}")
    if found.commercial is False:
        warn(
            f"the licence of these weights, {found.licence}, forbids commercial use, and so, as a rule, that of a "
            f"model that is trained from them. {found.homepage}".rstrip()
        )


def describe(found: Pretrained) -> dict[str, Json]:
    """What a run and its model keep of the weights that they started from: whose they are, and who may use them. It
    names no place on this machine."""
    record = {name: value for name, value in asdict(found).items() if name not in HERE_ONLY}
    if Path(found.name).is_absolute():
        record["name"] = found.title
    return record


def _sources() -> list[WeightsSource]:
    sources: list[WeightsSource] = list(registry.load_all("pretrained").values())
    return sorted(sources, key=lambda one: one.order)
