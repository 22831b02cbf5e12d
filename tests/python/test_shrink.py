"""Plain arrays: every layout, every mode at its edges, what passes through, and what the report says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from halfstep.sklearn import ColumnReport, SklearnPrecisionOptimizer

OVERFLOW = 2.0**128 - 2.0**103  # the smallest float64 that float32 rounds to infinity
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-126  # float32's smallest normal
TENTH = 0.1


def shrink(X, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(X)[0]


def columns(X, **options) -> tuple[ColumnReport, ...]:
    return SklearnPrecisionOptimizer(**options).plan(X).columns


def fits(values, mode: str) -> bool:
    return shrink(np.array(values, np.float64), mode=mode).dtype == np.float32


# ------------------------------------------------------------------------------------------------------------- layouts


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def swapped(values: np.ndarray) -> np.ndarray:
    return values.astype(values.dtype.newbyteorder(">"))


def unaligned(values: np.ndarray) -> np.ndarray:
    raw = np.zeros(values.nbytes + 1, np.uint8)
    result = raw[1:].view(values.dtype).reshape(values.shape)
    result[...] = values
    assert not result.flags.aligned
    return result


LAYOUTS = {
    "C": ((50, 7), lambda x: x),
    "F": ((50, 7), np.asfortranarray),
    "one column": ((50, 1), lambda x: x),
    "one row": ((1, 50), lambda x: x),
    "strided rows": ((100, 7), lambda x: x[::2]),
    "strided columns": ((50, 21), lambda x: x[:, ::3]),
    "negative": ((50, 14), lambda x: x[::-1, ::-2]),
    "F, negative": ((50, 7), lambda x: np.asfortranarray(x)[::-1, ::-1]),
    "transposed": ((7, 50), lambda x: x.T),
    "1-D": ((999,), lambda x: x),
    "1-D, stride 3": ((999,), lambda x: x[::3]),
    "1-D, backwards": ((999,), lambda x: x[::-1]),
    "3-D": ((5, 6, 7), lambda x: x),
    "3-D, axes exchanged": ((5, 6, 7), lambda x: x.transpose(1, 2, 0)),
    "3-D, cut": ((9, 9, 9), lambda x: x[1:8:2, ::-1, 2:5]),
    "5-D, axes exchanged and cut": ((3, 4, 5, 2, 3), lambda x: x.transpose(4, 0, 2, 1, 3)[::2, :, ::-2]),
    "repeated row": ((7,), lambda x: np.broadcast_to(x, (50, 7))),
    "repeated column": ((50, 1), lambda x: np.broadcast_to(x, (50, 7))),
    "repeated number": ((1,), lambda x: np.broadcast_to(x, (3, 4, 5))),
    "0-d": ((), lambda x: x),
    "one element": ((1, 1, 1), lambda x: x),
    "other byte order": ((50, 7), swapped),
    "other byte order, strided": ((100, 7), lambda x: swapped(x)[::-2]),
    "unaligned": ((50, 7), unaligned),
    "unaligned, other byte order": ((50, 7), lambda x: unaligned(swapped(x))[:, ::2]),
    "more rows than the sample, wide": ((3000, 70), lambda x: x),
}
KINDS = {
    "float": lambda shape: numbers(*shape),
    "int64": lambda shape: np.asarray(np.trunc(numbers(*shape) * 20), np.int64),
    "uint32": lambda shape: np.asarray(np.abs(numbers(*shape) * 20), np.uint32),
    "complex": lambda shape: (numbers(*shape) * (1 + 2j)).astype(np.complex64).astype(complex),
}
SMALL = {"float": np.float32, "int64": np.int8, "uint32": np.uint8, "complex": np.complex64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, kind: str) -> None:
    shape, layout = LAYOUTS[name]
    array = np.asarray(layout(KINDS[kind](shape)))
    array.flags.writeable = False
    before = array.tobytes()
    result = shrink(array, mode="exact" if kind == "complex" else "rtol")
    expected = array.astype(SMALL[kind])
    assert type(result) is np.ndarray
    assert result.dtype == expected.dtype
    assert result.dtype.isnative
    assert result.tobytes() == expected.tobytes()
    assert result.strides == expected.strides  # astype keeps the order: "K"
    assert result.flags.writeable
    assert result.flags.owndata
    assert array.tobytes() == before


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["f8", "i8", "c16"])
def test_an_empty_array_stays_itself(shape: tuple[int, ...], dtype: str) -> None:
    empty = np.empty(shape, dtype)
    assert shrink(empty, mode="exact") is empty
    assert all(column.blocked == "it has no elements" for column in columns(empty, mode="exact"))


def test_a_map_of_a_file_becomes_an_array_and_the_file_keeps_its_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers(100, 3))
    before = (tmp_path / "x.npy").read_bytes()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    result = shrink(mapped)
    assert type(result) is np.ndarray
    assert np.array_equal(result, np.asarray(mapped).astype(np.float32))
    blocked = np.load(tmp_path / "x.npy", mmap_mode="r+")
    assert shrink(blocked, mode="exact") is blocked
    assert (tmp_path / "x.npy").read_bytes() == before


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_matrices_and_record_arrays_stay_what_they_are() -> None:
    matrix = np.matrix([[1.5, 2.5], [3.5, 4.5]])
    small = shrink(matrix)
    assert type(small) is np.matrix
    assert small.dtype == np.float32
    assert np.array_equal(small * small, matrix * matrix)  # a matrix product
    records = np.rec.array([(1.5, 300), (2.5, 4)], dtype=[("a", "f8"), ("b", "i8")])
    small = shrink(records)
    assert type(small) is np.recarray
    assert (small.a.dtype, small.b.dtype) == (np.float32, np.int16)
    assert small[1].b == 4


class Quantity(np.ndarray):
    unit = "m"


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.5, None], object),
        np.array(["a", "b"]),
        np.array([b"a"]),
        np.array(["2020-01-01"], "M8[ns]"),
        np.array([5], "m8[s]"),
        np.array([True, False]),
        np.array([1.5], np.float16),
        np.array([1.5], np.float32),
        np.array([1.5], np.longdouble),
        np.array([1.5], np.complex64),
        np.array([1.5], np.clongdouble),
        np.array([1], np.int8),
        np.array([1], np.uint8),
        np.zeros(3, "V4"),
        np.ones(3).view(Quantity),
    ],
    ids=lambda array: f"{type(array).__name__} {array.dtype}",
)
def test_what_is_not_reduced_is_returned_as_the_same_object(array: np.ndarray) -> None:
    assert shrink(array) is array
    assert shrink(array, mode="force") is array
    (column,) = columns(array)
    assert not column.changed


# --------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("values", "exact", "rtol", "force"),
    [
        ([0.5, LARGEST], True, True, True),
        ([0.5, -LARGEST], True, True, True),
        ([0.5, np.nextafter(OVERFLOW, 0)], False, True, True),
        ([0.5, OVERFLOW], False, False, False),
        ([0.5, -OVERFLOW], False, False, False),
        ([0.5, np.inf, -np.inf, np.nan], True, True, True),
        ([np.nan], True, True, True),
        ([np.inf], True, True, True),
        ([-0.0, 0.0], True, True, True),
        ([0.5, TENTH], False, True, True),
        ([0.5, SMALLEST], True, True, True),
        ([0.5, SMALLEST * (1 + 2**-24)], False, True, True),
        ([0.5, 2.0**-149], True, True, True),
        ([0.5, 2.0**-149 * 3], True, True, True),  # a subnormal that float32 holds
        ([0.5, 2.0**-149 * 3.5], False, False, True),  # one that it does not
        ([0.5, 2.0**-150], False, False, True),  # becomes 0
        ([0.5, 1e-300], False, False, True),
        ([0.5, 5e-324], False, False, True),
        ([2.0**24, 1.0], True, True, True),
        ([2.0**24 + 1, 1.0], False, False, True),  # a column of integers
        ([2.0**24 + 1, np.nan, -np.inf], False, False, True),
        ([2.0**24 + 1, 0.5], False, True, True),  # measurements
        ([-1e9, 3.0], True, True, True),  # a fill value that float32 holds
        ([2.0**53, 1.0], True, True, True),
        ([2.0**53 - 1, 1.0], False, False, True),
        ([2.0**54 + 4, 1.0], False, True, True),  # above 2^53 float64 has no odd numbers either: no identifiers
        ([1.7e9 + 0.25, 1.7e9 + 60.5], False, False, True),  # time stamps: no spread
        ([1.7e9 + 0.25], False, True, True),  # one value has none to lose
        ([1000.1, 1000.9], False, True, True),
        ([4096.1 * 4, 4096.1 * 4 + 3.9], False, False, True),
    ],
)
def test_the_modes_at_their_edges(values: list[float], exact: bool, rtol: bool, force: bool) -> None:
    assert (fits(values, "exact"), fits(values, "rtol"), fits(values, "force")) == (exact, rtol, force)
    backwards = values[::-1]
    assert (fits(backwards, "exact"), fits(backwards, "rtol"), fits(backwards, "force")) == (exact, rtol, force)


def test_signs_of_zeros_and_what_is_not_finite_survive() -> None:
    values = np.array([-0.0, 0.0, np.nan, -np.nan, np.inf, -np.inf, 2.0**-149, -(2.0**-149), 1.5])
    result = shrink(values)
    assert result.dtype == np.float32
    assert np.array_equal(result, values, equal_nan=True)
    assert np.array_equal(np.signbit(result), np.signbit(values))


@pytest.mark.parametrize("mode", ["exact", "rtol", "force"])
def test_complex_numbers_only_become_smaller_where_nothing_changes(mode: str) -> None:
    exact = np.array([1 + 2j, 0.5 - 0.25j, complex(np.nan, -0.0), complex(np.inf, 2.0**-149)])
    result = shrink(exact, mode=mode)
    if mode == "exact":
        assert result.dtype == np.complex64
        assert result.tobytes() == exact.astype(np.complex64).tobytes()
        for inexact in (np.array([1 + 0.1j]), np.array([0.1 + 1j]), np.array([1 + 1e300j])):
            assert shrink(inexact, mode=mode) is inexact
            assert columns(inexact, mode=mode)[0].position == 0
    else:
        assert result is exact
        assert 'mode="exact"' in columns(exact, mode=mode)[0].blocked


@pytest.mark.parametrize("wide", ["i8", "i4", "i2", "u8", "u4", "u2", ">i8", ">u4", ">i2"])
def test_integers_become_the_smallest_type_of_their_kind(wide: str) -> None:
    wide_type = np.dtype(wide)
    for width in (1, 2, 4, 8):
        if width > wide_type.itemsize:
            continue
        narrow = np.iinfo(np.dtype(f"{wide_type.kind}{width}"))
        for values in ([narrow.min], [narrow.max], [narrow.min, 0, narrow.max]):
            array = np.array(values, wide_type)
            needed = next(
                np.dtype(f"{wide_type.kind}{n}")
                for n in (1, 2, 4, 8)
                if all(
                    np.iinfo(f"{wide_type.kind}{n}").min <= v <= np.iinfo(f"{wide_type.kind}{n}").max for v in values
                )
            )
            result = shrink(array)
            assert result.tolist() == values
            if needed.itemsize == wide_type.itemsize:
                assert result is array
            else:
                assert result.dtype == needed


def test_one_past_the_end_needs_the_next_type() -> None:
    for value, dtype in ((128, "i2"), (-129, "i2"), (2**15, "i4"), (-(2**15) - 1, "i4"), (2**31, "i8")):
        assert shrink(np.array([1, value])).dtype == dtype
    for value, dtype in ((256, "u2"), (2**16, "u4"), (2**32, "u8"), (2**63, "u8"), (2**64 - 1, "u8")):
        assert shrink(np.array([1, value], np.uint64)).dtype == dtype


def test_either_reduction_can_be_off() -> None:
    floats, integers, complexes = np.array([1.5]), np.array([1]), np.array([1j])
    assert shrink(floats, enable_float32_reduction=False) is floats
    assert shrink(complexes, enable_float32_reduction=False, mode="exact") is complexes
    assert shrink(integers, enable_float32_reduction=False).dtype == np.int8
    assert shrink(integers, enable_int_downcasting=False) is integers
    assert shrink(floats, enable_int_downcasting=False).dtype == np.float32


# -------------------------------------------------------------------------------------------------------------- report


def test_the_report_names_the_first_obstacle_of_each_column() -> None:
    X = np.full((4000, 7), 0.5)
    X[3777, 1] = X[3990, 1] = 1e39
    X[2001, 2] = 1e-46
    X[:, 3] = np.arange(4000)
    X[1234, 3] = 2.0**24 + 1
    X[:, 4] = 1.7e9 + np.arange(4000) / 4
    X[:, 5] = np.nan
    report = columns(X)
    assert [column.position for column in report] == [None, 3777, 2001, 1234, 1, None, None]
    assert "1e+39 is larger than float32 holds" in report[1].blocked
    assert "2^-24" in report[2].blocked
    assert "all values are integers, and float32 does not hold 16777217" in report[3].blocked
    assert "from 1700000000 to 1700000999.75" in report[4].blocked
    assert all("another column needs float64" in report[i].blocked for i in (0, 5, 6))
    assert all((column.bytes_before, column.bytes_after) == (32000, 32000) for column in report)
    (inexact,) = columns(X[:, 1].copy(), mode="exact")
    assert inexact.position == 3777
    assert shrink(X) is X


def test_of_the_two_parts_of_complex_numbers_the_earlier_obstacle_is_named() -> None:
    for values in ([1, 0.1j, 0.3], [1, 0.1, 0.3j]):
        (column,) = columns(np.array(values, complex), mode="exact")
        assert (column.position, column.blocked) == (1, "float32 does not hold 0.1")


def test_a_position_in_several_dimensions_is_an_index() -> None:
    X = np.zeros((4, 5, 6)).transpose(2, 0, 1)
    X[3, 2, 1] = X[5, 0, 0] = 1e300
    (column,) = columns(X)
    assert column.position == (3, 2, 1)
    assert columns(np.array(1e300))[0].position is not None
    assert columns(np.array([1.0, 1e300], ">f8"))[0].position == 1


def test_the_worst_error_is_the_largest_relative_one() -> None:
    X = np.array([[0.1, 0.5, 1 + 2.0**-24], [0.3, 0.25, 0.5]])
    X = np.vstack([X, [[0.7, np.inf, np.nan]]])
    finite = np.isfinite(X)
    errors = np.where(finite, np.abs(X.astype(np.float32).astype(float) - np.where(finite, X, 0)), 0) / np.abs(X)
    assert [column.max_relative_error for column in columns(X)] == pytest.approx(np.nanmax(errors, axis=0).tolist())
    assert columns(X)[1].max_relative_error == 0.0


def test_integer_columns_tell_who_needs_the_width_and_whose_squares_wrap() -> None:
    X = np.array([[1, 11, 200], [2, 12, 300]])
    report = columns(X)
    assert [column.after for column in report] == ["int16"] * 3
    assert [column.note for column in report] == ["", "", "x * x wraps in int16"]
    report = columns(np.array([[1, 2**40], [2, 3]]))
    assert [column.blocked for column in report] == ["another column needs it", "its values need it"]
    assert columns(np.array([11, -11]))[0].note == ""
    assert columns(np.array([12]))[0].note == "x * x wraps in int8"
    assert columns(np.array([-12]))[0].note == "x * x wraps in int8"
    assert columns(np.array([15, 16], np.uint64))[0].note == "x * x wraps in uint8"
    assert columns(np.array([2**31], np.uint64))[0].note == "x * x wraps in uint32"


def test_a_report_as_text_and_as_dictionaries() -> None:
    optimizer = SklearnPrecisionOptimizer()
    assert optimizer.report().columns == ()
    assert np.isnan(optimizer.report().memory_reduction)
    assert "0 B -> 0 B" in str(optimizer.report())
    optimizer.optimize_data_precision(np.array([[0.1, 1e300]]), np.arange(3))
    report = optimizer.report()
    assert (report.bytes_before, report.bytes_after) == (16 + 24, 16 + 12)
    assert report.memory_reduction == pytest.approx(0.3)
    as_dict = report.as_dict()
    assert as_dict["bytes_after"] == 28
    assert [(c["target"], c["column"], c["after"]) for c in as_dict["columns"]] == [
        ("X", 0, "float64"),
        ("X", 1, "float64"),
        ("y", None, "int32"),
    ]
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert "larger than float32 holds" in lines[2]
    assert "30.0% less" in lines[-1]


# ------------------------------------------------------------------------------------------------------------ roll-back


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_late_value_that_does_not_fit_undoes_the_conversion(order: str) -> None:
    rows = 4099  # the sample takes every fourth row and not the last
    X = np.asarray(numbers(rows, 3), order=order)
    X[-1, 1] = 1e300
    assert shrink(X) is X
    integers = np.asarray(np.ones((rows, 3), np.int64), order=order)
    integers[-1, 2] = 40000
    result = shrink(integers)
    assert result.dtype == np.int32
    assert np.array_equal(result, integers)
    assert result.flags.f_contiguous == (order == "F")
    complexes = np.ones(rows, complex)
    complexes[-2] = 0.1j
    assert shrink(complexes, mode="exact") is complexes
