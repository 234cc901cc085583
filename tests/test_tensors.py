"""Arrays as they are: the kind of data and the task of graphs that suanli knows only by their signature."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.schema import Column, Geometry
from suanli.data.preprocess.tensors import TensorsPreprocess, find_files, read_shapes
from suanli.models.model_folder import build_preprocess, build_task
from suanli.tasks.tensors import Tensors, measure_spread

HERE = Geometry.unchanged(())
TWO = TensorsPreprocess(
    columns={
        "sound": Column(shape=(None, 4), dtype="float32", role="value"),
        "rate": Column(shape=(), dtype="int64", role="value"),
    }
)
ONE = TensorsPreprocess(columns={"x": Column(shape=(3,), dtype="uint8", role="value")})


def npz(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype.hasobject)
    return stream.getvalue()


# --- the inputs ---


def test_one_example_and_a_batch() -> None:
    sound = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    one = TWO.encode({"sound": sound[0], "rate": 8000, "more": "ignored"})
    assert one.arrays["sound"].dtype == np.float32
    np.testing.assert_array_equal(one.arrays["sound"], sound[0])
    assert one.arrays["rate"].shape == ()
    both = TWO.split(npz(sound=sound, rate=np.array([8000, 16000])))
    assert [int(example["rate"]) for example in both] == [8000, 16000]
    np.testing.assert_array_equal(both[1]["sound"], sound[1])
    assert TWO.encode(npz(sound=sound[:1], rate=[8000])).digest == one.digest
    assert TWO.encode({"sound": sound[1], "rate": 8000}).digest != one.digest


def test_one_array_where_there_is_one_input(tmp_path: Path) -> None:
    array = np.array([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(ONE.encode(npy(array[0])).arrays["x"], [1, 2, 3])
    np.testing.assert_array_equal(ONE.split(npy(np.asfortranarray(array)))[1]["x"], [4, 5, 6])
    assert len(ONE.split_batch(array)) == 2
    assert ONE.split_batch(array[0]) is None
    assert ONE.split_batch("no array") is None
    np.save(tmp_path / "one.npy", array)
    assert read_shapes(tmp_path / "one.npy", ["x"]) == {"x": (2, 3)}
    ((name, read),) = TensorsPreprocess.find_inputs(tmp_path)
    (_, (second, give)) = ONE.split_file(name, read)
    assert second == "one.npy[1]"
    np.testing.assert_array_equal(ONE.encode(give()).arrays["x"], [4, 5, 6])
    (tmp_path / "one.npy").write_bytes(b"broken")
    assert ONE.split_file(name, read) == [(name, read)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"sound": np.zeros((2, 4))}, r"no array 'rate', only 'sound'"),
        ({"sound": np.zeros((2, 5)), "rate": 1}, r"float64 \(2, 5\), and float32 \(\?, 4\) is needed"),
        ({"sound": np.zeros(4), "rate": 1}, r"float64 \(4,\)"),
        ({"sound": np.zeros((2, 4)), "rate": 1.5}, "float64 .*int64"),
        ({"sound": np.zeros((2, 4), complex), "rate": 1}, "complex128"),
        ({"sound": np.array([["a"] * 4]), "rate": 1}, "<U1"),
        ({"sound": np.zeros((3, 2, 4)), "rate": 1}, "neither one example nor a batch"),
        ({"sound": np.zeros((3, 2, 4)), "rate": [1, 2]}, "neither one example nor a batch"),
        ({"sound": np.zeros((3, 2, 4)), "rate": [1, 2, 3]}, "3 examples"),
        (np.zeros((2, 4)), "several inputs"),
        (npy(np.zeros((2, 4))), "several inputs"),
        (npz(sound=np.zeros((2, 4)), rate=1)[:-40], "not a complete"),
        (npy(np.array([{}], dtype=object)), "Python objects"),
        (b"no arrays", "not a complete"),
        ("text", "can't be str"),
    ],
)
def test_what_is_no_example(raw: object, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        TWO.encode(raw)  # type: ignore[arg-type]
    assert caught.value.fix


def test_values_that_the_type_cannot_hold() -> None:
    for array in ([1, 2, 256], [-1, 0, 0]):
        with pytest.raises(BadInput, match="can't hold"):
            ONE.encode({"x": array})


def test_a_header_that_claims_a_huge_array_takes_no_memory(tmp_path: Path) -> None:
    header = npy(np.zeros(3, np.uint8)).replace(b"(3,)", b"(9" + b"0" * 14 + b",)").ljust(200)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", header)
    with pytest.raises(BadInput, match="not a complete"):
        ONE.encode((tmp_path / "huge.npz").read_bytes())


def test_it_survives_json_and_cannot_be_trained() -> None:
    again = build_preprocess(json.loads(json.dumps(TWO.to_json())))
    assert again == TWO
    assert again.encode({"sound": np.zeros((1, 4)), "rate": 2}).arrays["rate"] == 2
    with pytest.raises(UsageError, match="no network is trained"):
        TensorsPreprocess.fit(lambda: iter([]), {})
    assert b"float32 (1, 4)" in TWO.preview({"sound": np.zeros((1, 4), np.float32)}).content
    assert TWO.input_shape == (1, 4)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .npz or .npy file"):
        find_files(tmp_path)
    with pytest.raises(DataError, match="no .*nothing.npz"):
        TensorsPreprocess.find_inputs(tmp_path / "nothing.npz")


# --- the answers ---

TASK = Tensors(
    columns={
        "boxes": Column(shape=(None, 4), dtype="float32", role="value"),
        "label": Column(shape=(), dtype="int64", role="value"),
    },
    spreads={"boxes": 2.0},
)


def answers(seed: int, count: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "boxes": 2 * random.standard_normal((count, 50, 4)).astype(np.float32),
        "label": random.integers(0, 9, count),
    }


def test_drift_is_from_equal_to_unrelated() -> None:
    expected = answers(0)
    assert TASK.drift(expected, expected).tolist() == [0] * 5
    unrelated = answers(1) | {"label": expected["label"]}
    assert TASK.drift(expected, unrelated) == pytest.approx(np.ones(5), abs=0.15)
    rounded = expected | {"boxes": expected["boxes"].astype(np.float16).astype(np.float32)}
    assert (TASK.drift(expected, rounded) > 0).all()
    assert (TASK.drift(expected, rounded) < 1e-3).all()
    other_label = expected | {"label": expected["label"] + np.array([0, 0, 1, 0, 0])}
    assert TASK.drift(expected, other_label).tolist() == [0, 0, 1, 0, 0]


def test_drift_of_values_that_are_not_finite() -> None:
    expected = answers(0)
    expected["boxes"][:, 0] = -np.inf
    expected["boxes"][:, 1] = np.nan
    assert TASK.drift(expected, expected).tolist() == [0] * 5
    broken = expected | {"boxes": np.where(np.arange(5)[:, None, None] == 3, np.nan, expected["boxes"])}
    assert TASK.drift(expected, broken).tolist() == [0, 0, 0, 1, 0]
    fewer = expected | {"boxes": expected["boxes"][:, 1:]}
    assert TASK.drift(expected, fewer).tolist() == [1] * 5


@given(st.floats(1e-6, 1e6), st.floats(-3, 3))
@settings(max_examples=30)
def test_drift_does_not_depend_on_the_unit(scale: float, offset: float) -> None:
    random = np.random.default_rng(0)
    expected = random.standard_normal((4, 30)) + offset
    answered = expected + 0.01 * random.standard_normal((4, 30))

    def drift(factor: float) -> np.ndarray:
        task = Tensors(
            columns={"x": Column(shape=(30,), dtype="float64", role="value")},
            spreads={"x": measure_spread(factor * expected)},
        )
        return task.drift({"x": factor * expected}, {"x": factor * answered})

    np.testing.assert_allclose(drift(scale), drift(1.0), rtol=1e-6)


def test_the_spread_of_constant_values_allows_for_rounding() -> None:
    assert measure_spread(np.full(10, 5.0)) == pytest.approx(0.05)
    assert measure_spread(np.zeros(10)) == 1
    assert measure_spread(np.array([np.nan, np.inf])) == 1
    assert measure_spread(np.array([])) == 1


def test_an_answer_has_shapes_and_a_few_values() -> None:
    one = {"boxes": np.array([[1.5, np.nan, -np.inf, 4], [5, 6, 7, 8]], np.float32), "label": np.array(3)}
    answer = TASK.answer(one, HERE, top=3)
    assert answer.values == {
        "outputs": {
            "boxes": {"shape": [2, 4], "dtype": "float32", "first": [1.5, "nan", "-inf"]},
            "label": {"shape": [], "dtype": "int64", "first": [3]},
        }
    }
    json.dumps(answer.values, allow_nan=False)
    assert answer.text == "boxes (2, 4): 1.5, nan, -inf, …  label (): 3"


def test_a_task_survives_json_and_has_no_targets() -> None:
    assert build_task("tensors", (), json.loads(json.dumps(TASK.settings))) == TASK
    assert TASK.targets == {}
    for use in (
        lambda: TASK.loss(None, {}),
        lambda: TASK.encode(1, HERE),
        lambda: TASK.records({}, {}),
        lambda: TASK.scores({}),
        lambda: TASK.model_args,
    ):
        with pytest.raises(UsageError, match="they have no targets"):
            use()
