"""Which of several processes hangs, from what they publish."""

from __future__ import annotations

import pytest

from suanli.parallel.watchdog import find_hanging


def beat(beats: int, step: int, phase: str) -> dict[str, object]:
    return {"beats": beats, "position": [step, phase], "host": "a", "pid": 1}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        # One doesn't say anything any more: it was stopped, or a library lets no thread run.
        ({0: (3, 7, "compute"), 1: (3, 7, "compute")}, {0: (4, 7, "compute"), 1: (3, 7, "compute")}, [1]),
        # One has never said anything.
        ({0: (3, 7, "compute")}, {0: (4, 7, "compute")}, [1]),
        # One reads its batch, and the others wait for its gradients.
        ({0: (3, 7, "compute"), 1: (3, 7, "input")}, {0: (4, 7, "compute"), 1: (4, 7, "input")}, [1]),
        # One is a step behind.
        ({0: (3, 8, "input"), 1: (3, 7, "loss")}, {0: (4, 8, "input"), 1: (4, 7, "loss")}, [1]),
        # There is no telling: all show their stacks.
        ({0: (3, 7, "compute"), 1: (3, 7, "compute")}, {0: (4, 7, "compute"), 1: (4, 7, "compute")}, [0, 1]),
    ],
)
def test_the_process_that_the_others_wait_for_is_identified(before, now, expected):
    assert find_hanging({r: beat(*b) for r, b in before.items()}, {r: beat(*b) for r, b in now.items()}, 2) == expected
