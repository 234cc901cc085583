"""What every kind of data owes: the same object serves training, prediction and the saved model."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from suanli.core import registry
from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.schema import Geometry

# A kind without roles, of graphs that suanli didn't train, takes its columns from a signature and can't be fitted.
KINDS = [name for name, kind in registry.load_all("preprocess").items() if kind.roles]


def _png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# A few raw inputs of each kind; a new kind adds one line.
RAWS = {
    "image": [_png(seed) for seed in range(6)],
    "text": [f"the film number {n} was good, and the ending was {n % 2}" for n in range(6)],
    "table": [
        {"age": str(20 + 7 * n), "city": ["Bern", "Oslo"][n % 2], "since": f"2024-0{n + 1}-17"} for n in range(6)
    ],
}
RUBBISH = {"image": b"<html>not found</html>", "text": b"\xff\xfe\xfa\x00broken", "table": b"\xff\xfe\xfa\x00broken"}


@pytest.fixture(params=KINDS)
def kind(request):
    assert request.param in RAWS, f"give this test a few raw inputs of kind {request.param!r}"
    return request.param


@pytest.fixture
def fitted(kind):
    return registry.load("preprocess", kind).fit(lambda: iter(RAWS[kind]), {})


@pytest.fixture
def rows(fitted, kind):
    encoded = [fitted.encode(raw).arrays for raw in RAWS[kind]]
    return {name: np.stack([arrays[name] for arrays in encoded]) for name in encoded[0]}


def tensors(rows):
    return {name: torch.from_numpy(column) for name, column in rows.items()}


def test_is_named_like_its_file(kind, fitted):
    assert type(fitted).kind == fitted.kind == kind


def test_inputs_have_the_promised_names_shapes_types_and_roles(fitted, rows):
    assert list(rows) == list(fitted.inputs)
    for name, column in fitted.inputs.items():
        assert rows[name].shape[1:] == column.shape
        assert rows[name].dtype == np.dtype(column.dtype)
        assert column.limit is None or rows[name].max() < column.limit
    assert tuple(column.role for column in fitted.inputs.values()) == fitted.roles


def test_keys_of_near_duplicates_tell_different_inputs_apart(fitted, kind):
    keys = [fitted.similarity_key(raw, fitted.encode(raw)) for raw in RAWS[kind]]
    assert keys == [fitted.similarity_key(raw, fitted.encode(raw)) for raw in RAWS[kind]]
    if any(keys):  # a kind may have none
        bits = np.unpackbits(np.array([np.frombuffer(key, np.uint8) for key in keys if key]), axis=1)
        differences = (bits[:, None] != bits[None]).sum(2) + len(bits[0]) * np.eye(len(bits))
        assert differences.min() > fitted.similar_bits


def test_geometry_brings_the_inputs_own_corners_back(fitted, kind):
    for raw in RAWS[kind]:
        geometry = fitted.encode(raw).geometry
        corners = np.array([np.zeros(len(geometry.size)), geometry.size])
        np.testing.assert_allclose(geometry.to_input(geometry.to_model(corners)), corners, atol=1e-6)
        assert Geometry.from_array(geometry.to_array()) == geometry


def test_model_inputs_have_the_promised_shape(fitted, rows):
    measured = fitted.measure(rows)
    inputs = measured.to_model(tensors(rows))
    count = len(next(iter(rows.values())))
    assert next(iter(inputs.values())).shape == (count, *measured.input_shape)
    one = measured.to_model({name: column[2:3] for name, column in tensors(rows).items()})
    for name, tensor in inputs.items():
        assert torch.isfinite(tensor.float()).all()
        torch.testing.assert_close(one[name][0], tensor[2])


def test_to_model_leaves_its_rows_alone(fitted, rows):
    copies = {name: torch.from_numpy(column.copy()) for name, column in rows.items()}
    fitted.measure(rows).to_model(copies)
    assert all((copies[name].numpy() == rows[name]).all() for name in rows)


def test_settings_survive_json(fitted, rows, kind):
    for preprocess in (fitted, fitted.measure(rows)):
        again = type(preprocess)(**json.loads(json.dumps(preprocess.settings())))
        assert again == preprocess
        arrays = again.encode(RAWS[kind][0]).arrays
        assert all((arrays[name] == rows[name][0]).all() for name in rows)
        torch.testing.assert_close(again.to_model(tensors(rows)), preprocess.to_model(tensors(rows)))


def test_model_args_are_plain_values(fitted):
    assert json.loads(json.dumps(fitted.model_args)) == fitted.model_args


def test_the_same_raw_gives_the_same_row_and_digest(fitted, kind):
    first, second = (fitted.encode(RAWS[kind][0]) for _ in range(2))
    assert all((first.arrays[name] == second.arrays[name]).all() for name in fitted.inputs)
    assert first.digest == second.digest
    assert len(first.digest) == 16
    assert fitted.encode(RAWS[kind][1]).digest != first.digest


def test_fit_is_repeatable(fitted, kind):
    assert type(fitted).fit(lambda: iter(RAWS[kind]), {}) == fitted


def test_fit_skips_bad_inputs(kind, fitted):
    raws = [RUBBISH[kind], *RAWS[kind]]
    assert type(fitted).fit(lambda: iter(raws), {}) == fitted


def test_invalid_bytes_are_a_bad_input(fitted, kind):
    for raw in (RUBBISH[kind], b"", 7):
        with pytest.raises(BadInput) as caught:
            fitted.encode(raw)
        assert caught.value.fix


def test_an_unknown_setting_is_refused(kind):
    with pytest.raises(UsageError) as caught:
        registry.load("preprocess", kind).fit(lambda: iter(RAWS[kind]), {"no_such_setting": 1})
    assert "no_such_setting" in str(caught.value)


def test_nothing_readable_is_a_data_error(kind):
    with pytest.raises(DataError):
        registry.load("preprocess", kind).fit(lambda: iter([RUBBISH[kind]] * 3), {})


def test_preview_has_a_media_type_and_content(fitted, rows):
    preview = fitted.preview({name: column[0] for name, column in rows.items()})
    kind, _, subtype = preview.media_type.partition("/")
    assert kind in ("image", "text", "audio")
    assert subtype
    assert preview.content


def test_features_for_a_linear_baseline_are_numbers_of_about_length_one(fitted, rows):
    fitted = fitted.measure(rows)
    features = fitted.features(rows, np.array([4, 1]))
    if features is None:
        assert not fitted.features_name
        return
    dense = features if isinstance(features, np.ndarray) else features.toarray()
    assert dense.shape[0] == features.shape[0] == 2
    assert np.isfinite(dense).all()
    assert 0.1 < np.linalg.norm(dense, axis=1).mean() < 3
    assert fitted.features_name
