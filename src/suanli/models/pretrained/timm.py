"""Weights that timm knows: timm:NAME or timm:NAME.TAG, as `timm.list_pretrained()` lists them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from suanli.core.errors import MachineError, UsageError, pip_install, suggest, unknown
from suanli.core.types import Pretrained, WeightsSource
from suanli.models.conversion import file_checksum
from suanli.models.pretrained import _hub
from suanli.models.pretrained._published import find_network, open_weights, read_facts, timm_settings
from suanli.models.timm_import import import_timm

PREFIX = "timm:"
DATA = {  # by the parts of a tag that name data, for repositories that don't state it
    "in1k": "imagenet-1k",
    "in12k": "imagenet-12k",
    "in21k": "imagenet-21k",
    "in22k": "imagenet-22k",
    "lvd142m": "lvd-142m",
    "laion2b": "laion-2b",
}


def find(name: str) -> Pretrained | None:
    """timm's configuration says where the file is and how images are prepared; the network is ours where ours reads the
    file, else timm's. "@COMMIT" is one revision of the file."""
    if not name.startswith(PREFIX):
        return None
    if find_spec("timm") is None:
        raise MachineError(f"Weights {name!r} need timm.", fix=f"Install it: {pip_install('suanli[timm]')}")
    wanted, _, revision = name.removeprefix(PREFIX).partition("@")
    known = _configuration(wanted)
    full = f"{known.architecture}.{known.tag}" if known.tag else known.architecture
    if not known.hf_hub_id:
        raise MachineError(
            f"timm has no weights of {wanted!r} on a hub{f', only {known.url}' if known.url else ''}.",
            fix="Choose others: timm.list_pretrained() names them. A pickle that you have goes through suanli convert.",
        )
    repo = known.hf_hub_id if not known.hf_hub_id.endswith("/") else f"{known.hf_hub_id}{full}"
    safe_name = known.hf_hub_filename if str(known.hf_hub_filename).endswith(".safetensors") else None
    snapshot = _hub.fetch(repo, revision=revision or None, file=safe_name)
    published = read_facts(snapshot.folder)
    tags = (known.tag or "").split("_")
    published = replace(
        published,
        config={"architecture": known.architecture, "pretrained_cfg": {}, **published.config},
        preprocess=timm_settings(known.to_dict()),
        licence=known.license or published.licence,
        learned_from=published.learned_from or tuple(DATA[tag] for tag in tags if tag in DATA),
    )
    file = open_weights(snapshot.folder, snapshot.weights)
    model, args = find_network(file, published)
    return Pretrained(
        name=f"{PREFIX}{full}@{snapshot.commit}",
        file=file,
        model=model,
        model_args=args,
        title=f"timm {full}",
        homepage=snapshot.homepage,
        revision=snapshot.commit,
        checksum=file_checksum(file),
        **published.stated,
    )


def _configuration(wanted: str) -> Any:
    """timm's `PretrainedCfg` of a name, with or without tag. Raises UsageError for one that it doesn't know."""
    timm = import_timm()
    architecture = wanted.partition(".")[0]
    if not timm.is_model(architecture):
        raise unknown("timm model", architecture, timm.list_models(pretrained=True))
    try:
        known = timm.models.get_pretrained_cfg(wanted)
    except RuntimeError:  # a tag that this architecture doesn't have
        known = None
    if known is None:
        allowed = timm.list_pretrained(f"{architecture}.*")
        raise UsageError(f"timm has no weights {wanted!r}.", fix=suggest(wanted, allowed))
    return known


SOURCE = WeightsSource(name="timm", find=find, order=20)
