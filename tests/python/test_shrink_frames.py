"""pandas and polars frames and series: each column by itself, everything else kept."""

from __future__ import annotations

import datetime
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
from halfstep.sklearn import SklearnPrecisionOptimizer

ROWS = 2500  # more than the sample
OFFSET = 1.7e9


def shrink(X, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(X)[0]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def with_nulls(values: list, dtype: str) -> pd.Series:
    return pd.Series(values * (ROWS // len(values)), dtype=dtype)


COLUMNS = {  # name: (values, dtype afterwards)
    "measured": (numbers(ROWS), "float32"),
    "stamps": (OFFSET + np.arange(ROWS) / 4, "float64"),
    "ids": (np.arange(ROWS) + 2.0**24 + 1, "float64"),
    "counts": (np.arange(ROWS), "int16"),
    "negative": (-np.arange(ROWS) * 100, "int32"),
    "unsigned": (np.arange(ROWS, dtype=np.uint64) % 200, "uint8"),
    "large": (np.arange(ROWS) * 2**40, "int64"),
    "single": (numbers(ROWS).astype(np.float32), "float32"),
    "bool": (np.arange(ROWS) % 2 == 0, "bool"),
    "object": (pd.Series(["a", 1, None, 2.5] * (ROWS // 4), dtype=object), "object"),
    "text": (pd.Series(["a", "b"] * (ROWS // 2), dtype="str"), "str"),
    "category": (pd.Series(["a", "b"] * (ROWS // 2), dtype="category"), "category"),
    "time": (pd.date_range("2020-01-01", periods=ROWS), None),
    "zone": (pd.date_range("2020-01-01", periods=ROWS, tz="UTC"), None),
    "span": (pd.to_timedelta(np.arange(ROWS), unit="s"), None),
    "sparse": (pd.arrays.SparseArray(np.arange(ROWS) % 50 * 1.5), None),
    "complex": (numbers(ROWS) * 1j, "complex128"),
    "Int64": (with_nulls([1, None, 300, 4], "Int64"), "Int16"),
    "UInt32": (with_nulls([1, None, 200, 4], "UInt32"), "UInt8"),
    "Int8": (with_nulls([1, None], "Int8"), "Int8"),
    "Float64": (with_nulls([1.5, None, 0.1, 4], "Float64"), "Float32"),
    "Float64 blocked": (with_nulls([1.5, None, 1e300, 4], "Float64"), "Float64"),
    "boolean": (with_nulls([True, None], "boolean"), "boolean"),
    "Int64 all NA": (pd.Series([None] * ROWS, dtype="Int64"), "Int64"),
    "arrow int": (with_nulls([1, None, 300, 4], "int64[pyarrow]"), "int16[pyarrow]"),
    "arrow uint": (with_nulls([1, 2, 300, 4], "uint64[pyarrow]"), "uint16[pyarrow]"),
    "arrow float": (with_nulls([1.5, None, 0.1, 4], "double[pyarrow]"), "float[pyarrow]"),
    "arrow float blocked": (with_nulls([1.5, None, 1e300, 4], "double[pyarrow]"), "double[pyarrow]"),
    "arrow text": (with_nulls(["a", None], "string[pyarrow]"), None),
    "arrow bool": (with_nulls([True, None], "bool[pyarrow]"), None),
    "arrow null": (pd.Series([None] * ROWS, dtype="int64[pyarrow]"), "int64[pyarrow]"),
}


def mixed() -> pd.DataFrame:
    frame = pd.DataFrame({name: values for name, (values, _) in COLUMNS.items()})
    frame.attrs = {"source": "here"}
    return frame


def test_every_kind_of_column() -> None:
    frame = mixed()
    copy = frame.copy(deep=True)
    optimizer = SklearnPrecisionOptimizer()
    planned = optimizer.plan(frame)
    result = optimizer.optimize_data_precision(frame)[0]
    pd.testing.assert_frame_equal(frame, copy)
    assert result.attrs == {"source": "here"}
    assert list(result.columns) == list(frame.columns)
    assert result.index.equals(frame.index)
    for report, (name, (_, dtype)) in zip(optimizer.report().columns, COLUMNS.items(), strict=True):
        wanted = frame[name].dtype if dtype is None else pd.api.types.pandas_dtype(dtype)
        assert str(result[name].dtype) == str(wanted), name
        assert (report.column, report.before, report.after) == (name, str(frame[name].dtype), str(wanted))
        pd.testing.assert_series_equal(result[name], frame[name].astype(wanted), check_names=False)
        assert report.changed == (str(wanted) != str(frame[name].dtype))
    assert optimizer.report() == planned
    assert optimizer.report().bytes_after < optimizer.report().bytes_before


@pytest.mark.parametrize("name", COLUMNS)
def test_every_kind_of_series(name: str) -> None:
    values, dtype = COLUMNS[name]
    series = pd.Series(values, name="x", index=range(5, 5 + ROWS))
    series.attrs = {"unit": "m"}
    result = shrink(series)
    if dtype is None or str(series.dtype) == dtype:
        assert result is series
    else:
        assert result.attrs == {"unit": "m"}
        pd.testing.assert_series_equal(result, series.astype(dtype))


def test_nan_of_arrow_and_nullable_columns_stays_apart_from_what_is_missing() -> None:
    import pyarrow

    arrow = pd.Series(pd.arrays.ArrowExtensionArray(pyarrow.array([0.1, None, float("nan")])))
    result = shrink(arrow)
    assert result.dtype == "float[pyarrow]"
    assert result.array._pa_array.null_count == 1
    assert np.isnan(result.array._pa_array.to_pylist()[2])
    nullable = pd.Series(pd.arrays.FloatingArray(np.array([0.1, 7.0, np.nan]), np.array([False, True, False])))
    result = shrink(nullable)
    assert result.dtype == "Float32"
    assert result.array._mask.tolist() == [False, True, False]
    assert np.isnan(result.array._data[2])


def test_a_value_below_a_mask_does_not_decide() -> None:
    below = pd.Series(pd.arrays.FloatingArray(np.array([0.5, 1e300]), np.array([False, True])))
    assert shrink(below).dtype == "Float32"
    below = pd.Series(pd.arrays.IntegerArray(np.array([5, 2**40]), np.array([False, True])))
    assert shrink(below).dtype == "Int8"
    ids = [2.0**24 + 1, None]  # what stands for a missing value must not make measurements of integers
    for kept in (pd.Series(ids, dtype="Float64"), pd.Series(ids, dtype="double[pyarrow]"), pl.Series(ids)):
        assert shrink(kept) is kept


INDEXES = {
    "numbers": pd.RangeIndex(ROWS),
    "backwards": pd.RangeIndex(ROWS, 0, -1, name="n"),
    "repeated": pd.Index([0, 1] * (ROWS // 2)),
    "text": pd.Index([f"r{i % 7}" for i in range(ROWS)]),
    "with NaN": pd.Index([np.nan, 1.0] * (ROWS // 2)),
    "dates": pd.date_range("2020-01-01", periods=ROWS, freq="h"),
    "levels": pd.MultiIndex.from_product([range(ROWS // 10), list("abcdefghij")], names=["i", "k"]),
    "intervals": pd.interval_range(0, ROWS),
}


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("block", [True, False])
def test_every_index_is_kept(index: str, block: bool) -> None:
    frame = pd.DataFrame(numbers(ROWS, 3), index=INDEXES[index], columns=list("abc"))
    if not block:
        frame["d"] = "text"
    result = shrink(frame)
    wanted = frame.astype(dict.fromkeys("abc", "float32"))
    pd.testing.assert_frame_equal(result, wanted, check_freq=True)
    pd.testing.assert_index_equal(result.index, frame.index, exact=True)


def test_names_that_repeat_and_names_of_several_levels() -> None:
    frame = pd.DataFrame({"a": numbers(ROWS), "b": np.full(ROWS, 1e300), "c": np.arange(ROWS)})
    frame.columns = pd.Index(["x", "x", "y"], name="names")
    optimizer = SklearnPrecisionOptimizer()
    for _ in range(2):  # and once more as remembered
        result = optimizer.optimize_data_precision(frame)[0]
        assert result.dtypes.tolist() == [np.float32, np.float64, np.int16]
        pd.testing.assert_index_equal(result.columns, frame.columns)
    frame.columns = pd.MultiIndex.from_tuples([("u", 1), ("u", 2), ("v", 1)])
    result = shrink(frame, exclude=[("v", 1)])
    assert result.dtypes.tolist() == [np.float32, np.float64, np.int64]
    pd.testing.assert_index_equal(result.columns, frame.columns)
    frame.columns = [None, 1, ("t",)]
    assert shrink(frame).dtypes.tolist() == [np.float32, np.float64, np.int16]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(),
        pd.DataFrame(index=[1, 2]),
        pd.DataFrame(columns=["a", "b"]),
        pd.DataFrame({"a": np.empty(0), "b": np.empty(0, int)}),
        pd.DataFrame(np.empty((0, 3))),
        pd.DataFrame({"a": ["x"], "b": [True]}),
        pd.Series([], dtype="float64"),
        pd.Series([], dtype="Int64"),
        pd.Series([], dtype="int64[pyarrow]"),
    ],
    ids=repr,
)
def test_frames_in_which_nothing_changes_are_returned_as_they_are(frame) -> None:
    assert shrink(frame) is frame
    assert not any(column.changed for column in SklearnPrecisionOptimizer().plan(frame).columns)


# --------------------------------------------------------------------------------------------- a frame from one matrix


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_frame_from_a_matrix_that_fits(order: str) -> None:
    matrix = np.asarray(numbers(ROWS, 5), order=order)
    frame = pd.DataFrame(matrix, columns=list("abcde"), copy=False)
    optimizer = SklearnPrecisionOptimizer()
    result = optimizer.optimize_data_precision(frame)[0]
    pd.testing.assert_frame_equal(result, frame.astype("float32"))
    assert [column.column for column in optimizer.report().columns] == list("abcde")
    assert not np.shares_memory(result.to_numpy(), matrix)
    with pytest.warns(UserWarning, match="X b: float32 before, float64 now"):
        test = optimizer.optimize_data_precision(frame.assign(b=1e300))[0]
    assert test.dtypes.tolist() == [np.float32, np.float64, *[np.float32] * 3]


@pytest.mark.parametrize("row", [0, ROWS - 1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_frame_from_a_matrix_of_which_one_column_is_blocked(order: str, row: int) -> None:
    matrix = np.asarray(numbers(ROWS, 4), order=order)
    matrix[row, 2] = 1e300
    frame = pd.DataFrame(matrix, copy=False)
    optimizer = SklearnPrecisionOptimizer()
    planned = optimizer.plan(frame)
    result = optimizer.optimize_data_precision(frame)[0]
    assert result.dtypes.tolist() == [np.float32, np.float32, np.float64, np.float32]
    pd.testing.assert_frame_equal(result, frame.astype(dict.fromkeys((0, 1, 3), "float32")))
    assert optimizer.report() == planned
    assert [(column.column, column.position) for column in planned.columns] == [
        (0, None),
        (1, None),
        (2, row),
        (3, None),
    ]
    again = optimizer.optimize_data_precision(pd.DataFrame(numbers(10, 4), copy=False))[0]
    assert again.dtypes.tolist() == result.dtypes.tolist()


def test_a_plan_for_a_frame_from_a_matrix_is_what_is_done() -> None:
    for frame in (pd.DataFrame(numbers(ROWS, 3)), pd.DataFrame(np.arange(ROWS * 3).reshape(-1, 3))):
        optimizer = SklearnPrecisionOptimizer()
        planned = optimizer.plan(frame)
        optimizer.optimize_data_precision(frame)
        assert optimizer.report() == planned
        assert all(column.changed for column in planned.columns)


def test_columns_that_were_added_one_by_one() -> None:
    frame = pd.DataFrame(numbers(50, 2), columns=["a", "b"])
    for i in range(5):
        frame[f"extra {i}"] = np.arange(50) * (i + 1)
    frame = frame[::2]
    result = shrink(frame)
    pd.testing.assert_frame_equal(
        result, frame.astype({name: "float32" if name in "ab" else result[name].dtype for name in frame})
    )
    assert {str(dtype) for dtype in result.dtypes} == {"float32", "int8", "int16"}


def test_writing_to_the_result_or_to_the_source_does_not_reach_the_other() -> None:
    frame = pd.DataFrame({"a": numbers(5), "kept": np.full(5, 1e300), "text": list("abcde")})
    copy = frame.copy(deep=True)
    result = shrink(frame)
    assert np.shares_memory(result["kept"].to_numpy(), frame["kept"].to_numpy())
    result.loc[:, "kept"] = 1.0
    result.loc[0, "text"] = "z"
    result.loc[0, "a"] = 9
    pd.testing.assert_frame_equal(frame, copy)
    result = shrink(frame)
    before = result.copy(deep=True)
    frame.loc[0, "kept"] = 3.0
    frame.loc[0, "text"] = "y"
    pd.testing.assert_frame_equal(result, before)


# ------------------------------------------------------------------------------------------------ names, y, later data


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame])
def test_include_and_exclude_name_columns(make) -> None:
    frame = make({"a": [0.5, 1.5], "b": [0.5, 1.5], "c": [1, 2]})

    def dtypes(**options):
        return [str(dtype).lower() for dtype in shrink(frame, **options).dtypes]

    assert dtypes(include=["a", "c"]) == ["float32", "float64", "int8"]
    assert dtypes(exclude=("c",)) == ["float32", "float32", "int64"]
    assert dtypes(include=["a", "c"], exclude=["c"]) == ["float32", "float64", "int64"]
    assert shrink(frame, include=[]) is frame
    report = SklearnPrecisionOptimizer(include=["a"]).plan(frame).columns
    assert [column.blocked for column in report] == ["", "left out", "left out"]
    for options in ({"include": ["a", "z"]}, {"exclude": ["z"]}):
        with pytest.raises(
            ValueError, match=r"include or exclude name \['z'\], but X has the columns \['a', 'b', 'c'\]"
        ):
            shrink(frame, **options)
    for y in (make({"a": [0, 1]})["a"], np.arange(2)):  # the names are those of X alone
        assert (
            str(SklearnPrecisionOptimizer(exclude=["a"]).optimize_data_precision(frame, y)[1].dtype).lower() == "int32"
        )


LATER = {
    "pandas": (lambda **columns: pd.DataFrame(columns), str),
    "nullable": (lambda **columns: pd.DataFrame(columns).astype({"a": "Float64", "b": "Int64"}), str.lower),
    "arrow": (
        lambda **columns: pd.DataFrame(columns).astype({"a": "double[pyarrow]", "b": "int64[pyarrow]"}),
        lambda name: {"float": "float32", "double": "float64"}.get(name[:-9], name[:-9]),
    ),
    "polars": (lambda **columns: pl.DataFrame(columns), str.lower),
}


@pytest.mark.parametrize("kind", LATER)
def test_later_frames_get_the_same_dtypes_or_what_they_need(kind: str) -> None:
    make, plain = LATER[kind]

    def dtypes(frame) -> list[str]:
        return [plain(str(dtype)) for dtype in frame.dtypes]

    optimizer = SklearnPrecisionOptimizer()
    train = optimizer.optimize_data_precision(make(a=[0.5, 1.25], b=[1, 300]))[0]
    assert dtypes(train) == ["float32", "int16"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = optimizer.optimize_data_precision(make(a=[0.25], b=[1]))[0]
    assert dtypes(test) == ["float32", "int16"]
    wide = make(a=[0.5, 1e300], b=[7, 2**20])
    with pytest.warns(UserWarning, match="does not fit what was decided") as caught:
        result = optimizer.optimize_data_precision(wide)[0]
    assert dtypes(result) == ["float64", "int32"]
    assert result["b"].to_list() == [7, 2**20]
    assert result["a"].to_list() == [0.5, 1e300]
    assert [plain(str(column.after)) for column in optimizer.report().columns] == ["float64", "int32"]
    assert sum("X a: float32 before, float64 now" in str(warning.message) for warning in caught) == 1
    assert sum("X b: int16 before, int32 now" in str(warning.message) for warning in caught) == 1
    assert dtypes(optimizer.optimize_data_precision(make(a=[0.25], b=[1]))[0]) == ["float32", "int16"]


def test_targets_in_series_and_frames() -> None:
    def y(data):
        return SklearnPrecisionOptimizer().optimize_data_precision(np.ones(2), data)[1]

    assert y(pd.Series([0, 1])).dtype == np.int32
    assert y(pd.Series([0, None], dtype="UInt64")).dtype == "Int32"
    assert y(pd.Series([0, 1], dtype="uint64[pyarrow]")).dtype == "int32[pyarrow]"
    assert y(pl.Series([0, None], dtype=pl.UInt64)).dtype == pl.Int32
    for kept in (pd.Series([0.5]), pd.Series(["a"]), pd.Series([1], dtype="int8"), pl.Series([1], dtype=pl.Int16)):
        assert y(kept) is kept
    frame = y(pd.DataFrame({"a": [0, 1], "b": [0.5, 1]}))
    assert frame.dtypes.tolist() == [np.int32, np.float64]


# -------------------------------------------------------------------------------------------------------------- polars


def test_every_kind_of_polars_column() -> None:
    columns = {
        "measured": (pl.Series(numbers(ROWS)), pl.Float32),
        "late": (pl.Series([*numbers(ROWS - 1), 1e300]), pl.Float64),
        "nulls": (pl.Series([0.1, None, 5.5, float("nan"), 2.5] * (ROWS // 5)), pl.Float32),
        "counts": (pl.Series([1, None, 300, 4] * (ROWS // 4)), pl.Int16),
        "unsigned": (pl.Series([1, 200] * (ROWS // 2), dtype=pl.UInt32), pl.UInt8),
        "no values": (pl.Series([None] * ROWS, dtype=pl.Int64), pl.Int64),
        "null": (pl.Series([None] * ROWS), pl.Null),
        "int128": (pl.Series([1] * ROWS, dtype=pl.Int128), pl.Int128),
        "uint128": (pl.Series([1] * ROWS, dtype=pl.UInt128), pl.UInt128),
        "half": (pl.Series([1.5] * ROWS, dtype=pl.Float16), pl.Float16),
        "decimal": (pl.Series([1] * ROWS, dtype=pl.Decimal(10, 2)), pl.Decimal(10, 2)),
        "text": (pl.Series(["a"] * ROWS), pl.String),
        "category": (pl.Series(["a"] * ROWS, dtype=pl.Categorical), pl.Categorical),
        "flag": (pl.Series([True, None] * (ROWS // 2)), pl.Boolean),
        "day": (pl.Series([datetime.date(2020, 1, 1)] * ROWS), pl.Date),
        "list": (pl.Series([[1, 2]] * ROWS), pl.List(pl.Int64)),
    }
    frame = pl.DataFrame({name: values for name, (values, _) in columns.items()})
    copy = frame.clone()
    optimizer = SklearnPrecisionOptimizer()
    planned = optimizer.plan(frame)
    result = optimizer.optimize_data_precision(frame)[0]
    assert frame.equals(copy)
    assert optimizer.report() == planned
    assert dict(result.schema) == {name: dtype for name, (_, dtype) in columns.items()}
    assert result.equals(frame.cast(dict(result.schema)))
    for report, (name, (values, dtype)) in zip(planned.columns, columns.items(), strict=True):
        assert (report.column, report.before, report.after) == (name, str(values.dtype), str(dtype))


def test_polars_columns_of_several_chunks_and_series() -> None:
    parts = [pl.Series("x", [0.5, 1.5]), pl.Series("x", [None, 2.5]), pl.Series("x", [0.1])]
    series = pl.concat(parts, rechunk=False)
    assert series.n_chunks() == 3
    result = shrink(series)
    assert (result.name, result.dtype, result.to_list()) == ("x", pl.Float32, series.cast(pl.Float32).to_list())
    assert shrink(pl.concat([*parts, pl.Series("x", [1e300])], rechunk=False)).dtype == pl.Float64
    sliced = pl.Series("n", range(1000))[900:]
    assert shrink(sliced).dtype == pl.Int16
    for kept in (pl.DataFrame(), pl.DataFrame({"a": []}), pl.Series("t", ["a"]), pl.Series("e", [], dtype=pl.Float64)):
        assert shrink(kept) is kept


def test_a_lazy_frame_is_an_error_without_being_resolved() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lazy in (pl.LazyFrame({"a": [1.5]}), [pl.LazyFrame({"a": [1.5]}), np.ones(2)]):
            with pytest.raises(TypeError, match=r"X is a polars\.\S*LazyFrame, expected .* a pandas or polars frame"):
                shrink(lazy)
