"""Weights to start from where the user names none: which help such data, and by how much that usually is."""

from __future__ import annotations

import os
from dataclasses import replace

from suanli.core.console import say, warn
from suanli.core.errors import MachineError, SuanliError, UsageError
from suanli.core.types import Pretrained, Traits, UsualWeights
from suanli.models import weights
from suanli.training.options import RecipeOptions
from suanli.training.recipe import find_choice

NONE = "none"  # in place of a name: start from nothing
VARIABLE = "SUANLI_WEIGHTS"  # of the environment: what is named where the user names nothing
OWN_NETWORK = ("model", "model_args", "weights")  # fields of a recipe with which the user chooses a network


def choose_weights(traits: Traits | None, learned: RecipeOptions) -> Pretrained | None:
    """Those that the user named; else those that usually help data of these `traits`, where this machine has them, for
    which it never reaches for the network. None: no weights, and a remark where some would help."""
    named = os.environ.get(VARIABLE) if learned.weights is None else learned.weights
    if named:
        return None if str(named) == NONE else weights.find(named)
    fields = {name.partition(".")[0] for name in learned.changes}
    if (model := str(learned.changes.get("model", ""))).startswith("timm:") and "weights" not in fields:
        say(f"{model} is built without weights; to start from its publisher's: --weights {model}")
    if traits is None or learned.target_accuracy is not None or fields.intersection(OWN_NETWORK):
        return None
    usual = _find_usual(traits)
    if usual is None:
        return None
    reason, gain = usual.reason(traits), usual.gain(traits)
    if reason is None and gain is None:
        return None
    try:
        found = weights.find(usual.name)
    except MachineError as error:
        if gain is not None:
            say(f"{gain} {error.fix}")
        return None
    except SuanliError as error:  # such as a damaged package: the user didn't ask for it
        warn(f"Training starts from nothing: {error.message} {error.fix}")
        return None
    if reason is not None:
        say(f"weights: {found.title or found.name}, since {reason}; from nothing: --weights {NONE}")
        return found
    say(f"{gain} To start from them: --weights {usual.name}")
    return None


def _find_usual(traits: Traits) -> UsualWeights | None:
    try:
        return find_choice(replace(traits, weights=True)).weights
    except UsageError:  # no recipe starts from weights
        return None
