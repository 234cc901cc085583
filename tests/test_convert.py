"""suanli convert: pickles of weights, good, unusual, damaged and hostile."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import suanli
from suanli.cli import main
from suanli.core.errors import DamagedFile, UsageError
from suanli.models import pickle_child
from suanli.models.conversion import convert_pickle

NET = {"conv.weight": torch.arange(12.0).reshape(3, 4), "norm.count": torch.tensor(7)}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")


class Strike:
    """Opening its pickle creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch struck",)


def saved(value: object, **how: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    return stream.getvalue()


def read(content: bytes, key: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the process does once it has given up its rights, in this one."""
    out = io.BytesIO()
    report = pickle_child.read_pickle(io.BytesIO(content), out, key, len(content))
    Path("out.safetensors").write_bytes(out.getvalue())
    return report, load_file("out.safetensors")


def sha256(path: str) -> str:
    return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def test_a_checkpoint_becomes_safetensors(capsys: pytest.CaptureFixture[str]) -> None:
    averaged = {name: tensor + 1 for name, tensor in NET.items()}
    Path("model.pth").write_bytes(saved({"epoch": 3, "state_dict": NET, "model_ema": averaged, "optimizer": {"lr": 1}}))
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "model.pth", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["key"] == "model_ema"
    assert answer["others"] == ["state_dict"]
    assert answer["source_checksum"] == sha256("model.pth")
    assert answer["checksum"] == sha256("model.safetensors")
    assert "no imports" in answer["guards"]
    assert sys.platform != "linux" or len(answer["guards"]) == 3
    tensors = load_file("model.safetensors")
    assert tensors.keys() == NET.keys()
    assert all(torch.equal(tensors[name], averaged[name]) for name in NET)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "model.pth"])
    assert "model.safetensors exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "model.pth", "--key", "state_dict", "--out", "plain.safetensors"])
    said = capsys.readouterr().out
    assert "Taken from: state_dict (others: model_ema; --key chooses)" in said
    assert f"{sha256('plain.safetensors')}  plain.safetensors" in said
    assert torch.equal(load_file("plain.safetensors")["conv.weight"], NET["conv.weight"])
    with pytest.raises(UsageError, match="no dictionary 'state_dct'.*Did you mean 'state_dict'"):
        suanli.convert("model.pth", key="state_dct", out="other.safetensors")
    assert not Path("other.safetensors").exists()


def test_code_is_refused_and_not_run() -> None:
    Path("evil.pth").write_bytes(saved({"state_dict": NET, "hook": Strike()}))
    with pytest.raises(UsageError, match=r"it asks for (posix|os)\.system.*was not run"):
        suanli.convert("evil.pth")
    assert {path.name for path in Path().iterdir()} == {"evil.pth"}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickle.dumps(Strike(), protocol=2), id="bare pickle"),
        pytest.param(lambda: saved(Strike()), id="object"),
        pytest.param(lambda: saved({"w": Strike()}, _use_new_zipfile_serialization=False), id="legacy format"),
        pytest.param(lambda: saved(nn.Sequential(nn.Linear(2, 2))), id="whole network"),
        pytest.param(lambda: b'cbuiltins\neval\n(S\'open("struck","w")\'\ntR.', id="protocol 0"),
    ],
)
def test_whatever_asks_for_code_is_refused(content: Callable[[], bytes]) -> None:
    with pytest.raises((pickle_child.Refusal, pickle.UnpicklingError)):
        read(content())
    assert not Path("struck").exists()


@linux_only
def test_the_process_can_do_nothing_but_read_and_write() -> None:
    """Even if torch let code run: each of these is tried, by Python and past it."""
    code = """
import ctypes, os, socket, subprocess, sys
from suanli.models import pickle_child
libc = ctypes.CDLL(None, use_errno=True)
functions = {name: getattr(libc, name) for name in ("open", "socket", "fork", "unlink", "execv")}
pickle_child.import_what_reading_needs()
guards = pickle_child.give_up_rights(1 << 20)
attempts = {
    "import": lambda: __import__("wave"),
    "open": lambda: open("struck", "w"),
    "system": lambda: os.system("touch struck"),
    "spawn": lambda: subprocess.run(["touch", "struck"]),
    "socket": lambda: socket.socket(),
    "list": lambda: os.listdir("/"),
    "memory": lambda: bytearray(1 << 33),
}
past = {
    "open": (b"struck", 65, 0o600), "socket": (2, 1, 0), "fork": (), "unlink": (b"kept",), "execv": (b"/bin/true", None)
}
done = []
for name, attempt in attempts.items():
    try:
        attempt(); done.append(name)
    except (Exception, MemoryError):
        pass
done += [name for name, arguments in past.items() if functions[name](*arguments) != -1]
os.write(1, repr((len(guards), done)).encode())
os._exit(0)
"""
    Path("kept").touch()
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert child.stdout == "(3, [])", child.stderr
    assert Path("kept").exists()
    assert not Path("struck").exists()


@linux_only
def test_a_file_that_claims_terabytes_is_refused() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 1 << 42, None) if isinstance(value, list) else None

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, ([], 0, (1 << 42,), (1,), False, OrderedDict())

    stream = io.BytesIO()
    for value in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}):
        pickle.dump(value, stream, protocol=2)
    Pickler(stream, protocol=2).dump({"weight": Tensor()})
    Path("huge.pth").write_bytes(stream.getvalue())
    with pytest.raises(DamagedFile, match="memory"):
        convert_pickle(Path("huge.pth"), Path("huge.safetensors"))
    assert not Path("huge.safetensors").exists()


def test_what_is_no_tensor_is_named_and_left_out() -> None:
    shared = torch.ones(3)
    content = {
        "embed": shared,
        "head": shared,
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(2).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex128),
        "steps": 12,
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "best": np.float64(0.9),
        5: torch.ones(1),
    }
    report, tensors = read(saved(content))
    assert set(report["left_out"]) == {"sparse", "complex", "steps", "args", "best", "5"}
    assert report["left_out"]["steps"] == "no tensor but int"
    assert report["tied"] == [["embed", "head"]]
    assert torch.equal(tensors["head"], shared)
    assert torch.equal(tensors["turned"], content["turned"])
    assert tensors["half"].dtype == torch.bfloat16
    assert torch.equal(tensors["parameter"], torch.ones(2))


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch_are_read(legacy: bool) -> None:
    report, tensors = read(saved(OrderedDict(NET), _use_new_zipfile_serialization=not legacy))
    assert report["key"] == ""
    assert all(torch.equal(tensors[name], tensor) for name, tensor in NET.items())


@pytest.mark.parametrize(
    ("content", "key", "taken"),
    [
        ({"model": NET}, None, "model"),
        ({"ema": {"state_dict": NET}, "epoch": 1}, None, "ema.state_dict"),
        ({"state_dict": NET, "ema": NET}, None, "ema"),
        ({"state_dict": NET, "ema": NET}, "state_dict", "state_dict"),
        ({"generator": {"net": NET}, "discriminator": {"net": NET}}, "discriminator.net", "discriminator.net"),
        ({"anything": NET}, None, "anything"),
        ({"state": {0: {"step": torch.ones(1)}}, "model": NET}, None, "model"),
    ],
)
def test_the_dictionary_with_the_network(content: dict[str, Any], key: str | None, taken: str) -> None:
    report, tensors = read(saved(content), key)
    assert report["key"] == taken
    assert tensors.keys() == NET.keys()


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(pickle_child.Refusal, match="state_dict"):
        read(saved({"state_dict": NET}), "state_dct")


def script() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("net/constants.pkl", b"")
        archive.writestr("net/data.pkl", b"")
    return stream.getvalue()


def bomb() -> bytes:
    """A file of torch.save whose tensor is compressed to a thousandth."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"zeros": torch.zeros(1 << 20)}))) as whole,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    return packed.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        pytest.param(script, "program", id="TorchScript"),
        pytest.param(bomb, "large", id="zip bomb"),
        pytest.param(tar, "tar", id="tar"),
        pytest.param(lambda: saved({"wide": torch.zeros(1).expand(1 << 30)}), "large", id="one number, claimed often"),
        pytest.param(lambda: b"", "damaged", id="empty"),
        pytest.param(lambda: b"hello", "other", id="text"),
        pytest.param(lambda: b"\x89HDF\r\n\x1a\n", "other", id="HDF5"),
        pytest.param(lambda: saved(torch.ones(3)), "empty", id="no names"),
        pytest.param(lambda: saved({}), "empty", id="nothing"),
        pytest.param(lambda: saved({"a": {"b": 1}}), "empty", id="no tensors"),
        pytest.param(lambda: saved([torch.ones(2)]), "empty", id="list"),
    ],
)
def test_what_holds_no_weights_or_claims_too_much(content: Callable[[], bytes], kind: str) -> None:
    with pytest.raises(pickle_child.Refusal) as refused:
        read(content())
    assert refused.value.kind == kind


@given(kept=st.floats(0, 0.999), legacy=st.booleans())
def test_a_file_that_is_cut_short_is_noticed(kept: float, legacy: bool) -> None:
    whole = saved({"w": torch.ones(300)}, _use_new_zipfile_serialization=not legacy)
    cut = whole[: int(len(whole) * kept)]
    with pytest.raises(Exception, match=".*"):  # whatever torch raises is explained as damage
        pickle_child.read_pickle(io.BytesIO(cut), io.BytesIO(), None, len(cut))


@pytest.mark.parametrize(
    ("name", "out", "match"),
    [
        ("model.safetensors", None, "safetensors already.*--weights"),
        ("gone.pth", None, "Can't read gone.pth"),
        ("folder", None, "is a folder"),
        ("model.pth", "model.onnx", "doesn't end in .safetensors"),
    ],
)
def test_what_can_not_be_named(name: str, out: str | None, match: str) -> None:
    Path("folder").mkdir()
    with pytest.raises(UsageError, match=match):
        suanli.convert(name, out=out)
