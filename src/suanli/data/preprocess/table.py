"""Rows of a table: numbers as they are, categories as codes, dates as several numbers.

What a column is, its values and its quantiles are found on the training rows. Numbers stay unscaled, and missing ones
are NaN: what a network or a tree does with them is its own, by the quantiles in `model_args`. Texts, identifiers and
constants are left out; `describe` says so.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from suanli.core.console import plural, warn
from suanli.core.errors import BadInput, DataError, UsageError, unknown
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.sections import Section
from suanli.core.types import (
    EncodedBlock,
    EncodedInput,
    InputReport,
    Json,
    Preprocess,
    Preview,
    Raw,
    RawBlock,
    TreeColumns,
)
from suanli.data.members import format_of
from suanli.data.preprocess import _column_checks as checks
from suanli.data.preprocess import _row_views as views
from suanli.data.preprocess._column_types import (
    TableColumn,
    date_parser,
    describe_types,
    find_column,
    parse_number,
)
from suanli.data.preprocess._dates import parse_date
from suanli.data.preprocess._row_views import MISSING, UNSEEN
from suanli.data.rows import Cell, Cells, Row, Rows, text_of, to_cell
from suanli.data.table_files import read_rows
from suanli.data.tables import format_columns

DEFAULTS: Mapping[str, Json] = {"min_count": 2, "max_categories": 10_000}
NO_NUMBER, OUTSIDE, NEW_VALUE = "no number", "out of range", "rare value"
_NO_GEOMETRY = Geometry(size=(), scale=(), shift=())


@dataclass(frozen=True, kw_only=True)
class TablePreprocess(Preprocess):
    """`numbers` (n,) float32 with NaN where one is missing, `categories` (m,) int32: 0 is a value that training hasn't
    seen, 1 a missing one, and `values[i]` of a column has the code i + 2. Each is left out where the table has none."""

    kind: ClassVar[str] = "table"
    roles: ClassVar[tuple[str, ...]] = ("number", "category")
    trait_names: ClassVar[Mapping[str, str]] = {
        NO_NUMBER: "no-number row",
        OUTSIDE: "out-of-range row",
        NEW_VALUE: "rare-category row",
    }
    features_name: ClassVar[str] = "the columns"
    media_types: ClassVar[tuple[str, ...]] = ("text/csv", "application/x-ndjson")
    encodes_blocks: ClassVar[bool] = True
    inputs_at_once: ClassVar[int] = 4096

    columns: tuple[TableColumn, ...]  # of the training table, in its order, but the target

    def __post_init__(self) -> None:
        columns = tuple(c if isinstance(c, TableColumn) else TableColumn(**c) for c in self.columns)
        object.__setattr__(self, "columns", columns)

    @classmethod
    def fit(cls, raws: Callable[[], Iterable[Raw]], settings: Mapping[str, Json]) -> Self:
        """Finds what each column is, and its values or quantiles.

        Settings: `columns.NAME`, one of `_column_types.TYPES` ("ignore" leaves a column out); `min_count`, how often a
        category occurs at least (rarer ones share the code of unseen ones); `max_categories` of one column. Raises
        UsageError for a bad setting, DataError where no column can be used.
        """
        checked, wanted = _check_settings(settings)
        given = raws()
        rows = given if isinstance(given, Rows) else Rows.of([raw for raw in given if isinstance(raw, Mapping)])
        if len(rows) and not rows.columns:
            raise DataError("The table has no column beside the target.", fix="Add the columns to learn from.")
        if not len(rows):
            raise DataError("There are no training rows.", fix="Give a table with a header and rows.")
        if missing := [name for name in wanted if name not in rows.columns]:
            raise unknown("column", missing[0], rows.columns)
        columns = [find_column(name, cells, wanted.get(name), checked) for name, cells in rows.columns.items()]
        if not any(column.is_used for column in columns):
            raise DataError(
                f"No column can be learned from: {'; '.join(describe_types(columns))}.",
                fix="Choose the type of one: --set columns.NAME=number, or category.",
            )
        return cls(columns=tuple(columns))

    def encode(self, raw: Raw) -> EncodedInput:
        """Raises BadInput for what is no mapping, and where columns are missing."""
        (encoded,) = self.encode_many([raw])
        if isinstance(encoded, BadInput):
            raise encoded
        return encoded

    def encode_many(self, raws: Sequence[Raw | BadInput]) -> list[EncodedInput | BadInput]:
        reasons = [self._why_not(raw) for raw in raws]
        rows: list[Any] = [raw for raw, reason in zip(raws, reasons, strict=True) if reason is None]
        if not rows:
            return [reason for reason in reasons if reason is not None]
        block = self.encode_block(Rows.of(rows))
        names = list(block.arrays)
        odd = np.zeros(len(rows), bool)
        for has in block.traits.values():
            odd |= has
        encoded = (
            EncodedInput(
                arrays=dict(zip(names, arrays, strict=True)),
                digest=digest.tobytes(),
                geometry=block.geometry,
                traits=tuple(name for name, has in block.traits.items() if has[i]) if odd[i] else (),
                flags=tuple(views.find_flags(self.used, rows[i])) if odd[i] else (),
            )
            for i, (digest, *arrays) in enumerate(zip(block.digests, *block.arrays.values(), strict=True))
        )
        return [next(encoded) if reason is None else reason for reason in reasons]

    def _why_not(self, raw: Raw | BadInput) -> BadInput | None:
        """Why this is no row that can be answered; None: it can be."""
        if isinstance(raw, BadInput):
            return raw
        if not isinstance(raw, Mapping):
            return BadInput(
                f"A row with the cells by the names of their columns is needed, not {type(raw).__name__}.",
                fix='Give an object such as {"age": 34, "city": "Bern"}.',
            )
        if self._needed <= raw.keys():
            return None
        return _missing_error([column.name for column in self.used if column.name not in raw])

    def encode_block(self, raws: RawBlock) -> EncodedBlock:
        assert isinstance(raws, Rows)
        if missing := [column.name for column in self.used if column.name not in raws.columns]:
            raise _missing_error(missing)
        traits = {name: np.zeros(len(raws), bool) for name in self.trait_names}
        numbers = [n for c in self.used for n in self._encode_numbers(c, raws.columns[c.name], traits)]
        codes = [self._encode_values(c, raws.columns[c.name], traits) for c in self._categories]
        arrays: dict[str, np.ndarray] = {}
        if numbers:
            with np.errstate(over="ignore"):
                arrays["numbers"] = np.stack(numbers, axis=1).astype(np.float32)
        if codes:
            arrays["categories"] = np.stack(codes, axis=1)
        return EncodedBlock(
            arrays=arrays, digests=_digest_rows(list(arrays.values())), geometry=_NO_GEOMETRY, traits=traits
        )

    def measure(self, inputs: Mapping[str, Stored]) -> Self:  # noqa: ARG002  # `fit` has seen all rows
        return self

    def to_model(self, inputs: Tensors) -> Tensors:
        """float32 numbers (B, n) and int64 codes (B, m)."""
        types = {"numbers": "float", "categories": "long"}
        return {name: getattr(inputs[name], kind)() for name, kind in types.items() if name in inputs}

    @cached_property
    def used(self) -> tuple[TableColumn, ...]:
        """The columns that the model gets."""
        return tuple(column for column in self.columns if column.is_used)

    @cached_property
    def inputs(self) -> Schema:
        schema = {}
        if self._number_names:
            schema["numbers"] = Column(
                shape=(len(self._number_names),), dtype="float32", role="number", names=self._number_names
            )
        if names := tuple(column.name for column in self._categories):
            limit = max(self._cardinalities)
            schema["categories"] = Column(
                shape=(len(names),),
                dtype="int32",
                role="category",
                names=names,
                limit=limit,
                limits=self._cardinalities,
            )
        return schema

    @property
    def input_shape(self) -> tuple[int, ...]:
        return next(iter(self.inputs.values())).shape  # type: ignore[return-value]  # of fixed size

    @property
    def geometry(self) -> Geometry:
        return _NO_GEOMETRY

    @property
    def model_args(self) -> dict[str, Json]:
        """`numbers`: how many; `cardinalities` of the categories, with the two codes of unseen and missing values;
        `quantiles`: of each number, at 128 equal steps of probability over the training rows."""
        quantiles = [list(row) for column in self.used for row in column.quantiles]
        return {"numbers": len(quantiles), "cardinalities": list(self._cardinalities), "quantiles": quantiles}

    def check_inputs(
        self, raws: RawBlock, inputs: Mapping[str, Stored], targets: Mapping[str, Stored], train: np.ndarray
    ) -> InputReport:
        """Columns that have the target in them, identifiers that separate, dates in the future; and a summary of each
        column of the training rows."""
        assert isinstance(raws, Rows)
        some = train[:: max(1, len(train) // checks.SAMPLED)]
        (target,) = (column[some] for column in targets.values() if isinstance(column, np.ndarray))
        sampled = {name: stored[some] for name, stored in inputs.items() if isinstance(stored, np.ndarray)}
        remarks = [
            *checks.find_suspects(self.used, sampled, target),
            *checks.find_separating(self.columns, raws.take(some).columns, target),
            *checks.find_future(self.columns),
        ]
        cells = raws.take(train).columns
        figures = [checks.summarize(column, cells[column.name]) for column in self.columns if column.name in cells]
        return InputReport(remarks=tuple(remarks), figures={"columns": figures})

    @classmethod
    def data_sections(cls, figures: Mapping[str, Json]) -> list[Section]:
        return checks.data_sections(figures)

    def describe(self) -> list[str]:
        notes = [f"{column.name} ({column.type}): {column.note}" for column in self.columns if column.note]
        return [*describe_types(self.columns), *notes]

    def preview(self, inputs: Arrays) -> Preview:
        """The cells that the model reads, as "name: value"."""
        cells = [
            f"{name}: {'missing' if np.isnan(number) else f'{number:.6g}'}"
            for name, number in zip(self._number_names, inputs.get("numbers", ()), strict=False)
        ]
        cells += [
            f"{column.name}: {views.name_code(column, int(code))}"
            for column, code in zip(self._categories, inputs.get("categories", ()), strict=False)
        ]
        return Preview(media_type="text/plain", content=", ".join(cells).encode(errors="replace"))

    def features(self, inputs: Mapping[str, Stored], positions: np.ndarray) -> Any:
        """Numbers less their median, in units of their quartiles' distance and at most 3, and each of the more frequent
        values of a category as 0 or 1; rows have a length of about 1."""
        chosen = {name: stored[positions] for name, stored in inputs.items() if isinstance(stored, np.ndarray)}
        return views.features(chosen, self.model_args["quantiles"], self._cardinalities)

    def columns_for_trees(self, inputs: Mapping[str, Stored], positions: np.ndarray) -> TreeColumns:
        arrays = [np.asarray(inputs[name][positions], np.float64) for name in self.inputs]  # type: ignore[index]
        cardinalities = (*[0] * len(self._number_names), *self._cardinalities)
        return TreeColumns(values=np.concatenate(arrays, axis=1), cardinalities=cardinalities)

    @property
    def fields(self) -> list[dict[str, Json]]:
        return [views.field_of(column) for column in self.used]

    @classmethod
    def find_inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """The rows of a table file, or of standard input. Raises DataError where there is none."""
        if path == Path("-"):
            table = read_rows(Path("stdin"), sys.stdin.buffer.read())
        elif not path.is_file() or not format_of(path.name):
            raise DataError(f"{path} is no table file.", fix="Give a CSV, TSV, JSONL, Parquet or Excel file.")
        else:
            table = read_rows(path)
        for note in table.notes:
            warn(note)
        rows, lines = table.rows, table.lines.tolist()
        return ((f"{table.path.name}:{line}", partial(rows.__getitem__, i)) for i, line in enumerate(lines))

    def split_batch(self, raw: Raw) -> Sequence[Raw] | None:
        """The rows of columns (N,) by name, as of a data frame."""
        if not isinstance(raw, Mapping) or not raw or not all(_is_column(values) for values in raw.values()):
            return None
        columns = {name: Cells.of(map(to_cell, _plain_values(values))) for name, values in raw.items()}
        return Rows(columns, len(next(iter(raw.values()))))

    def split_upload(self, name: str, content: bytes) -> Sequence[tuple[str, Raw]]:
        """The rows of a table file."""
        try:
            table = read_rows(Path(name), content)
        except DataError as error:
            raise BadInput(error.message, fix=error.fix) from error
        return [(f"{name}:{line}", table.rows[i]) for i, line in enumerate(table.lines.tolist())]

    def list_json(self, values: Json) -> Sequence[Raw]:
        """Rows as objects: {"rows": [{"age": 34, …}, …]}, a list of them, or a single one."""
        rows = values.get("rows", [values]) if isinstance(values, Mapping) else values
        if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
            raise BadInput(
                'The body must be {"rows": [{"COLUMN": value, …}, …]}, with all columns of the model.',
                fix=f"They are: {format_columns([column.name for column in self.used])}.",
            )
        return rows

    @classmethod
    def cells_of(cls, raws: Sequence[Raw | BadInput]) -> Sequence[Mapping[str, Json] | None]:
        if raws and all(isinstance(raw, Row) for raw in raws):
            return Rows.of(raws).to_dicts()  # type: ignore[arg-type]  # they are rows
        return [dict(raw) if isinstance(raw, Mapping) else None for raw in raws]

    def _encode_numbers(self, column: TableColumn, cells: Cells, traits: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The numbers (B,) that a column becomes, in the order of `number_names`."""
        if column.type == "number":
            numbers = [cells.numbers_or(parse_number, key=parse_number)]
            wrong = cells.find(partial(_is_no_number, column), key=(self._token, column.name))
        elif column.type == "date":
            numbers = [
                cells.to_numbers(date_parser(column, part), key=(self._token, column.name, part))
                for part in column.parts
            ]
            wrong = cells.find(partial(_is_no_date, column), key=(self._token, column.name))
        else:
            return []
        traits[NO_NUMBER] |= wrong
        if column.quantiles and column.quantiles[0]:
            low, high = column.quantiles[0][0], column.quantiles[0][-1]
            traits[OUTSIDE] |= (numbers[0].astype(np.float32) < low) | (numbers[0].astype(np.float32) > high)
        return numbers

    def _encode_values(self, column: TableColumn, cells: Cells, traits: Mapping[str, np.ndarray]) -> np.ndarray:
        """Codes (B,) int32."""
        known = self._codes[column.name]

        def parse(cell: Cell) -> float:
            text = text_of(cell)
            return MISSING if column.is_missing(text) else known.get(text, UNSEEN)

        codes = cells.to_numbers(parse, key=(self._token, column.name)).astype(np.int32)
        traits[NEW_VALUE] |= codes == UNSEEN
        return codes

    @cached_property
    def _number_names(self) -> tuple[str, ...]:
        return tuple(name for column in self.used for name in column.number_names)

    @cached_property
    def _categories(self) -> tuple[TableColumn, ...]:
        return tuple(column for column in self.used if not column.number_names)

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        return {c.name: {value: code for code, value in enumerate(c.values, start=2)} for c in self._categories}

    @cached_property
    def _needed(self) -> frozenset[str]:
        return frozenset(column.name for column in self.used)

    @cached_property
    def _token(self) -> object:
        """By which a column remembers what this object makes of its cells: another one may read the same rows."""
        return object()

    @cached_property
    def _cardinalities(self) -> tuple[int, ...]:
        return tuple(len(column.values) + 2 for column in self._categories)


def _missing_error(names: Sequence[str]) -> BadInput:
    return BadInput(
        f"It lacks {plural(len(names), 'column')}: {format_columns(names)}.",
        fix="Give all columns that the model was trained on; an empty cell is a missing value.",
    )


def _is_column(values: object) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 1


def _plain_values(values: np.ndarray) -> list[Any]:
    """As Python values; times as ISO texts."""
    if values.dtype.kind in "mM":
        return [None if text == "NaT" else text for text in values.astype(str).tolist()]
    plain: list[Any] = values.tolist()
    return plain


def _is_no_date(column: TableColumn, cell: Cell) -> bool:
    text = text_of(cell)
    return not column.is_missing(text) and parse_date(text, column.forms) is None


def _is_no_number(column: TableColumn, cell: Cell) -> bool:
    return not column.is_missing(text_of(cell)) and bool(np.isnan(parse_number(cell)))


def _digest_rows(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(B, 16) uint8 of arrays (B, …)."""
    rows = np.concatenate([np.ascontiguousarray(a).reshape(len(a), -1).view(np.uint8) for a in arrays], axis=1)
    digests = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, np.uint8).reshape(len(rows), 16)


def _check_settings(settings: Mapping[str, Json]) -> tuple[dict[str, Json], dict[str, str]]:
    """The settings with the defaults, and the types of columns that the user chose."""
    wanted: dict[str, str] = {}
    checked = {**DEFAULTS}
    for name, value in settings.items():
        if name == "columns" and isinstance(value, Mapping):
            wanted |= value
        elif name.startswith("columns."):
            wanted[name.removeprefix("columns.")] = value
        elif name not in DEFAULTS:
            raise unknown("table setting", name, [*DEFAULTS, "columns.NAME"])
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000_000:
            raise UsageError(f"{name} is {value!r}.", fix="Give a whole number from 1 to 10,000,000.")
        else:
            checked[name] = value
    return checked, wanted


PREPROCESS = TablePreprocess
