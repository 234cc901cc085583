"""Tables of features: what is read, what the columns are, what is wrong with them, and rows that are answered."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import browser as chromium
import suanli
from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.schema import random_inputs
from suanli.core.types import Columns
from suanli.data import splits
from suanli.data.cache import PreparedData
from suanli.data.example_columns import ExampleColumns
from suanli.data.preprocess.table import TablePreprocess
from suanli.data.readers import table
from suanli.data.rows import Cells, Rows
from suanli.data.table_files import read_rows

NAMES = ["age", "income", "city", "member", "since", "y"]


def people(count: int = 120) -> list[list[str]]:
    """Rows of numbers, a category, yes/no, a date and a target that depends on the first."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        age = int(random.integers(18, 90))
        day = np.datetime64("2020-01-01") + int(random.integers(0, 900))
        noisy = age + random.normal(0, 30) > 50
        income, city = f"{random.normal(3e4, 1e4):.2f}", ["Bern", "Oslo", "Rome"][i % 3]
        rows.append([str(age), income, city, ["yes", "no"][i % 2], str(day), "good" if noisy else "bad"])
    return rows


def write(path: Path, rows: Sequence[Sequence[str]], names: Sequence[str] = NAMES, delimiter: str = ",") -> Path:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, lineterminator="\n").writerows([names, *rows])
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


def prepare(path: Path, target: str | None = "y", **settings: object) -> PreparedData:
    return suanli.prepare(path, target=target, settings=settings)


def types(prepared: PreparedData) -> dict[str, str]:
    assert isinstance(prepared.preprocess, TablePreprocess)
    return {column.name: column.type for column in prepared.preprocess.columns}


def fit(**columns: Sequence[object]) -> TablePreprocess:
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return TablePreprocess.fit(lambda: iter(rows), {})


# --- columns ---


def test_the_types_of_columns_are_found_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare(write(tmp_path / "t.csv", people()))
    assert types(prepared) == {
        "age": "number",
        "income": "number",
        "city": "category",
        "member": "yes/no",
        "since": "date",
    }
    assert prepared.task.classes == ("bad", "good")
    assert "number columns: age, income" in capsys.readouterr().err
    inputs = prepared.preprocess.inputs
    assert inputs["numbers"].names[:3] == ("age", "income", "since days")
    assert inputs["categories"].names == ("city", "member")
    args = prepared.preprocess.model_args
    assert args["cardinalities"] == [5, 4]
    assert [len(row) for row in args["quantiles"]] == [129] * args["numbers"]
    ages = np.array([int(row[0]) for row in people()])
    assert args["quantiles"][0][0] >= ages.min()
    assert args["quantiles"][0][-1] <= ages.max()


@pytest.mark.parametrize("name", ["columns.age", "preprocess.columns.age"])
def test_a_user_chooses_the_type_of_a_column(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", people())
    assert types(prepare(path, **{name: "category"}))["age"] == "category"
    with pytest.raises(UsageError, match="can't be of the type 'nummber'") as caught:
        prepare(path, **{name: "nummber"})
    assert "number" in caught.value.fix


def test_a_type_that_no_cell_has_and_a_column_that_is_not_there_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", people())
    with pytest.raises(UsageError, match="'city' has no numbers: 'Bern', 'Oslo'"):
        prepare(path, **{"columns.city": "number"})
    with pytest.raises(UsageError, match="Unknown column 'agge'"):
        prepare(path, **{"columns.agge": "number"})


def test_identifiers_constants_and_texts_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[str(1000 + i), f"k{i:04}", "EU", f"note {i} of a long story", *row] for i, row in enumerate(people())]
    prepared = prepare(write(tmp_path / "t.csv", rows, ["customer_id", "code", "region", "remark", *NAMES]))
    found = types(prepared)
    assert [found[n] for n in ("customer_id", "code", "region", "remark")] == [
        "identifier",
        "identifier",
        "constant",
        "text",
    ]
    said = capsys.readouterr().err
    assert "region (constant): always 'EU'" in said
    assert "remark (text): free text is left out" in said


@pytest.mark.parametrize("missing", ["", "NA", "N/A", "nan", "NULL", "None", "?", "-", " na "])
def test_missing_numbers_in_all_spellings(missing: str) -> None:
    fitted = fit(x=["1", "2.5", missing, "4"] * 10)
    assert np.isnan(fitted.encode({"x": missing}).arrays["numbers"][0])
    assert fitted.encode({"x": missing}).flags == ()
    assert fitted.encode({"x": None}).arrays["numbers"].shape == (1,)


def test_none_is_a_value_of_a_column_of_words_where_it_is_frequent() -> None:
    words = ["None", "Brick", "Stone", ""] * 30
    fitted = fit(veneer=words, number=["None", "1", "2.5", ""] * 30)
    (veneer, number) = fitted.columns
    assert "None" in veneer.values
    assert fitted.encode({"veneer": "None", "number": "None"}).arrays["categories"].tolist() == [
        2 + veneer.values.index("None")
    ]
    assert fitted.encode({"veneer": "", "number": "1"}).arrays["categories"].tolist() == [1]
    assert number.type == "number"


def test_real_data_whose_category_is_none(shared_data: Path) -> None:
    prepared = prepare(shared_data / "tables/ames.csv", "Sale_Price")
    veneer = next(c for c in prepared.preprocess.columns if c.name == "Mas_Vnr_Type")  # type: ignore[attr-defined]
    assert veneer.values[0] == "None"


def test_mixed_types_in_a_column_are_numbers_with_missing_cells(tmp_path: Path) -> None:
    rows = people()
    rows[3][1] = rows[50][1] = "unknown"
    rows[7][1] = "inf"
    prepared = prepare(write(tmp_path / "t.csv", rows))
    assert types(prepared)["income"] == "number"
    (income,) = (c for c in prepared.preprocess.columns if c.name == "income")  # type: ignore[attr-defined]
    assert "read as missing" in income.note
    assert np.isfinite(prepared.preprocess.model_args["quantiles"]).all()


def test_dates_of_several_formats_in_one_column() -> None:
    days = ["2024-01-05", "06.01.2024", "2024/01/07 13:30", "8 Jan 2024"] * 10
    fitted = fit(day=days)
    (column,) = fitted.columns
    assert column.type == "date"
    assert "forms" in column.note
    numbers = [fitted.encode({"day": day}).arrays["numbers"] for day in days[:4]]
    at = fitted.inputs["numbers"].names.index("day day")
    assert [float(row[at]) for row in numbers] == [5, 6, 7, 8]
    assert fitted.encode({"day": "soon"}).flags == ("day: 'soon' is no date, and read as missing",)


def test_ten_thousand_categories_and_one_that_is_seen_once() -> None:
    words = [f"w{i // 2}" for i in range(20_000)] + ["single"]
    fitted = fit(word=words, x=[str(i % 7) for i in range(len(words))])
    (column, _) = fitted.columns
    assert column.type == "category"
    assert len(column.values) == 10_000
    assert column.rare == 1
    encoded = fitted.encode({"word": "single", "x": "3"})
    assert encoded.arrays["categories"].tolist() == [0]
    assert encoded.flags == ("word: 'single' is rare or new: training hasn't learned it",)


def test_a_table_of_a_target_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column beside the target"):
        prepare(write(tmp_path / "t.csv", [["a"], ["b"]] * 20, ["y"]))


def test_all_columns_constant(tmp_path: Path) -> None:
    rows = [["1", "EU", "ab"[i % 2]] for i in range(40)]
    with pytest.raises(DataError, match="No column can be learned from: constant columns: x, region") as caught:
        prepare(write(tmp_path / "t.csv", rows, ["x", "region", "y"]))
    assert "columns.NAME" in caught.value.fix


def test_a_column_named_like_one_of_ours(tmp_path: Path) -> None:
    names = ["numbers", "categories", "split", "name", "error", "label"]
    rows = [[row[0], row[2], row[3], row[4], row[1], row[5]] for row in people()]
    prepared = prepare(write(tmp_path / "t.csv", rows, names), None)
    assert types(prepared)["split"] == "yes/no"  # its words are no splits
    assert prepared.preprocess.inputs["numbers"].names[0] == "numbers"
    assert prepared.task.classes == ("bad", "good")


# --- targets ---


def test_a_target_that_is_a_number_is_learned_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", people())
    assert prepare(path, "income").task.name == "regression"
    assert prepare(path, "age").task.name == "regression"  # whole numbers, but many
    counted = write(tmp_path / "counts.csv", [[str(i % 25), str(i * i % 97)] for i in range(400)], ["n", "x"])
    assert prepare(counted, "n").task.name == "regression"
    assert len(prepare(counted, "n", task="classification").task.classes) == 25
    assert prepare(path, "member").task.classes == ("no", "yes")


def test_a_target_is_guessed_only_by_its_name(tmp_path: Path) -> None:
    rows = people()
    assert prepare(write(tmp_path / "t.csv", rows, [*NAMES[:-1], "is_target"]), None).task.name == "classification"
    with pytest.raises(DataError, match="no column of it is named like a target; they are: age, income") as caught:
        prepare(write(tmp_path / "u.csv", rows, [*NAMES[:-1], "outcome"]), None)
    assert "--target COLUMN" in caught.value.fix
    with pytest.raises(DataError, match="more than one of its columns may be the target: class, target"):
        prepare(write(tmp_path / "v.csv", [[*row, row[5]] for row in rows], [*NAMES[:-1], "class", "target"]), None)


def test_target_options_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", people())
    with pytest.raises(UsageError, match="Unknown target column of t.csv 'z'"):
        prepare(path, "z")
    with pytest.raises(UsageError, match="--label-column reads one"):
        suanli.prepare(path, target="y", label_column="city")
    with pytest.raises(UsageError, match="--target names a column of a table"):
        suanli.prepare(tmp_path, target="y")


def test_a_target_with_one_value_and_one_that_is_missing_in_some_rows(tmp_path: Path) -> None:
    rows = people()
    with pytest.raises(DataError, match="always 'good': there is nothing to learn"):
        prepare(write(tmp_path / "t.csv", [[*row[:-1], "good"] for row in rows]))
    for i in (2, 5, 8):
        rows[i][5] = ["", "NA", "?"][i % 3]
    prepared = prepare(write(tmp_path / "u.csv", rows))
    assert prepared.findings["total"] == 117
    assert "3 rows without a target, left out" in prepared.findings["notes"]


def test_a_target_of_names_that_are_no_classes(tmp_path: Path) -> None:
    rows = [[*row[:-1], f"person {i}"] for i, row in enumerate(people())]
    with pytest.raises(DataError, match="120 different values in 120 rows"):
        prepare(write(tmp_path / "t.csv", rows))


def test_three_rows_are_too_few_to_split(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(write(tmp_path / "t.csv", people(3)))
    assert caught.value.fix


# --- files ---


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_delimiter(delimiter: str, tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "t.csv", people(), delimiter=delimiter)).names == tuple(NAMES)


def test_a_delimiter_that_is_in_cells_too(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x;c;y\n" + "".join(f"{i % 7},{i % 10};a,b;{i % 3}\n" for i in range(40)))
    assert read_rows(tmp_path / "t.csv").names == ("x", "c", "y")


@pytest.mark.parametrize(
    ("cell", "number"), [("$1,234.50", 1234.5), ("12 %", 12), ("€ 7", 7), ("007", 7), ("-1e3", -1000), (".5", 0.5)]
)
def test_numbers_as_people_write_them(cell: str, number: float) -> None:
    fitted = fit(x=[cell, "1", "2", "3"] * 10)
    assert fitted.encode({"x": cell}).arrays["numbers"].tolist() == [number]


@pytest.mark.parametrize("cell", ["1,2", "1_000", "0x1f", "1.2.3", "inf", "1e999", "٣", "12px", "$"])
def test_what_is_no_number(cell: str) -> None:
    fitted = fit(x=["7", "1", "2", "3"] * 10)
    encoded = fitted.encode({"x": cell})
    assert np.isnan(encoded.arrays["numbers"]).all()
    assert encoded.flags == (f"x: {cell!r} is no number, and read as missing",)


def test_decimal_commas(tmp_path: Path) -> None:
    rows = [[row[0], row[1].replace(".", ","), *row[2:]] for row in people()]
    read = read_rows(write(tmp_path / "t.csv", rows, delimiter=";"))
    assert read.rows[0]["income"] == people()[0][1]
    assert "decimal commas in income" in read.notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_of_accents(encoding: str, tmp_path: Path) -> None:
    text = "ville,y\n" + "Orléans,a\nBezançon,b\n" * 20
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert read_rows(tmp_path / "t.csv").rows[0]["ville"] == "Orléans"


def test_chinese_of_older_systems(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(("城市,y\n" + "北京,a\n上海,b\n" * 20).encode("gb18030"))
    assert read_rows(tmp_path / "t.csv").rows[0]["城市"] == "北京"


def test_json_lines_gzip_and_a_folder_of_splits(tmp_path: Path) -> None:
    lines = [json.dumps(dict(zip(NAMES, row, strict=True)) | {"age": int(row[0])}) for row in people()]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "test.csv.gz", "wt") as stream:
        csv.writer(stream).writerows([NAMES, *people(30)])
    prepared = prepare(tmp_path)
    assert len(prepared.splits["test"]) == 30
    assert prepared.splits["test"].names[0] == "test.csv.gz:2"
    assert types(prepared)["age"] == "number"


def test_parquet_arrow_and_excel(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    openpyxl = pytest.importorskip("openpyxl")
    from pyarrow import feather, parquet

    columns = {name: [row[i] for row in people()] for i, name in enumerate(NAMES)} | {
        "age": [int(row[0]) for row in people()]
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    feather.write_feather(pyarrow.table(columns), str(tmp_path / "t.feather"))
    book = openpyxl.Workbook()
    for row in [NAMES, *people()]:
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    for name in ("t.parquet", "t.feather", "t.xlsx"):
        assert types(prepare(tmp_path / name)) == types(prepare(write(tmp_path / "t.csv", people())))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:500])
    (tmp_path / "cut.xlsx").write_bytes((tmp_path / "t.xlsx").read_bytes()[:500])
    for name in ("cut.parquet", "cut.xlsx"):
        with pytest.raises(DataError, match="damaged"):
            prepare(tmp_path / name)


def test_a_header_that_repeats_and_ragged_lines_are_skipped_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", people())
    lines = path.read_text().splitlines()
    lines[40:40] = [lines[0], "1,2", "1,2,3,4,5,6,7,8", lines[0]]
    path.write_text("\n".join(lines))
    prepared = prepare(path)
    assert prepared.findings["total"] == 120
    assert "t.csv repeats its header in line 41: 2 lines skipped" in prepared.findings["notes"]
    assert "2 lines of t.csv with missing or surplus cells (line 42, 43), skipped" in prepared.findings["notes"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,a,y\n1,2,x\n", "more than one column named 'a'"),
        ("1,2,3\n4,5,6\n7,8,9\n", "has numbers and no names"),
        ('a,y\n"1,x\n2,y\n', "line 2 on"),
        ("a,y\n1,\0x\n", "NUL byte in line 2"),
        ("a,y\n", "no rows"),
        ("", "empty"),
        ("a,y\n1\n2\n3,x\n", "mostly damaged"),
    ],
)
def test_damaged_files(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        prepare(tmp_path / "t.csv")
    assert caught.value.fix


def test_a_cell_of_a_million_characters(tmp_path: Path) -> None:
    rows = people()
    rows[5][2] = "x" * 1_000_000
    prepared = prepare(write(tmp_path / "t.csv", rows))
    assert prepared.findings["total"] == 120


def test_a_gzip_file_that_is_cut_short(tmp_path: Path) -> None:
    whole = gzip.compress(write(tmp_path / "t.csv", people()).read_bytes())
    (tmp_path / "t.csv.gz").write_bytes(whole[:-200])
    with pytest.raises(DataError, match="damaged"):
        prepare(tmp_path / "t.csv.gz")


def test_a_test_file_with_other_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", people())
    write(tmp_path / "test.csv", [row[1:] for row in people(30)], NAMES[1:])
    with pytest.raises(DataError, match="test.csv has no column age, which train.csv has"):
        prepare(tmp_path)


def test_columns_of_very_many_different_cells(tmp_path: Path) -> None:
    """They aren't kept as codes: numbers, with words among them, and texts."""
    count = 70_000
    numbers = [f"{i / 7:.6f}" for i in range(count)]
    numbers[123], numbers[68_123], numbers[69_000] = "", "NA", "unknown"
    rows = [[number, f"key-{i}", "ab"[i % 2]] for i, number in enumerate(numbers)]
    read = read_rows(write(tmp_path / "t.csv", rows, ["x", "key", "y"]))
    assert read.rows.columns["x"].numbers is not None
    assert read.rows.columns["key"].texts is not None
    for i in (0, 123, 65_536, 68_123, 69_000, count - 1):
        given, cell = numbers[i], read.rows[i]["x"]
        assert cell == (float(given) if given[:1].isdigit() else given)
        assert read.rows[i]["key"] == f"key-{i}"
    fitted = TablePreprocess.fit(lambda: read.rows, {})
    assert [column.type for column in fitted.columns] == ["number", "identifier", "category"]
    block = fitted.encode_block(read.rows)
    assert np.isnan(block.arrays["numbers"][[123, 68_123, 69_000], 0]).all()
    assert np.flatnonzero(block.traits["no number"]).tolist() == [69_000]
    assert np.isnan(block.arrays["numbers"]).sum() == 3


# --- rows and blocks ---

cells = st.one_of(
    st.none(),
    st.sampled_from(["", "NA", "yes", "no", "1", "1.0", "01", "-3e2", "2024-01-05", "a b"]),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, width=32),
    st.text(max_size=5),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": cells, "b": cells}), min_size=1, max_size=20))
def test_a_row_is_read_alone_as_in_a_block(rows: list[dict[str, object]]) -> None:
    try:
        fitted = TablePreprocess.fit(lambda: iter(rows), {})
    except DataError:  # nothing to learn from
        return
    block = fitted.encode_block(Rows.of(rows))
    for i, row in enumerate(rows):
        alone = fitted.encode(row)
        for name, array in block.arrays.items():
            np.testing.assert_array_equal(array[i], alone.arrays[name])
        assert alone.digest == block.digests[i].tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=10))
def test_rows_that_say_the_same_have_one_digest(pairs: list[tuple[object, object]]) -> None:
    rows = [{"a": a, "b": b} for a, b in pairs]
    turned = [{"b": b, "a": str(a) if isinstance(a, int) else a} for a, b in pairs]
    assert (Rows.of(rows).digests() == Rows.of(turned).digests()).all()
    assert Rows.of([{"a": "x", "b": "y"}]).digests().tolist() != Rows.of([{"a": "y", "b": "x"}]).digests().tolist()


def test_two_models_may_read_the_same_rows() -> None:
    """What one made of the cells isn't the other's."""
    rows = Rows({"c": Cells.of(["a", "b", "c"] * 4)}, 12)
    first = TablePreprocess.fit(lambda: rows, {})
    second = TablePreprocess.fit(lambda: rows.take(np.array([1, 2, 4, 5, 2])), {})
    assert first.encode_block(rows).arrays["categories"][:3, 0].tolist() == [2, 3, 4]
    assert second.encode_block(rows).arrays["categories"][:3, 0].tolist() == [0, 3, 2]


def test_other_settings_are_refused() -> None:
    for name, value in (("min_count", 0), ("max_categories", "many")):
        with pytest.raises(UsageError, match=name):
            TablePreprocess.fit(lambda: iter([{"a": 1}]), {name: value})


# --- splits and leaks ---


def test_group_and_time_columns_are_no_features(tmp_path: Path) -> None:
    rows = [[*row, f"p{i % 30}"] for i, row in enumerate(people())]
    prepared = suanli.prepare(write(tmp_path / "t.csv", rows, [*NAMES, "patient"]), target="y", group_column="patient")
    assert "patient" not in types(prepared)
    assert prepared.findings["groups_across_splits"] == []
    prepared = suanli.prepare(write(tmp_path / "t.csv", rows, [*NAMES, "patient"]), target="y", time_column="since")
    assert "since" not in types(prepared)
    assert prepared.findings["test_before_train"] == 0


def test_rows_that_are_equal_are_in_one_split(tmp_path: Path) -> None:
    rows = people(60) * 3
    prepared = prepare(write(tmp_path / "t.csv", rows))
    assert prepared.findings["duplicates_across_splits"] == []
    assert prepared.findings["counts"]["duplicates_within"] == 60


def test_a_column_that_has_the_target_in_it_is_found(tmp_path: Path) -> None:
    rows = [[*row, "100" if row[5] == "good" else "7", str(float(row[1]) * 2 + 3)] for row in people()]
    path = write(tmp_path / "t.csv", rows, [*NAMES, "outcome_code", "double"])
    (remark,) = prepare(path).findings["input_remarks"]
    assert remark.startswith("the column outcome_code alone tells the target nearly exactly (100.0%")
    assert any("the column double" in one for one in prepare(path, "income").findings["input_remarks"])
    assert prepare(write(tmp_path / "u.csv", people())).findings["input_remarks"] == []


def test_an_identifier_that_separates_and_a_date_in_the_future_are_found(tmp_path: Path) -> None:
    rows = sorted(people(), key=lambda row: row[5])
    rows = [[str(i), *row] for i, row in enumerate(rows)]
    rows[0][5] = "2093-05-01"
    remarks = prepare(write(tmp_path / "t.csv", rows, ["id", *NAMES])).findings["input_remarks"]
    assert any("the identifier id, which is left out, tells the target by its order" in one for one in remarks)
    assert any("the column since has dates in the future (up to 2093-05-01)" in one for one in remarks)


# --- answers ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> suanli.Run:
    """A run of a small network."""
    from suanli.core.types import Recipe

    folder = tmp_path_factory.mktemp("people")
    recipe = Recipe(name="small", model="table_model:build", epochs=3, batch_size=32, lr=0.01, optimizer="adamw")
    path = write(folder / "people.csv", people())
    return suanli.run(path, target="y", recipe=recipe, out=folder / "run", speedups="none")


def test_rows_in_rows_out(trained: suanli.Run, tmp_path: Path) -> None:
    names = [*reversed(NAMES[:-1]), "label"]  # in another order, and one like an answer's
    rows = [[*reversed(row[:-1]), "mine"] for row in people(5)]
    rows[1][3] = "1000000"
    rows[2][2] = "Mars"
    path = write(tmp_path / "new.csv", rows, names)
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", "suanli", "predict", str(trained.path), str(path), "--format", "csv"]
    subprocess.run(
        [*command, "--out", str(out), "--trust-code"], check=True, cwd=Path(__file__).parent, capture_output=True
    )
    head, *answers = list(csv.reader(out.read_text().splitlines()))
    assert head == [
        *names,
        "predicted label",
        "probability",
        "probabilities.bad",
        "probabilities.good",
        "flags",
        "error",
    ]
    assert [row[:6] for row in answers] == rows
    assert [row[-2] for row in answers] == [
        "",
        answers[1][-2],
        "city: 'Mars' is rare or new: training hasn't learned it",
        "",
        "",
    ]
    assert answers[1][-2].startswith("income: '1000000' is outside of ")
    assert {row[6] for row in answers} <= {"bad", "good"}


def test_rows_of_python(trained: suanli.Run) -> None:
    engine = suanli.load(trained.path, trust_code=True)
    row = dict(zip(NAMES, people(1)[0], strict=True))
    (one,) = engine.predict(row)
    assert one.label in ("bad", "good")
    assert one.flags == ()
    typed = {**row, "age": int(row["age"]), "income": float(row["income"])}
    assert engine.predict([typed])[0].probabilities == one.probabilities
    columns = {name: np.array([value] * 3) for name, value in row.items()}
    assert [p.name for p in engine.predict(columns)] == ["#0", "#1", "#2"]
    del row["age"]
    (lacking,) = engine.predict([row])
    assert lacking.error == "It lacks 1 column: age."
    with pytest.raises(BadInput, match="mapping|cells by the names"):
        engine.preprocess.encode(b"age,income")


def test_the_report_lists_the_columns(trained: suanli.Run) -> None:
    page = (trained.path / "report.html").read_text()
    assert "training values" in page
    assert "Bern" in page


def test_the_same_columns_of_other_data(trained: suanli.Run, tmp_path: Path) -> None:
    path = write(tmp_path / "later.csv", people(50))
    assert suanli.evaluate(trained.path, data=path, trust_code=True).count == 50
    write(path, [row[1:] for row in people(50)], NAMES[1:])
    with pytest.raises(DataError, match="It lacks 1 column: age"):
        suanli.evaluate(trained.path, data=path, trust_code=True)


def trained_inputs(run: suanli.Run, row: dict[str, str]) -> dict[str, np.ndarray]:
    return dict(suanli.load(run.path, trust_code=True).preprocess.encode(row).arrays)


def check_form(browser: chromium.Browser, url: str) -> None:
    """The page has a field for each column."""
    browser.go(url)
    browser.until("document.querySelectorAll('#fields [data-column]').length === 5")
    browser.run("document.querySelector('[data-column=age]').value = 300")
    browser.click("#ask-row")
    browser.until("document.querySelector('.batch .label:not(.none)')")
    assert "age: 300, income:" in browser.text(".batch blockquote")
    assert "age: '300' is outside of" in browser.text(".batch .item")


def test_rows_over_http(trained: suanli.Run, tmp_path: Path) -> None:
    from served import serving

    row = dict(zip(NAMES, people(1)[0], strict=True))
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    with serving(trained.path, "--trust-code", environment=environment) as server:

        def ask(body: bytes, kind: str = "application/json") -> tuple[int, Any]:
            answer = server.ask("POST", "/predict", body, {"Content-Type": kind})
            return answer.status, answer.json()

        status, values = ask(json.dumps({"rows": [row, {**row, "city": "Mars"}]}).encode())
        assert status == 200
        assert [one["label"] in ("bad", "good") for one in values["predictions"]] == [True, True]
        assert [one["flags"] for one in values["predictions"]] == [
            [],
            ["city: 'Mars' is rare or new: training hasn't learned it"],
        ]
        status, uploaded = ask(",".join(row).encode() + b"\n" + ",".join(row.values()).encode(), "text/csv")
        assert (status, uploaded["predictions"][0]["label"]) == (200, values["predictions"][0]["label"])
        status, refused = ask(b'{"rows": ["a"]}')
        assert status == 400
        assert '{"rows": [{"COLUMN": value' in refused["error"]
        status, lacking = ask(b'{"rows": [{"age": 3}]}')
        assert status == 400
        assert lacking["predictions"][0]["error"] == "It lacks 4 columns: income, city, member, since."
        encoded = trained_inputs(trained, row)
        inputs = [
            {"name": name, "shape": [1, len(array)], "datatype": kind, "data": array.tolist()}
            for (name, array), kind in zip(encoded.items(), ("FP32", "INT32"), strict=True)
        ]
        name = server.ask("GET", "/status").json()["models"][0]
        assert [field["name"] for field in name["fields"]] == NAMES[:-1]
        reply = server.ask("POST", f"/v2/models/{name['name']}/infer", json.dumps({"inputs": inputs}))
        assert reply.status == 200
        if chromium.WHY_NOT is None:
            with chromium.Browser(tmp_path / "profile") as browser:
                check_form(browser, server.url)
        got = {one["name"]: one["data"] for one in reply.json()["outputs"]}
        assert got["probabilities"][0] == pytest.approx(values["predictions"][0]["probabilities"]["bad"], abs=1e-5)


def test_a_table_reader_takes_parquet_only_as_features(tmp_path: Path) -> None:
    assert table.why_not(tmp_path / "t.parquet") is None
    assert table.why_not(tmp_path / "t.txt") is not None
    assert table.read(write(tmp_path / "t.csv", people()), Columns(target="y")).kind == "table"


def test_many_rows_are_split_like_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By arrays, with the same result."""
    source = table.read(write(tmp_path / "t.csv", people(400)), Columns(target="y"))
    columns = ExampleColumns.of(source.examples)
    assert columns.block is not None
    digests = columns.block.digests()
    options = {"val_fraction": 0.2, "test_fraction": 0.1, "strata": lambda target: (target,)}
    few = splits.assign_splits(columns, lambda at: digests[np.asarray(at)], **options)
    monkeypatch.setattr(splits, "MANY", 100)
    many = splits.assign_splits(columns, lambda at: digests[np.asarray(at)], **options)
    assert many.splits == few.splits
    assert (many.units_array == few.units_array).all()


def test_a_class_with_few_of_many_rows_is_in_every_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MANY", 300)
    rows = [[*row[:5], "rare" if i < 6 else row[5]] for i, row in enumerate(people(2000))]
    prepared = prepare(write(tmp_path / "t.csv", rows))
    assert all(prepared.findings["class_counts"][split]["rare"] for split in ("train", "val", "test"))


def test_codes_of_a_request_are_below_their_own_column_s_limit() -> None:
    fitted = fit(a=["x", "y"] * 10, b=[f"w{i % 5}" for i in range(20)])
    column = fitted.inputs["categories"]
    assert (column.limit, column.limits) == (7, (4, 7))
    codes = random_inputs(fitted.inputs, 200)["categories"]
    assert codes.max(0).tolist() == [3, 6]
