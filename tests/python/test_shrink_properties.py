"""Any array against a slow, obvious reference, and against NumPy's own astype(casting="same_value")."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from halfstep.sklearn import SklearnPrecisionOptimizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=150)
OVERFLOW = 2.0**128 - 2.0**103
SAME_VALUE = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)

# Where decisions change: around float32's ends, its subnormals, 2^24 and 2^53.
EDGES = [
    edge * sign
    for sign in (1.0, -1.0)
    for middle in (2.0**24, 2.0**53, 2.0**-126, 2.0**-149, 2.0**-150, OVERFLOW, 2.0**127, 1.0, 0.1, 1.7e9)
    for edge in (middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), middle * (1 + 2.0**-24), middle + 1)
] + [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, np.finfo(float).max]
DOUBLES = st.one_of(
    st.sampled_from(EDGES),
    st.floats(width=64),
    st.floats(width=32),
    st.integers(-(2**26), 2**26).map(float),
    st.floats(1.7e9, 1.7e9 + 100),
)
# Columns must often be of one sort for the rules of columns to speak.
SORTS = st.sampled_from(
    [
        DOUBLES,
        st.floats(width=32),
        st.integers(-(2**25), 2**25).map(float),
        st.floats(-1, 1),
        st.floats(1.7e9, 1.7e9 + 1000),
        st.one_of(st.integers(-(2**54), 2**54).map(float), st.just(np.nan)),
    ]
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
INTEGERS = st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])


@st.composite
def layouts(draw, array: np.ndarray) -> np.ndarray:
    """Return the same values with other strides, in either byte order, aligned or not."""
    axes = draw(st.permutations(range(array.ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in range(array.ndim)]
    order = draw(st.sampled_from(["=", "=", ">"]))
    offset = draw(st.sampled_from([0, 0, 1, 4]))
    dtype = array.dtype.newbyteorder(order)
    large = [array.shape[axis] * abs(steps[axis]) for axis in axes]
    raw = np.zeros(int(np.prod(large)) * dtype.itemsize + offset, np.uint8)
    whole = raw[offset:].view(dtype).reshape(large).transpose(np.argsort(axes)) if raw.size > offset else None
    if whole is None:
        return array.astype(dtype)
    view = whole[(..., *(slice(None, None, step) for step in steps))]
    view[...] = array
    view.flags.writeable = False
    return view


@st.composite
def floats(draw) -> np.ndarray:
    shape = draw(SHAPES)
    if len(shape) != 2:
        return draw(layouts(draw(hnp.arrays(np.float64, shape, elements=draw(SORTS)))))
    columns = [draw(hnp.arrays(np.float64, shape[0], elements=draw(SORTS))) for _ in range(shape[1])]
    return draw(layouts(np.column_stack(columns) if columns else np.empty(shape)))


@st.composite
def integers(draw) -> np.ndarray:
    dtype = np.dtype(draw(INTEGERS))
    ends = [2**n + d for n in (7, 8, 15, 16, 31, 32, 62) for d in (-1, 0, 1)]
    limits = np.iinfo(dtype)
    edges = [v for v in (*ends, *(-v for v in ends), 0, limits.min, limits.max) if limits.min <= v <= limits.max]
    bound = draw(st.sampled_from(sorted(v for v in edges if v > 0)))
    low = max(limits.min, -bound - draw(st.integers(0, 1)))
    elements = st.one_of(st.integers(low, bound), st.sampled_from([v for v in edges if low <= v <= bound]))
    return draw(layouts(draw(hnp.arrays(dtype, draw(SHAPES), elements=elements))))


def columns_of(array: np.ndarray) -> list[list[float]]:
    return [array[:, i].tolist() for i in range(array.shape[1])] if array.ndim == 2 else [array.ravel().tolist()]


def as_float32(x: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def may_become_float32(column: list[float], mode: str) -> bool:
    """The rules of the design, one number at a time, without rounding."""
    finite = [x for x in column if np.isfinite(x)]
    exact = all(as_float32(x) == x for x in finite)
    if mode == "exact" or exact:
        return exact
    if any(abs(x) >= OVERFLOW for x in finite):
        return False
    if mode == "force":
        return True
    if any(abs(Fraction(x) - Fraction(as_float32(x))) > abs(Fraction(x)) / 2**24 for x in finite):
        return False
    if all(x == int(x) and abs(x) <= 2.0**53 for x in finite):
        return False  # integers, and not exact
    spread = Fraction(max(finite)) - Fraction(min(finite))
    largest = max(abs(Fraction(x)) for x in finite)
    return spread == 0 or largest / 2**24 <= spread / 2**12


@pytest.mark.parametrize("mode", ["exact", "rtol", "force"])
@MANY
@given(data=st.data())
def test_floats_against_the_reference(mode: str, data) -> None:
    array = data.draw(floats())
    before = array.tobytes()
    optimizer = SklearnPrecisionOptimizer(mode=mode)
    result = optimizer.optimize_data_precision(array)[0]
    assert array.tobytes() == before
    fates = [may_become_float32(column, mode) for column in columns_of(array)]
    if array.size == 0 or not all(fates):
        assert result is array
    else:
        with np.errstate(over="ignore"):
            expected = array.astype(np.float32)
        assert result.dtype == np.float32
        assert result.flags.writeable
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(result), nan)
        assert np.array_equal(result[~nan].view(np.uint32), expected[~nan].view(np.uint32))
        assert result.strides == expected.strides
    if array.size:
        told = [column.position is None for column in optimizer.report().columns]
        assert told == fates


def loses_too_much(x: float) -> bool:
    narrow = as_float32(x)
    return np.isfinite(narrow) and abs(Fraction(x) - Fraction(narrow)) > abs(Fraction(x)) / 2**24


@MANY
@given(data=st.data())
def test_the_report_tells_positions_and_errors_of_the_reference(data) -> None:
    array = data.draw(floats())
    for report, column in zip(SklearnPrecisionOptimizer().plan(array).columns, columns_of(array), strict=True):
        finite = [x for x in column if np.isfinite(x)]
        if report.changed:
            errors = [abs((Fraction(x) - Fraction(as_float32(x))) / Fraction(x)) for x in finite if x != 0]
            assert report.max_relative_error == pytest.approx(float(max(errors, default=0)), rel=1e-9)
        elif report.position is not None:
            position = report.position
            if isinstance(position, tuple):
                position = int(np.ravel_multi_index(position, array.shape))
            inexact = [i for i, x in enumerate(column) if np.isfinite(x) and as_float32(x) != x]
            assert position in inexact
            if "float32 would blur" in report.blocked or "all values are integers" in report.blocked:
                assert position == inexact[0]
            else:
                large = "larger than float32 holds" in report.blocked
                # Below the normal range a value may be close to a float32 by chance.
                assert position == next(
                    i for i in inexact if (abs(column[i]) >= OVERFLOW if large else loses_too_much(column[i]))
                )


@MANY
@given(array=integers())
def test_integers_become_the_smallest_type_that_holds_them(array: np.ndarray) -> None:
    before = array.tobytes()
    optimizer = SklearnPrecisionOptimizer()
    result = optimizer.optimize_data_precision(array)[0]
    assert array.tobytes() == before
    values = array.ravel().tolist()
    kinds = [np.dtype(f"{array.dtype.kind}{n}") for n in (1, 2, 4, 8) if n <= array.dtype.itemsize]
    wanted = next(t for t in kinds if all(np.iinfo(t).min <= v <= np.iinfo(t).max for v in values))
    if array.size == 0 or wanted.itemsize == array.dtype.itemsize:
        assert result is array
        return
    assert result.dtype == wanted
    assert result.ravel().tolist() == values
    assert result.strides == array.astype(wanted).strides
    for report, column in zip(optimizer.report().columns, columns_of(array), strict=True):
        square = max(abs(int(v)) for v in column) ** 2
        wraps = np.iinfo(wanted).max < square <= np.iinfo(array.dtype).max
        assert report.note == (f"x * x wraps in {wanted}" if wraps else "")


@MANY
@given(array=integers())
def test_integer_targets(array: np.ndarray) -> None:
    y = SklearnPrecisionOptimizer().optimize_data_precision(np.ones(1), array)[1]
    values = array.ravel().tolist()
    if array.dtype.itemsize == 8 and values and all(-(2**31) <= v < 2**31 for v in values):
        assert y.dtype == np.int32
        assert y.ravel().tolist() == values
    else:
        assert y is array


@FEW
@given(data=st.data())
def test_complex_numbers_are_exact_or_stay(data) -> None:
    parts = hnp.arrays(np.float64, data.draw(SHAPES), elements=data.draw(SORTS))
    real = data.draw(parts)
    array = np.empty(real.shape, complex)
    array.real, array.imag = real, data.draw(hnp.arrays(np.float64, real.shape, elements=data.draw(SORTS)))
    array = data.draw(layouts(array))
    result = SklearnPrecisionOptimizer(mode="exact").optimize_data_precision(array)[0]
    with np.errstate(over="ignore", invalid="ignore"):
        small = array.astype(np.complex64)
    exact = array.size and all(
        np.array_equal(np.asarray(getattr(small, part), float), getattr(array, part), equal_nan=True)
        for part in ("real", "imag")
    )
    if exact:
        assert result.dtype == np.complex64
        assert np.array_equal(result.real, small.real, equal_nan=True)
        assert np.array_equal(result.imag, small.imag, equal_nan=True)
    else:
        assert result is array


def same_value(array: np.ndarray, dtype) -> bool:
    """Return whether NumPy itself finds every value unchanged."""
    # NumPy 2.4 converts arrays of the other byte order without looking.
    array = array.astype(array.dtype.newbyteorder("="))
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array.astype(dtype, casting="same_value")
    except ValueError:
        return False
    return True


if SAME_VALUE:

    @MANY
    @given(data=st.data())
    def test_exact_floats_are_those_that_numpy_calls_the_same(data) -> None:
        array = data.draw(floats())
        result = SklearnPrecisionOptimizer(mode="exact").optimize_data_precision(array)[0]
        assert (result.dtype == np.float32) == (array.size > 0 and same_value(array, np.float32))

    @MANY
    @given(array=integers())
    def test_integers_get_the_smallest_type_that_numpy_calls_the_same(array: np.ndarray) -> None:
        result = SklearnPrecisionOptimizer().optimize_data_precision(array)[0]
        kinds = [np.dtype(f"{array.dtype.kind}{n}") for n in (1, 2, 4, 8) if n <= array.dtype.itemsize]
        smallest = next(dtype for dtype in kinds if same_value(array, dtype))
        assert result.dtype.newbyteorder("=") == (smallest if array.size else array.dtype.newbyteorder("="))


@FEW
@given(data=st.data(), n_jobs=st.integers(2, 6))
def test_threads_and_a_remembered_decision_change_nothing(data, n_jobs: int) -> None:
    array = data.draw(st.one_of(floats(), integers()))
    first = SklearnPrecisionOptimizer(n_jobs=1)
    expected = first.optimize_data_precision(array)[0]
    several = SklearnPrecisionOptimizer(n_jobs=n_jobs)
    for _ in range(2):  # the second time with what was decided the first time
        result = several.optimize_data_precision(array)[0]
        assert result.dtype == expected.dtype
        assert result.tobytes() == expected.tobytes()
