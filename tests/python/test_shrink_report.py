"""What reports show of wide data, of memory beside the values, and what explain() says of layouts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp
from halfstep.sklearn import SklearnPrecisionOptimizer
from sklearn.ensemble import RandomForestClassifier
from sklearn.svm import SVC, LinearSVC


def test_of_many_columns_those_that_matter_are_shown() -> None:
    X = np.full((4, 1000), 0.5)
    X[3, 777] = 1e300
    report = SklearnPrecisionOptimizer().plan(X)
    assert len(report.columns) == 1000
    assert str(report).splitlines()[1:] == [
        "X  777     float64  float64  32 B    32 B   0      1e+300 is larger than float32 holds (row 3)",
        "and 999 more: float64 -> float64",
        "31.2 KB -> 31.2 KB (0.0% less)",
    ]
    X[3, 777] = 1.0
    assert len(str(SklearnPrecisionOptimizer().plan(X)).splitlines()) == 1 + 20 + 1 + 1
    assert "and 980 more: float64 -> float32\n" in str(SklearnPrecisionOptimizer().plan(X))
    assert repr(report) == str(report), "what a notebook shows"


def test_values_that_moved_visibly_are_told() -> None:
    stamps = 1.7e9 + np.linspace(0, 7 * 86400, 1000) + 0.25
    report = SklearnPrecisionOptimizer().plan(stamps)
    assert report.columns[0].after == "float32"
    assert report.columns[0].note == "values moved by up to 1e+02"
    assert np.abs(stamps.astype(np.float32) - stamps).max() < 102
    assert SklearnPrecisionOptimizer().plan(np.linspace(0.1, 1, 10)).columns[0].note == ""


def test_bytes_are_those_of_the_columns() -> None:
    frame = pd.DataFrame({"i": pd.array([1, None, 3] * 100, dtype="Int64")})
    optimizer = SklearnPrecisionOptimizer()
    small, _ = optimizer.optimize_data_precision(frame)
    report = optimizer.report()
    assert report.bytes_before == frame.memory_usage(index=False).sum() == 300 * 9
    assert report.bytes_after == small.memory_usage(index=False).sum() == 300 * 2
    flags = pl.DataFrame({"b": [True, False] * 500})
    assert SklearnPrecisionOptimizer().plan(flags).bytes_before == flags.estimated_size()


def test_explain_tells_layouts_apart() -> None:
    X = np.random.default_rng(0).normal(size=(100, 4))
    optimizer = SklearnPrecisionOptimizer()

    def explain(X, estimator):
        optimizer.optimize_data_precision(X)
        return optimizer.explain(estimator)

    forest = RandomForestClassifier()
    assert explain(X, forest).bytes == 0
    assert explain(X, SVC()).bytes == 400 * 8
    assert "another" in explain(np.asfortranarray(X), forest).note
    assert explain(pd.DataFrame(X), forest).bytes == 0, "one matrix"
    apart = pd.DataFrame({name: X[:, i].copy() for i, name in enumerate("abcd")}, copy=False)
    assert explain(apart, forest).bytes == 400 * 4
    assert "put together" in optimizer.explain(forest).note
    sparse = explain(sp.csr_matrix(X), LinearSVC())
    assert sparse.copies is None
    assert math.isnan(sparse.bytes)
    optimizer.optimize_data_precision(pd.DataFrame({"a": [1.5, 2], "t": ["x", "y"]}))
    with pytest.raises(RuntimeError, match="no array or frame of numbers"):
        optimizer.explain(forest)


def test_a_pipeline_with_a_reducer_is_looked_through() -> None:
    from halfstep.sklearn import PrecisionReducer
    from sklearn.pipeline import make_pipeline

    optimizer = SklearnPrecisionOptimizer()
    optimizer.optimize_data_precision(np.random.default_rng(0).normal(size=(100, 4)))
    assert optimizer.explain(make_pipeline(PrecisionReducer(), SVC())).bytes == 400 * 8
