"""The contract of every source of weights: whose names are its own, and that what it has here can be had."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from suanli.core import registry
from suanli.core.errors import SuanliError
from suanli.core.types import WeightsSource

pytestmark = pytest.mark.parametrize("source", registry.load_all("pretrained").values(), ids=lambda s: s.name)


def test_a_name_of_nobody_is_left_to_others(source: WeightsSource) -> None:
    for name in ("", "nobody", "nobody:nothing", "no/where.safetensors"):
        assert source.find(name) is None


def test_a_name_of_its_own_is_found_or_explained(source: WeightsSource) -> None:
    for name in (f"{source.name}:", f"{source.name}:no such", f"{source.name}:../x@y"):
        error = None
        try:
            found = source.find(name)
        except SuanliError as caught:
            error = caught
        assert error.fix if error else found is None


def test_what_is_here_is_found_again_by_its_name(
    source: WeightsSource, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))  # others have converted them
    for name in source.present()[:2]:
        found = source.find(name)
        assert found is not None
        assert source.find(found.name) == found
        assert found.checksum.startswith("sha256:")
        with safe_open(found.file, framework="pt") as file:
            assert list(file.keys())
