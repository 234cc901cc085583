"""One process of a group in tests: trains some steps of each training in its argument and prints the results as JSON.

python member.py '[{"data": "digits", "settings": {...}, "steps": 50, "speedups": "none"}, …]'

`save` and `resume` are folders of checkpoints: `save` gets a checkpoint after each number of steps in `save_at`.
`double` trains in float64, where rounding errors are far smaller than any mistake. In float32, training amplifies them:
Muon orthogonalises in bfloat16 where that is fast, and the losses of equal trainings differ by a thousandth after ten
steps. `compare` compares the numbers of the first step with those of the training before.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from suanli.compute.plan_trial import difference
from suanli.compute.step_runner import Numbers, apply_settings
from suanli.machine import device
from suanli.parallel import dtensor
from suanli.parallel.group import Group, join_group, leave_group
from suanli.training import checkpoint
from suanli.training.checkpoint_writer import ShardWriter, Writer
from suanli.training.prepare import DataOptions, resolve
from suanli.training.session import Session, TrainingSpec
from suanli.training.validation import validate


def main(every: list[dict]) -> list[dict]:
    torch.set_num_threads(1)
    group = join_group("cpu")
    numbers: list[Numbers] = []  # of the first step of each training with `compare`
    results = []
    for options in every:
        with double() if options.get("double") else nullcontext():
            results.append(train(options, group, numbers))
    group.barrier()
    leave_group()
    return results


@contextmanager
def double() -> Iterator[None]:
    """Networks that are built and called inside the block compute in float64."""

    def cast(_: torch.nn.Module, inputs: tuple) -> tuple:
        return tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    torch.set_default_dtype(torch.float64)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(cast)
    try:
        yield
    finally:
        hook.remove()
        torch.set_default_dtype(torch.float32)


def train(options: dict, group: Group, numbers: list[Numbers]) -> dict:
    group.shares = () if group.is_alone else tuple(options.get("shares", ()))
    data = DataOptions.of(options["data"], data_dir=None, cache_dir=None)
    recipe, prepared = resolve(data, recipe=options.get("recipe"), settings=options["settings"], announce=False)
    spec = TrainingSpec(
        recipe=recipe,
        prepared=prepared,
        device=device.detect("cpu"),
        cache=Path("unused"),
        requested=options.get("speedups", "none"),
        threads=1,
        checkpoint=checkpoint.read_newest(Path(options["resume"])) if "resume" in options else None,
        group=group,
        shard=options.get("shard", False) and not group.is_alone,
    )
    session = Session(spec)
    loop, losses = session.loop, []
    writer = ShardWriter(group) if spec.shard else Writer()
    result = {}
    with apply_settings(loop.compute):
        if options.get("compare"):
            numbers.append(loop.compute_numbers())
            result["difference"] = difference(numbers[-2:][0], numbers[-1])  # to the training before
        before = received_bytes(group)
        for loss in loop.run():
            losses.append(loss)
            if len(losses) in options.get("save_at", ()):
                state = loop.state()
                if spec.shard or group.is_first:
                    writer.save(Path(options["save"]), loop.progress.step, *state)
                    writer.commit()
                group.barrier()
            if len(losses) == options["steps"]:
                break
        result["received_bytes"] = received_bytes(group) - before
    scores = validate(loop)
    every = (dtensor.gather(t) for t in loop.model.state_dict().values())
    weights = b"".join(t.contiguous().numpy().tobytes() for t in every)
    parameters = list(loop.model.parameters())
    return result | {
        "losses": losses,
        "scores": scores,
        "parameters": sum(p.numel() for p in parameters),
        "held": sum(dtensor.local_part(p).numel() for p in parameters) / sum(p.numel() for p in parameters),
        "speedups": session.plan.speedups,
        "validated": len(loop.val_feed),
        "mine": loop.batch_size,
        "whole": loop.order.batch_size,
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def received_bytes(group: Group) -> int:
    """What all processes received through the loopback of this machine so far."""
    group.barrier()
    lines = Path("/proc/net/dev").read_text().splitlines() if sys.platform == "linux" else []
    return sum(int(line.split()[1]) for line in lines if line.lstrip().startswith("lo:"))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
