"""Several processes learn the same as one: same losses and scores, from the same examples."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist

from groups import MEMBER, read_outputs, run_group
from member import main
from suanli.compute.plan import use_threads
from suanli.core.errors import UsageError
from suanli.parallel import group
from suanli.parallel.group import Group

NORMS = {"model": "speednet", "model_args": {"widths": [8, 8, 8]}, "epochs": 5, "batch_size": 90}
CASES = {
    "batch norms, ragged shares, blended pictures": NORMS
    | {"augment": ["crop(padding=1)", "affine(degrees=10)", "cutout", "mixup", "cutmix"]},
    "parts, averages, clipping, balanced classes, frozen layers": NORMS
    | {
        "accumulate": 2,
        "batch_size": 96,
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "task_args": {"class_weights": "balanced"},
        "unfreeze_epochs": 1,
        "layer_lr_decay": 0.8,
    },
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[tuple[str, int], list[tuple[dict, dict]]]:
    """By case and number of processes, the results of each process in float64 and in float32. Starting processes takes
    most of the time, so each group learns all of its cases."""
    results = {}
    with pytest.MonkeyPatch.context() as patched, use_threads(1):
        folder = tmp_path_factory.mktemp("learned")
        patched.chdir(folder)
        patched.setenv("SUANLI_CACHE", str(folder / "cache"))
        for count in (1, 2, 3):
            cases = [case for case in CASES if count < 3 or "mixup" in CASES[case].get("augment", ())]
            # As a faster and a slower machine would have them.
            shares = {"shares": [0.7, 0.3]} if count == 2 else {}
            kinds = [{"steps": 20, "double": True}, {"steps": 2}]
            wanted = [{"data": "digits", "settings": CASES[c], **kind, **shares} for c in cases for kind in kinds]
            every = [main(wanted)] if count == 1 else read_outputs(run_group(count, [str(MEMBER), json.dumps(wanted)]))
            for i, case in enumerate(cases):
                results[case, count] = [(one[2 * i], one[2 * i + 1]) for one in every]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_and_three_processes_learn_the_same_as_one(learned, case):
    ((one, one_single),) = learned[case, 1]
    for count in (2, 3):
        if (every := learned.get((case, count))) is None:
            continue
        for members in zip(*every, strict=True):
            assert len({m["weights"] for m in members}) == 1, "the processes have learned different weights"
            assert sum(m["mine"] for m in members) == one["whole"]
        double, single = every[0]
        # Sums of up to a few thousand terms in another order, each rounded to 2^-53.
        np.testing.assert_allclose(double["losses"], one["losses"], rtol=1e-12)
        assert double["scores"] == pytest.approx(one["scores"], abs=1e-6)  # the answers travel in float32
        np.testing.assert_allclose(single["losses"], one_single["losses"], rtol=1e-5)


@given(st.integers(1, 64), st.integers(1, 4096), st.data())
def test_every_example_of_a_batch_is_computed_once(size, count, data):
    shares = data.draw(st.none() | st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size))
    groups = [Group(rank=r, size=size, shares=tuple(shares or ())) for r in range(size)]
    if count < size:
        with pytest.raises(UsageError, match="can't be shared"):
            groups[0].batch_share(count)
        return
    alignment = data.draw(st.sampled_from([2, 4]))
    parts = [g.batch_share(count, alignment) for g in groups]
    assert parts[0].start == 0
    assert parts[-1].stop == count
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert all(p.stop > p.start for p in parts)
    if count >= alignment * size:
        assert all(p.start % alignment == 0 for p in parts)
    if shares is None:
        lengths = [p.stop - p.start for p in parts]
        assert max(lengths) - min(lengths) < 2 * alignment


@given(st.integers(1, 64), st.integers(0, 1000))
def test_every_example_of_a_split_is_evaluated_once(size, count):
    seen = [i for r in range(size) for i in range(count)[Group(rank=r, size=size).even_share(count)]]
    assert seen == list(range(count))


def test_processes_of_one_start_agree_despite_traces_of_earlier_ones() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def process(rank: int, size: int) -> str:
        return group._agree_on_attempt(dist.TCPStore("127.0.0.1", server.port, is_master=False), rank, size)

    names = []
    with ThreadPoolExecutor(3) as threads:
        for size in (3, 3, 2, 3, 1):
            server.set("asks/1", "a process that is gone")
            first = threads.submit(process, 0, size)
            others = [threads.submit(process, rank, size) for rank in range(1, size)]
            (name,) = {one.result(60) for one in (first, *others)}
            names.append(name)
    assert len(set(names)) == len(names)


SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_the_rank_of_a_process_comes_from_its_environment():
    assert group.process_place({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place = group.process_place(torchrun | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert place == group.ProcessPlace(rank=3, size=4, local_rank=1, local_size=2, restarts=2)
    nodes = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "1", "SLURM_RESTART_COUNT": "1"}
    place = group.process_place(SLURM | nodes)
    assert place == group.ProcessPlace(rank=3, size=5, local_rank=1, local_size=2, restarts=1)
    # The shell of a batch script has the variables of its job, but is no step of it.
    assert group.process_place({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "x", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        SLURM | {"SLURM_PROCID": ""},
    ],
)
def test_incomplete_variables_are_refused(wrong):
    with pytest.raises(UsageError, match="incomplete"):
        group.process_place(wrong)
