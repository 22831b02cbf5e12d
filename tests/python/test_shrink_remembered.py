"""What an optimizer remembers of one call for the next, and that plan() leaves nothing behind."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from halfstep.sklearn import SklearnPrecisionOptimizer


def shrink(X, **options):
    return SklearnPrecisionOptimizer(**options).optimize_data_precision(X)[0]


def test_a_test_set_gets_the_dtypes_of_its_training_set() -> None:
    optimizer = SklearnPrecisionOptimizer()
    train = np.array([[1.7e9 + 0.25, 2.0**24 + 1], [1.7e9 + 60.25, 3.0]])
    assert optimizer.optimize_data_precision(train)[0] is train
    test = np.array([[0.5, 0.25]])
    assert optimizer.optimize_data_precision(test)[0] is test
    assert "so it was decided for earlier data" in optimizer.report().columns[0].blocked
    assert optimizer.optimize_data_precision(np.array([[0.5, 0.25, 1]]))[0].dtype == np.float32  # other columns
    optimizer.forget()
    assert optimizer.optimize_data_precision(test)[0].dtype == np.float32


def test_integers_of_a_test_set_do_not_get_narrower() -> None:
    optimizer = SklearnPrecisionOptimizer()
    assert optimizer.optimize_data_precision(np.array([1, 300]))[0].dtype == np.int16
    assert optimizer.optimize_data_precision(np.array([1, 3]))[0].dtype == np.int16
    assert optimizer.optimize_data_precision(np.array([1, 3], ">i8"))[0].dtype == np.int16
    assert optimizer.optimize_data_precision(np.array([1, 3], np.uint64))[0].dtype == np.uint8


def test_rules_for_columns_hold_for_the_data_they_were_decided_on() -> None:
    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision(np.array([0.5, 1.7e9 + 0.25, 2e9]))
    one_minute = np.array([1.7e9 + 0.25, 1.7e9 + 60.25])  # alone it would be refused for its spread
    assert shrink(one_minute) is one_minute
    with pytest.warns(UserWarning, match="X: it becomes float32 as before, but float32 would blur the differences"):
        assert optimizer.optimize_data_precision(one_minute)[0].dtype == np.float32
    assert optimizer.optimize_data_precision(np.array([2.0**24 + 1]))[0].dtype == np.float32
    integers = SklearnPrecisionOptimizer()
    integers.optimize_data_precision(np.array([1.0, 2.0]))
    with pytest.warns(UserWarning, match="float32 before, float64 now: float32 does not hold 16777217"):
        late_id = integers.optimize_data_precision(np.array([2.0**24 + 1]))[0]
    assert late_id.dtype == np.float64


def test_data_that_does_not_fit_widens_with_a_warning_at_the_callers_line() -> None:
    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision(np.array([0.5]), np.array([1]))
    misfit = np.array([0.5, 1e300])
    with pytest.warns(UserWarning, match=r"X: float32 before, float64 now: 1e\+300 is larger") as caught:
        assert optimizer.optimize_data_precision(misfit)[0] is misfit
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="y: int32 before, int64 now"):
        y = optimizer.optimize_data_precision(np.array([0.5]), np.array([2**40]))[1]
    assert y.dtype == np.int64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.optimize_data_precision(np.array([0.25]))[0].dtype == np.float32
        assert not optimizer.plan(misfit).columns[0].changed


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision(np.array([[0.5]]))
    report = optimizer.report()
    blocked, fitting = np.array([0.5, 1e300]), np.array([0.5, 0.25])
    for y, error in ((object(), TypeError), ({"a": 1}, TypeError)):
        with pytest.raises(error):
            optimizer.optimize_data_precision(blocked, y)
    with pytest.raises(ValueError, match="out has dtype"):
        optimizer.optimize_data_precision(blocked, out=np.zeros(2, np.float32))
    assert optimizer.report() is report
    assert optimizer.optimize_data_precision(fitting)[0].dtype == np.float32


def test_plan_says_what_a_call_would_do_and_changes_nothing() -> None:
    optimizer = SklearnPrecisionOptimizer()
    assert optimizer.plan(np.array([0.5, 1e300])).columns[0].after == "float64"
    before = optimizer.report()
    X, y = np.random.default_rng(0).standard_normal((4099, 2)), np.arange(3)
    planned = optimizer.plan(X, y)
    assert optimizer.report() is before
    X.flags.writeable = False
    optimizer.optimize_data_precision(X, y)
    assert optimizer.report() == planned
    assert optimizer.optimize_data_precision(np.array([0.5, 0.25]))[0].dtype == np.float32


def test_columns_of_integers_stay_exact_beside_a_later_fraction() -> None:
    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision(np.array([[1.0, 2.5], [5.0, 0.1]]))
    later = np.array([[2.0**24 + 1, 1.5], [0.5, 2.0]])
    with pytest.warns(UserWarning, match="float32 does not hold 16777217"):
        assert optimizer.optimize_data_precision(later)[0] is later
    forced = SklearnPrecisionOptimizer(mode="force")
    forced.optimize_data_precision(np.array([[1.0, 2.5], [5.0, 0.1]]))
    assert forced.optimize_data_precision(later)[0].dtype == np.float32


@pytest.mark.parametrize("first", [[np.nan, np.nan], [1.7e9 + 0.1, 1.7e9 + 0.1]])
@pytest.mark.parametrize("later", [[2.0**24 + 1, 3.0], [1.7e9 + 0.1, 1.7e9 + 60.3]])
def test_a_column_without_two_values_is_judged_by_later_data(first: list[float], later: list[float]) -> None:
    optimizer = SklearnPrecisionOptimizer()
    assert optimizer.optimize_data_precision(np.array(first))[0].dtype == np.float32
    with pytest.warns(UserWarning, match="float32 before, float64 now"):
        assert optimizer.optimize_data_precision(np.array(later))[0].dtype == np.float64


def test_sparse_matrices_of_other_widths_are_other_data() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    optimizer = SklearnPrecisionOptimizer()
    big = sparse.csr_matrix(np.array([[1e300, 0.0]]))
    assert optimizer.optimize_data_precision(big)[0] is big
    assert optimizer.optimize_data_precision(sparse.csr_matrix(np.array([[0.5, 0.0, 0.0]])))[0].dtype == np.float32
