"""One process of a group in tests: trains some steps and prints what it found as JSON.

python member.py '{"data": "digits", "settings": {...}, "steps": 50, "speedups": "none"}'
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from suanli import distributed, hardware
from suanli.learner import active
from suanli.start import Start
from suanli.verbs.prepare import DataOptions, resolve


def main(wanted: dict) -> dict:
    torch.set_num_threads(1)
    device = hardware.detect("cpu")
    group = distributed.join("cpu")
    if "shares" in wanted and not group.alone:
        group.shares = tuple(wanted["shares"])
    options = DataOptions.of(wanted["data"], data_dir=None, cache_dir=None)
    recipe, prepared = resolve(options, recipe=wanted.get("recipe"), settings=wanted["settings"], tell=False)
    start = Start(
        recipe=recipe,
        prepared=prepared,
        device=device,
        cache=Path("unused"),
        requested=wanted.get("speedups", "none"),
        threads=1,
        group=group,
    )
    start.ready()
    loop, losses = start.loop, []
    with active(loop.compute):
        for loss in loop.run():
            losses.append(loss)
            if len(losses) == wanted["steps"]:
                break
    scores = loop.validate()
    weights = b"".join(t.contiguous().numpy().tobytes() for t in loop.model.state_dict().values())
    found = {
        "losses": losses,
        "scores": scores,
        "validated": len(loop.val_feed),
        "mine": loop.batch_size,
        "whole": loop.order.batch_size,
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    group.wait()
    distributed.leave()
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
