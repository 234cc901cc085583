"""Weights that someone published on a hub: hf:ORG/NAME, hf:ORG/NAME@REVISION, hf:ORG/NAME/FILE.safetensors."""

from __future__ import annotations

import re

from suanli.core.errors import UsageError
from suanli.core.types import Pretrained, WeightsSource
from suanli.models.conversion import file_checksum
from suanli.models.pretrained import _hub
from suanli.models.pretrained._published import find_network, open_weights, read_facts


def find(name: str) -> Pretrained | None:
    if not name.startswith(_hub.PREFIX):
        return None
    parts = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?", name)
    if parts is None or ".." in name:
        raise UsageError(
            f"{name!r} is no name of weights on a hub.",
            fix="Write hf:ORG/NAME, or hf:ORG/NAME@REVISION for one revision.",
        )
    repo, file, revision = parts.groups()
    snapshot = _hub.fetch(repo, revision=revision, file=file)
    published = read_facts(snapshot.folder)
    weights = open_weights(snapshot.folder, snapshot.weights)
    model, args = find_network(weights, published)
    return Pretrained(
        name=f"hf:{repo}{f'/{file}' if file else ''}@{snapshot.commit}",
        file=weights,
        model=model,
        model_args=args,
        title=repo,
        homepage=snapshot.homepage,
        revision=snapshot.commit,
        checksum=file_checksum(weights),
        **published.stated,
    )


SOURCE = WeightsSource(name="hf", find=find, present=_hub.present, order=30)
