"""embed and predict --features: what the head of the network is given, for any input, in files that others read."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import suanli
from other_tasks import register, spots_engines
from suanli.cli import main
from suanli.models import build
from suanli.models.backbone import HeadInputs, backbone_of
from suanli.models.model_folder import load_model


@pytest.fixture
def run(trained_on_pictures: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_on_pictures, tmp_path, dirs_exist_ok=True)
    return tmp_path / "made"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    return int(ended.value.code or 0)


def test_it_is_what_the_head_is_given(run: Path) -> None:
    saved = load_model(run / "model")
    head = build.head_of(saved.module, build.resolve(saved.recipe.model))
    found = suanli.embed(run, "pictures")
    assert found.vectors.dtype == np.float32
    assert [prediction.name for prediction in suanli.predict(run, "pictures")] == found.names
    inputs = torch.stack(
        [
            torch.from_numpy(saved.preprocess.encode(Path("pictures", name).read_bytes()).arrays["image"])
            for name in found.names
        ]
    )
    with torch.inference_mode():
        expected = backbone_of(saved.module, head)(saved.preprocess.to_model({"image": inputs})["image"])
    layer = saved.module.get_submodule(head)
    assert found.vectors.shape == (60, layer.in_features)
    # Nothing but a factor comes after the head of this network.
    factor = expected[0].norm() / np.linalg.norm(found.vectors[0])
    np.testing.assert_allclose(found.vectors * float(factor), expected, atol=1e-4)


def test_every_form_of_an_input_and_none_that_depends_on_its_batch(run: Path) -> None:
    path = Path("pictures/class0/000.png")
    with Image.open(path) as image:
        pixels = np.asarray(image)
        forms = [path, path.read_bytes(), pixels, image]
        found = suanli.embed(run, forms)
    assert found.names == [str(path), "#1", "#2", "#3"]
    np.testing.assert_allclose(found.vectors, suanli.embed(run, "pictures").vectors[:1].repeat(4, axis=0), atol=1e-5)
    assert len(suanli.embed(run, np.stack([pixels] * 2))) == 2
    assert np.asarray(found).shape == np.array(found, np.float64).shape == found.vectors.shape
    assert "4 inputs" in repr(found)


def test_inputs_that_cannot_be_read_have_no_row(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.png").write_text("hello")
    found = suanli.embed(run, ["bad.png", "pictures/class0/000.png"])
    assert found.names == ["pictures/class0/000.png"]
    assert found.errors[0][0] == "bad.png"
    assert "bad.png" in capsys.readouterr().err
    assert suanli.embed(run, ["bad.png"]).vectors.shape[0] == 0
    with pytest.raises(suanli.DataError, match="nothing at"):
        suanli.embed(run, "nowhere.png")


def test_the_files_hold_the_same_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mixed").mkdir()
    for name in ("a", "c"):
        shutil.copy("pictures/class0/000.png", f"mixed/{name}.png")
    Path("mixed/b.png").write_bytes(b"")
    expected = suanli.embed(run, "mixed").vectors
    options = ("predict", run, "mixed", "--features")
    assert call(*options, "--out", "x.npy") == 0
    np.testing.assert_array_equal(np.load("x.npy"), expected)
    rows = list(csv.reader(Path("x.names.csv").read_text().splitlines()))
    assert rows == [
        ["row", "name", "error"],
        ["0", "a.png", ""],
        ["", "b.png", "The image is empty (0 bytes)."],
        ["1", "c.png", ""],
    ]
    capsys.readouterr()
    assert call(*options, "--out", "x.csv", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["out"], said["count"], said["width"]) == (["x.csv"], 2, expected.shape[1])
    assert said["errors"] == [{"name": "b.png", "error": "The image is empty (0 bytes)."}]
    table = list(csv.reader(Path("x.csv").read_text().splitlines()))
    assert table[0] == ["name", "error", *map(str, range(expected.shape[1]))]
    np.testing.assert_allclose(np.array([table[1][2:], table[3][2:]], np.float32), expected, rtol=1e-6)
    assert call(*options, "--csv") == 0
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == table
    assert call(*options, "--json") == 0
    listed = json.loads(capsys.readouterr().out)["embeddings"]
    assert [(one["name"], one["embedding"] is None) for one in listed] == [
        ("a.png", False),
        ("b.png", True),
        ("c.png", False),
    ]


def test_texts(text_table: Path) -> None:
    suanli.train(text_table, epochs=0.5, speedups="none", out="made")
    found = suanli.embed("made", ["a great film", "a dull film"])
    assert found.names == ["a great film", "a dull film"]
    assert np.abs(found.vectors[0] - found.vectors[1]).max() > 0


def test_parquet_has_a_list_of_float32(run: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the package pyarrow: pip install suanli[parquet]")
    from pyarrow import parquet

    Path("bad.png").write_bytes(b"")
    inputs = ["bad.png", "pictures/class0", "pictures/class1"]
    assert call("predict", run, *inputs, "--features", "--out", "x.parquet") == 0
    table = parquet.read_table("x.parquet")
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32())
    expected = suanli.embed(run, inputs)
    np.testing.assert_array_equal(
        np.stack(table["embedding"].drop_null().to_pylist()).astype(np.float32), expected.vectors
    )
    assert table["name"].to_pylist()[1:] == expected.names
    assert table["error"].to_pylist()[:2] == ["The image is empty (0 bytes).", None]


def test_without_its_package_parquet_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert call("predict", run, "pictures", "--features", "--out", "x.parquet") == 4
    assert "suanli[parquet]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--features", "--out", "x.xyz"), 2, "suffix of --out '.xyz'"),
        (("--features", "--out", "there.npy"), 2, "there.npy exists"),
        (("--features", "--out", "named.npy"), 2, "named.names.csv exists"),
        (("--features", "--explain", "folder"), 2, "--explain can't be used with --features"),
        (("--features", "--top", "3"), 2, "--top can't be used with --features"),
        (("--features", "--csv", "--out", "x.csv"), 2, "exclude each other"),
        (("--out", "x.npy"), 2, "--out can't be used without --features"),
    ],
)
def test_what_cannot_be_written(
    run: Path, options: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.npy").write_bytes(b"")
    Path("named.names.csv").write_bytes(b"")
    assert call("predict", run, "pictures", *options) == code
    assert said in capsys.readouterr().err
    assert Path("there.npy").read_bytes() == b""
    assert not Path("named.npy").exists()


def test_where_nothing_can_be_read_there_is_no_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.png").write_bytes(b"")
    assert call("predict", run, "bad.png", "--features", "--out", "x.npy") == 3
    assert "nothing was written" in capsys.readouterr().err
    assert not list(Path().glob("*x.n*"))
    assert call("predict", run, "bad.png", "--features", "--csv") == 3


def test_engines_alone_have_no_embeddings(tmp_path: Path) -> None:
    with register():
        folder = spots_engines(tmp_path / "cells")
        with pytest.raises(suanli.MachineError, match="embeddings need the network"):
            suanli.embed(folder, np.zeros((8, 8, 3), np.uint8))


# --- networks ---


class Uncalled(nn.Module):
    """Its last linear layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x.flatten(1)[:, :4])


def test_a_head_that_is_not_called_is_an_error_and_no_wrong_number() -> None:
    module = Uncalled()
    with HeadInputs(module, "last") as seen:
        module(torch.zeros(2, 4))
    with pytest.raises(suanli.MachineError, match="doesn't call its last layer"):
        seen.vectors(2)


def test_a_head_on_places_gives_their_mean_and_only_wanted_rows_are_kept() -> None:
    convolution, tokens = nn.Sequential(nn.Conv2d(5, 2, 1)), nn.Sequential(nn.Linear(5, 2))
    maps = torch.randn(4, 5, 3, 2)
    wanted = np.array([True, False, False, True])
    for module, inputs in ((convolution, maps), (tokens, maps.flatten(2).transpose(1, 2))):
        with HeadInputs(module, "0", wanted=wanted) as seen:
            module(inputs[:3])
            module(inputs[3:])
        np.testing.assert_allclose(seen.vectors(4), maps.mean((2, 3))[[0, 3]], atol=1e-6)
