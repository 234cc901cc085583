"""Pausing Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc

import pytest

from suanli.core.garbage import pause_collector


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_a_pause(enabled: bool) -> None:
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(ValueError), pause_collector():
            assert not gc.isenabled()
            int("an error")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
