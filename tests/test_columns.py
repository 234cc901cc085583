"""Columns of the cache, ragged ones among them, and the geometry of a resized input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from suanli.core.schema import Column, Geometry, Ragged, random_inputs, take, zeros
from suanli.core.types import Split
from suanli.data.columns import ColumnWriter, load_columns
from suanli.data.loader import Feed
from suanli.data.preprocess.image import ImagePreprocess
from suanli.machine import device

SCHEMA = {
    "image": Column(shape=(2, 3), dtype="uint8", role="image"),
    "boxes": Column(shape=(None, 4), dtype="float32", role="boxes"),
    "wave": Column(shape=(None,), dtype="int16", role="wave"),
    "value": Column(shape=(), dtype="float64", role="value"),
}
CPU = device.detect("cpu")


def make_examples(lengths: list[int]) -> list[dict[str, NDArray[np.generic]] | None]:
    random = np.random.default_rng(0)
    return [
        None
        if n == 7  # one that can't be decoded
        else {
            "image": random.integers(0, 256, (2, 3), dtype=np.uint8),
            "boxes": random.random((n, 4), dtype=np.float32),
            "wave": random.integers(-9, 9, 3 * n, dtype=np.int16),
            "value": np.array(random.random()),
        }
        for n in lengths
    ]


@given(st.lists(st.integers(0, 7), max_size=20), st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_in_any_order_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk: int
) -> None:
    folder, examples = tmp_path_factory.mktemp("columns") / "inputs", make_examples(lengths)
    starts = list(range(0, len(examples), chunk))
    with ColumnWriter(folder, SCHEMA, len(examples)) as writer:
        parts = {start: writer.write(start, examples[start : start + chunk]) for start in reversed(starts)}
        for start in starts:
            writer.append(parts[start])
    columns = load_columns(folder, SCHEMA, len(examples))
    for i, example in enumerate(examples):
        for name, column in SCHEMA.items():
            empty = np.zeros([side or 0 for side in column.shape], column.dtype)
            np.testing.assert_array_equal(columns[name][i], empty if example is None else example[name])
            assert np.asarray(columns[name][i]).dtype == column.dtype


def test_a_column_that_was_cut_short_is_noticed(tmp_path: Path) -> None:
    folder, examples = tmp_path / "inputs", make_examples([3, 1, 2])
    with ColumnWriter(folder, SCHEMA, 3) as writer:
        writer.append(writer.write(0, examples))
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-3])
        with pytest.raises((ValueError, EOFError)):
            load_columns(folder, SCHEMA, 3)
        file.write_bytes(content)
    with pytest.raises(ValueError, match="not 4"):
        load_columns(folder, SCHEMA, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_a_batch_of_a_ragged_column_is_padded_with_its_lengths(lengths: list[int], data: st.DataObject) -> None:
    arrays = [np.full((n, 2), i + 1) for i, n in enumerate(lengths)]
    column = Ragged.of(arrays, like=np.zeros((0, 2), np.int64))
    positions = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8)), np.int64)
    batch = take(column, positions, "boxes")
    padded = batch["boxes"]
    assert padded.shape == (len(positions), max((lengths[i] for i in positions), default=0), 2)
    assert batch["boxes_lengths"].tolist() == [lengths[i] for i in positions]
    for row, position, length in zip(padded, positions, batch["boxes_lengths"], strict=True):
        assert (row[:length] == position + 1).all()
        assert not row[length:].any()
    selected = column.select(positions)
    assert all(np.array_equal(selected[i], arrays[p]) for i, p in enumerate(positions))


def test_batches_of_several_inputs_and_ragged_targets() -> None:
    boxes = Ragged.of([np.full((n, 4), n, np.float32) for n in (2, 0, 3, 1)], like=np.zeros((0, 4), np.float32))
    split = Split(
        inputs={"image": np.arange(12, dtype=np.uint8).reshape(6, 2), "number": np.arange(6.0)},
        index=np.array([0, 2, 3, 5]),
        targets={"boxes": boxes, "value": np.arange(4.0)},
        names=["a", "b", "c", "d"],
        geometries=np.zeros((4, 3, 2)),
    )
    inputs, targets, positions = next(Feed(split, CPU).batches(iter([torch.tensor([2, 1])])))
    assert positions.tolist() == [2, 1]
    assert inputs["image"].tolist() == [[6, 7], [4, 5]]
    assert inputs["number"].tolist() == [3, 2]
    assert targets["value"].tolist() == [2, 1]
    assert targets["boxes"].shape == (2, 3, 4)
    assert targets["boxes_lengths"].tolist() == [3, 0]


def test_made_up_inputs_are_of_the_schema() -> None:
    schema = SCHEMA | {"tokens": Column(shape=(5,), dtype="int32", role="tokens", limit=11)}
    schema |= {"flag": Column(shape=(2,), dtype="bool", role="features")}
    for inputs in (zeros(schema, 4), random_inputs(schema, 4)):
        assert {name: array.dtype for name, array in inputs.items()} == {
            n: np.dtype(c.dtype) for n, c in schema.items()
        }
        assert inputs["image"].shape == (4, 2, 3)
        assert inputs["tokens"].max() < 11
    assert inputs["tokens"].max() > 0


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(40, 60), (64, 32), (200, 30), (16, 16)])
def test_the_geometry_of_a_resized_picture_finds_a_spot_again(resize: str, size: tuple[int, int]) -> None:
    pixels = np.zeros((*size, 1), np.uint8)
    spot = np.array([size[0] / 2 + 2, size[1] / 2 - 3])
    pixels[int(spot[0]) - 2 : int(spot[0]) + 2, int(spot[1]) - 2 : int(spot[1]) + 2] = 255
    preprocess = ImagePreprocess(height=32, width=32, channels=1, resize=resize)  # type: ignore[arg-type]
    encoded = preprocess.encode(pixels)
    grey = encoded.arrays["image"][..., 0].astype(float)
    if resize == "pad":
        grey[grey == 128] = 0
    rows, columns = np.mgrid[0:32, 0:32] + 0.5
    centre = np.array([(grey * rows).sum(), (grey * columns).sum()]) / grey.sum()
    assert encoded.geometry.size == size
    np.testing.assert_allclose(encoded.geometry.to_model(spot), centre, atol=0.6)
    np.testing.assert_allclose(encoded.geometry.to_input(centre), spot, atol=0.6 / min(encoded.geometry.scale))
    assert Geometry.from_array(encoded.geometry.to_array()) == encoded.geometry
