"""What a call takes beside an array: out, lists, y, include and exclude, threads; and bad arguments."""

from __future__ import annotations

import collections
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from halfstep.sklearn import SklearnPrecisionOptimizer


def shrink(X, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(X)[0]


def shrink_y(y, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(np.ones(3), y)[1]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


# ----------------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize(
    "out",
    [
        np.full((50, 3), 7, np.float32),
        np.full((50, 3), 7, np.float32, order="F"),
        np.full((100, 9), 7, np.float32)[::-2, ::3],
        np.frombuffer(bytearray(601), np.uint8)[1:].view(np.float32).reshape(50, 3),
    ],
    ids=["C", "F", "strided", "unaligned"],
)
def test_out_receives_the_result(out: np.ndarray) -> None:
    X = numbers(50, 3)
    assert shrink_into(X, out) is out
    assert np.array_equal(out, X.astype(np.float32))


def shrink_into(X, out, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(X, out=out)[0]


def test_out_in_a_file_is_written_there(tmp_path: Path) -> None:
    X = numbers(50, 3)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, X.shape)
    assert shrink_into(X, out) is out
    del out
    assert np.array_equal(np.load(tmp_path / "out.npy"), X.astype(np.float32))


def test_out_writes_nothing_beside_its_own_elements() -> None:
    around = np.full((100, 9), 7, np.int8)
    shrink_into(np.arange(50 * 3).reshape(50, 3) % 100, around[::-2, ::3])
    rest = np.ones(around.shape, bool)
    rest[1::2, ::3] = False
    assert (around[rest] == 7).all()
    assert (around[1::2, ::3] == (np.arange(150).reshape(50, 3) % 100)[::-1]).all()


def late(value: float) -> np.ndarray:
    X = numbers(4099, 2)
    X[-1, 1] = value
    return X


@pytest.mark.parametrize(
    ("X", "out", "message"),
    [
        (late(1e300), np.full((4099, 2), 7, np.float32), "but the array stays float64: 1e\\+300 is larger"),
        (late(0.5), np.full((4099, 2), 7, np.float64), "out has dtype float64, expected float32"),
        (late(0.5), np.full((4099, 2), 7, np.float16), "out has dtype float16, expected float32"),
        (late(0.5), np.full((4099, 2), 7, ">f4"), "byte order"),
        (late(0.5), np.full((2, 4099), 7, np.float32), r"out has shape \(2, 4099\), expected \(4099, 2\)"),
        (late(0.5), np.full(8198, 7, np.float32), "out has shape"),
        (np.array([1, 300]), np.full(2, 7, np.int8), "out has dtype int8, expected int16"),
        (np.array([1, 3]), np.full(2, 7, np.uint8), "out has dtype uint8, expected int8"),
        (np.array(["a"]), np.full(1, 7, np.float32), "stays <U1"),
        (np.zeros((0, 3)), np.zeros((0, 3), np.float32), "it has no elements"),
    ],
)
def test_an_out_that_does_not_fit_is_an_error_and_stays_as_it_was(X, out, message: str) -> None:
    before = out.tobytes()
    with pytest.raises(ValueError, match=message):
        shrink_into(X, out)
    assert out.tobytes() == before


def test_out_must_be_writable_and_lie_elsewhere() -> None:
    out = np.full(3, 7, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        shrink_into(np.ones(3), out)
    X = np.arange(1, 9) / 4
    for inside in (X.view(np.float32)[:8], X.view(np.float32)[8:], X.view(np.float32)[::2]):
        before = X.copy()
        with pytest.raises(ValueError, match="shares memory"):
            shrink_into(X, inside)
        assert np.array_equal(X, before)
    for bad in ([0.0] * 3, "out", np.float32(1)):
        with pytest.raises(TypeError, match="out is"):
            shrink_into(np.ones(3), bad)
    for bad in ([np.ones(3)], (np.ones(3), np.ones(3))):
        with pytest.raises(TypeError, match="not with a list"):
            shrink_into(bad, np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="masked"):
        shrink_into(np.ma.MaskedArray([1.0, 2.0]), np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="plain arrays"):
        shrink_into(np.ones(2, [("a", "f8")]), np.zeros(2, [("a", "f4")]))


@pytest.mark.parametrize("X", [np.array([1e300, 1.0]), np.array([1e300, 1.0], ">f8"), np.array([1.5], np.float32)])
def test_what_stays_is_copied_into_an_out_of_its_own_dtype(X: np.ndarray) -> None:
    out = np.full(X.shape, 7, X.dtype.newbyteorder("="))
    assert shrink_into(X, out) is out
    assert np.array_equal(out, X)


class Quantity(np.ndarray):
    pass


def test_a_subclass_that_is_left_alone_does_not_leave_out_unwritten() -> None:
    X = np.array([1.5, 2.5]).view(Quantity)
    with pytest.raises(ValueError, match="stays float64"):
        shrink_into(X, np.zeros(2, np.float32))
    out = np.zeros(2)
    assert shrink_into(X, out) is out
    assert out.tolist() == [1.5, 2.5]


# --------------------------------------------------------------------------------------------------------------- lists

Split = collections.namedtuple("Split", ["train", "test"])


def test_lists_keep_their_type_and_what_is_no_data() -> None:
    a, b, kept = numbers(5, 2), np.arange(5), np.ones(3, np.float32)
    result = shrink([a, b, kept, "name", None, 3])
    assert type(result) is list
    assert [part.dtype for part in result[:2]] == [np.float32, np.int8]
    assert result[2] is kept
    assert result[3:] == ["name", None, 3]
    split = shrink(Split(a, b))
    assert type(split) is Split
    assert split.test.dtype == np.int8
    nested = shrink((a, [b, (kept, a)]))
    assert type(nested) is tuple
    assert (nested[0].dtype, nested[1][0].dtype, nested[1][1][1].dtype) == (np.float32, np.int8, np.float32)
    assert nested[1][1][0] is kept
    unchanged = [kept, "x"]
    assert shrink(unchanged) is unchanged


def test_parts_of_a_list_are_reported_and_remembered_by_their_place() -> None:
    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision([np.array([1.5, 1e300]), np.array([1.5, 2.5]), [np.array([[1, 2]])]])
    report = optimizer.report().columns
    assert [column.column for column in report] == ["[0]", "[1]", "[2][0] 0", "[2][0] 1"]
    fitting = np.array([0.25])
    first, second, _ = optimizer.optimize_data_precision([fitting, fitting, [np.array([[1, 2]])]])[0]
    assert (first.dtype, second.dtype) == (np.float64, np.float32)


def test_numbers_in_lists_become_an_array() -> None:
    assert shrink([[1.5, 2.5], [3.5, 4.5]]).dtype == np.float32
    assert shrink([1, 2, 300]).dtype == np.int16
    assert shrink((1.5, 2)).shape == (2,)
    assert shrink(2.5).shape == ()
    assert shrink([]).dtype == np.float64
    assert shrink_y([0, 1, 1]).dtype == np.int32
    assert shrink_y(["a", "b"]).tolist() == ["a", "b"]


@pytest.mark.parametrize("X", [None, {"a": [1]}, {1, 2}, iter([1.5]), object()], ids=lambda X: type(X).__name__)
def test_what_is_no_data_is_an_error_that_names_the_type(X) -> None:
    with pytest.raises(TypeError, match=f"X is a {type(X).__name__}, expected a NumPy array"):
        shrink(X)
    if X is not None:
        with pytest.raises(TypeError, match="y is a "):
            shrink_y(X)


# ------------------------------------------------------------------------------------------------------------------- y


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.array([0, 1, 1]), np.int32),
        (np.array([0, 1, 2**31 - 1]), np.int32),
        (np.array([0, -(2**31)]), np.int32),
        (np.array([0, 2**31]), None),
        (np.array([[0, 1], [1, 2]], ">i8"), np.int32),
        (np.array([0, 1], np.uint64), np.int32),
        (np.array([0, 2**31 - 1], np.uint64), np.int32),
        (np.array([0, 2**31], np.uint64), None),
        (np.array([0, 1], np.uint32), None),
        (np.array([0, 1], np.int16), None),
        (np.array([0, 1], np.int8), None),
        (np.array([0, 1], np.uint8), None),
        (np.array([0.5, 1]), None),
        (np.array([True, False]), None),
        (np.array(["a", "b"], object), None),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_targets_never_become_narrower_than_int32(before: np.ndarray, after) -> None:
    result = shrink_y(before)
    if after is None:
        assert result is before
    else:
        assert result.dtype == after
        assert np.array_equal(result, before)


def test_float_targets_are_reduced_on_request_and_none_stays_none() -> None:
    assert shrink_y(np.array([0.5, 0.25]), reduce_float_y=True).dtype == np.float32
    blocked = np.array([0.5, 1e300])
    assert shrink_y(blocked, reduce_float_y=True) is blocked
    assert shrink_y(None) is None
    assert shrink_y(np.array([1, 2]), enable_int_downcasting=False).dtype == np.int64


# -------------------------------------------------------------------------------------------------- include and exclude


def test_a_column_of_a_matrix_that_is_left_out_keeps_every_value() -> None:
    X = np.array([[0.1, 0.5], [0.3, 0.25]])
    assert shrink(X).dtype == np.float32
    assert shrink(X, exclude=[0]) is X
    assert shrink(X, include=[0]).dtype == np.float32
    assert shrink(X, exclude=[1]).dtype == np.float32
    assert shrink(X, include=[1]) is X
    optimizer = SklearnPrecisionOptimizer(exclude=[0], mode="force")
    assert "float32 does not hold 0.1" in optimizer.plan(X).columns[0].blocked
    ids = np.array([[2.0**24 + 1, 0.5], [0.5, 0.25]])
    assert shrink(ids).dtype == np.float32
    assert shrink(ids, exclude=[0]) is ids


def test_names_that_x_does_not_have_are_an_error_before_anything_happens() -> None:
    for options in ({"include": [2]}, {"exclude": [-1]}, {"exclude": ["a"]}):
        with pytest.raises(ValueError, match=r"but X has the columns \[0, 1\]"):
            shrink(np.ones((3, 2)), **options)
    with pytest.raises(ValueError, match="but X has the columns"):
        shrink(np.ones(3, [("a", "f8")]), include=["b"])
    assert shrink(np.ones((3, 2)), include=[]).dtype == np.float32  # ones are exact
    assert shrink(numbers(3, 2), include=[]).dtype == np.float64


# ------------------------------------------------------------------------------------------------- threads, processes


def large(kind: str) -> np.ndarray:
    X = numbers(700, 3000) if kind != "integers" else np.arange(2_100_000).reshape(700, 3000)
    return np.asfortranarray(X) if kind == "F" else X


@pytest.mark.parametrize("kind", ["C", "F", "integers"])
def test_the_number_of_threads_changes_nothing(kind: str) -> None:
    X = large(kind)
    one = SklearnPrecisionOptimizer(n_jobs=1)
    expected = one.optimize_data_precision(X)[0]
    for n in (2, 5):
        several = SklearnPrecisionOptimizer(n_jobs=n)
        result = several.optimize_data_precision(X)[0]
        assert result.tobytes("A") == expected.tobytes("A")
        assert several.report() == one.report()
        X[600, 2999], kept = 2**40 if kind == "integers" else 1e300, X[600, 2999]
        assert several.plan(X) == one.plan(X)
        X[600, 2999] = kept


def test_calls_from_several_python_threads() -> None:
    arrays = [numbers(400, 3000) * (i + 1) for i in range(4)]
    shared, results = SklearnPrecisionOptimizer(n_jobs=2), {}

    def work(i: int) -> None:
        results[i] = [shared.optimize_data_precision(arrays[i])[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, array in enumerate(arrays):
        assert all(np.array_equal(result, array.astype(np.float32)) for result in results[i])


def test_a_forked_child_works_after_its_parent_has_used_threads() -> None:
    X = large("C")
    expected = SklearnPrecisionOptimizer(n_jobs=2).optimize_data_precision(X)[0]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            result = SklearnPrecisionOptimizer(n_jobs=2).optimize_data_precision(X)[0]
            status = 0 if np.array_equal(result, expected) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        dtypes = pool.map(_dtype_in_child, [2, 3])
    assert dtypes == ["float32", "float32"]


def _dtype_in_child(n_jobs: int) -> str:
    return shrink(large("C"), n_jobs=n_jobs).dtype.name


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"enable_float32_reduction": 1}, TypeError, "enable_float32_reduction"),
        ({"enable_int_downcasting": None}, TypeError, "enable_int_downcasting"),
        ({"reduce_float_y": "yes"}, TypeError, "reduce_float_y"),
        ({"mode": "best"}, ValueError, "mode"),
        ({"memory_threshold_mb": "1024"}, TypeError, "memory_threshold_mb is '1024'"),
        ({"memory_threshold_mb": True}, TypeError, "memory_threshold_mb"),
        ({"memory_threshold_mb": None}, TypeError, "memory_threshold_mb"),
        ({"memory_threshold_mb": -1}, ValueError, "memory_threshold_mb is -1"),
        ({"memory_threshold_mb": float("nan")}, ValueError, "memory_threshold_mb is nan"),
        ({"n_jobs": 0}, ValueError, "n_jobs is 0"),
        ({"n_jobs": -2}, ValueError, "n_jobs is -2"),
        ({"n_jobs": 1.5}, ValueError, "n_jobs is 1.5"),
        ({"n_jobs": True}, ValueError, "n_jobs is True"),
        ({"progress": "bar"}, TypeError, "progress"),
        ({"memmap_dir": "/no/such/folder"}, ValueError, "memmap_dir is '/no/such/folder'"),
        ({"memmap_dir": 1.5}, TypeError, "memmap_dir"),
        ({"include": "age"}, TypeError, "include is 'age', expected a list of names"),
        ({"exclude": None}, TypeError, "exclude is None, expected a list of names"),
        ({"include": 3}, TypeError, "include is 3"),
        ({"include": [[1]]}, TypeError, "include"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SklearnPrecisionOptimizer(**options)


def test_arguments_at_their_limits() -> None:
    X = numbers(3)
    for options in (
        {"memory_threshold_mb": float("inf")},
        {"memory_threshold_mb": np.float32(1)},
        {"n_jobs": np.int8(3)},
    ):
        assert shrink(X, **options).dtype == np.float32


@pytest.mark.parametrize("X", ["data.csv", b"data.npy"])
def test_a_path_is_no_data(X) -> None:
    with pytest.raises(TypeError, match=r"expected data; `python -m halfstep shrink` reads files"):
        shrink(X)


def test_an_error_in_y_leaves_out_untouched() -> None:
    out = np.full(3, 7, np.float32)
    with pytest.raises(ValueError, match="inhomogeneous"):
        SklearnPrecisionOptimizer().optimize_data_precision(np.array([0.5, 1, 2]), [[1], [1, 2]], out=out)
    assert out.tolist() == [7, 7, 7]


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_out_may_be_a_map_of_the_users_own(tmp_path, mode: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros(10, np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
    mapped[:] = 7  # in a private map nothing but memory holds this
    X = np.arange(5) + 0.5
    SklearnPrecisionOptimizer().optimize_data_precision(X, out=mapped[:5])
    assert mapped.tolist() == [*X.tolist(), *[7] * 5]


def test_the_result_in_out_is_out() -> None:
    out = np.zeros((1, 2), np.float32)
    assert SklearnPrecisionOptimizer().optimize_data_precision(np.matrix([[0.5, 1]]), out=out)[0] is out
