"""PrecisionReducer: the dtype optimizer as a scikit-learn transformer. This module alone imports scikit-learn."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Hashable
from typing import Any

import numpy as np
from sklearn import get_config
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from halfstep.config import check_choice
from halfstep.shrink import Decision, Job
from halfstep.shrink_frames import polars_numbers
from halfstep.shrink_memory import Memory
from halfstep.shrink_report import ShrinkReport
from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer

_FORMATS = ("csr", "csc", "coo", "bsr", "dia")


class PrecisionReducer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Gives features the smallest dtypes that keep their values: fit decides, transform applies.

    The rules are SklearnPrecisionOptimizer's. What fit decided holds for all later data: a column whose first values
    fit int8 becomes int8, also where later ones would need less or come as another type of numbers.

    mode: "rtol", "exact" or "force": when float64 may become float32.
    enable_float32_reduction, enable_int_downcasting: turn either off.
    on_misfit: what transform does with a value that the dtype of fit does not hold, or not exactly enough. "raise":
        ValueError that names column, row and value. "widen": that column (of arrays: all of it) is returned with the
        dtype that it came with, and a UserWarning tells why.
    n_jobs: threads; None and -1 take this process's processors, or OMP_NUM_THREADS if that is less.

    Takes numbers and truth values alone: arrays, sparse matrices, pandas and polars frames; with NaN and infinities.
    A frame gets a dtype per column and stays a frame of its library, with its index, unless set_output() asks for
    another; an array has one dtype for all. If fit saw a frame, transform gives an array the dtype that holds those of
    all columns; if fit saw an array, it makes frames arrays. Inputs are never written to; an array that already has its
    dtype is returned itself.

    dtypes_: a dict from column names to NumPy dtypes after fit on a frame (a nullable column becomes nullable of that
        dtype), else one NumPy dtype.
    report_: the ShrinkReport of the data of fit.
    n_features_in_, feature_names_in_: as everywhere in scikit-learn.

        pipeline = make_pipeline(PrecisionReducer(), RandomForestClassifier())
    """

    def __init__(
        self,
        mode: str = "rtol",
        enable_float32_reduction: bool = True,
        enable_int_downcasting: bool = True,
        on_misfit: str = "raise",
        n_jobs: int | None = None,
    ) -> None:
        self.mode = mode
        self.enable_float32_reduction = enable_float32_reduction
        self.enable_int_downcasting = enable_int_downcasting
        self.on_misfit = on_misfit
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> PrecisionReducer:
        """Decide the dtypes for the columns of X; y is ignored. X is read and neither changed nor kept."""
        by_column = _library(X) is not None
        X = self._checked(X, by_column, reset=True)
        optimizer, job = self._job(convert=False)
        optimizer._shrink_one(X, job, None)
        if by_column:
            decided = {name: _native(job.decided.get(name), _column_dtype(X[name])) for name in X.columns}
            self.dtypes_ = {name: decision.dtype for name, decision in decided.items()}
            self._decisions = tuple(decided.values())
        else:
            decision = _native(job.decided.get("data" if _is_sparse(X) else None), X.dtype)
            self.dtypes_ = decision.dtype
            self._decisions = (decision,)
        self.report_ = ShrinkReport(tuple(job.reports))
        return self

    def transform(self, X: Any) -> Any:
        """Return X with the dtypes of fit; ValueError for values that do not fit them, unless on_misfit is "widen"."""
        check_is_fitted(self)
        library = _library(X) if isinstance(self.dtypes_, dict) else None
        X = self._checked(X, library is not None, reset=False)
        optimizer, job = self._job(convert=True)
        if library is not None:
            remembered = dict(zip(X.columns, self._decisions, strict=True))
        else:
            remembered = {"data" if _is_sparse(X) else None: _common(self._decisions)}
        job = dataclasses.replace(job, misfit=self.on_misfit, remembered=remembered)
        result = optimizer._shrink_one(X, job, None)
        for text in job.surprises:
            warnings.warn(f"{text}. It stays as it is.", UserWarning, stacklevel=3)  # through set_output's wrapper
        if library is None:
            return result
        wanted = getattr(self, "_sklearn_output_config", {}).get("transform", get_config()["transform_output"])
        if library == "polars" and wanted == "pandas":  # pandas would make one matrix of it
            import pandas

            return pandas.DataFrame({each.name: _pandas_column(each, pandas) for each in result.iter_columns()})
        # scikit-learn sets the names of what is returned, which must not be the caller's own.
        if result is not X:
            return result
        return X.clone() if library == "polars" else X.copy(deep=False)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _checked(self, X: Any, by_column: bool, reset: bool) -> Any:
        if not by_column:
            return validate_data(self, X, reset=reset, accept_sparse=_FORMATS, dtype="numeric", ensure_all_finite=False)
        names = list(X.columns)
        if len(set(names)) < len(names):
            again = sorted({name for name in names if names.count(name) > 1}, key=str)
            raise ValueError(f"X has columns of the same name: {again}")
        validate_data(self, X, reset=reset, skip_check_array=True)
        return _numeric_frame(X)

    def _job(self, convert: bool) -> tuple[SklearnPrecisionOptimizer, Job]:
        check_choice("raise", "widen")("on_misfit", self.on_misfit)
        optimizer = SklearnPrecisionOptimizer(
            self.enable_float32_reduction,
            self.enable_int_downcasting,
            math.inf,
            mode=self.mode,
            n_jobs=None if self.n_jobs == -1 else self.n_jobs,
        )
        return optimizer, optimizer._job("X", Memory(math.inf, None), convert)


def _library(X: Any) -> str | None:
    """Return the library of a frame, None for other data."""
    for name in ("pandas", "polars"):
        if name in sys.modules and isinstance(X, sys.modules[name].DataFrame):
            return name
    return None


def _is_sparse(X: Any) -> bool:
    return not isinstance(X, np.ndarray)  # validate_data leaves nothing else


def _native(decision: Decision | None, dtype: np.dtype) -> Decision:
    """Return a decision in this machine's byte order; where there is none, the one to stay at `dtype`."""
    decision = decision or Decision(dtype, (False,))
    return dataclasses.replace(decision, dtype=decision.dtype.newbyteorder("="))


def _common(decisions: tuple[Decision, ...]) -> Decision:
    """Return what an array gets: the dtype that holds those of all columns."""
    if len(decisions) == 1:
        return decisions[0]
    flags = tuple(decision.dtype.kind != "f" or any(decision.integral) for decision in decisions)
    unknown = tuple(any(decision.unknown) for decision in decisions)
    return Decision(np.result_type(*(decision.dtype for decision in decisions)), flags, unknown)


def _pandas_column(column: Any, pandas: Any) -> Any:
    """Return a polars column for pandas; integers with missing values stay integers."""
    if not column.null_count() or column.dtype.is_float():
        return column.to_numpy()
    values = column.fill_null(False if column.dtype == sys.modules["polars"].Boolean else 0).to_numpy()
    kind = pandas.arrays.BooleanArray if values.dtype == bool else pandas.arrays.IntegerArray
    return kind(values.copy(), column.is_null().to_numpy().copy())


def _column_dtype(column: Any) -> np.dtype | None:
    """Return the NumPy dtype of the values of a column, None if these are no numbers."""
    dtype = column.dtype
    if _library(column.to_frame()) == "polars":
        polars = sys.modules["polars"]
        found = polars.Series([], dtype=dtype).to_numpy().dtype if polars_numbers(dtype, polars) else None
    elif isinstance(dtype, np.dtype):
        found = dtype
    else:
        found = getattr(dtype, "numpy_dtype", None)
    return found if found is not None and found.kind in "biuf" else None


def _numbers(column: Any) -> Any:
    """Return a pandas column of objects as integers if it holds nothing else, as float64 otherwise."""
    numbers = column.infer_objects()
    return numbers if numbers.dtype.kind in "iu" else column.astype("float64")


def _numeric_frame(X: Any) -> Any:
    """Return a frame of numbers: X, or a copy whose objects have become float64; ValueError for other columns."""
    names: list[Hashable] = list(X.columns)
    if not names or not len(X):
        what = "feature" if not names else "sample"
        raise ValueError(f"Found array with 0 {what}(s) (shape={X.shape}) while a minimum of 1 is required.")
    objects = {}
    for name in names:
        if X[name].dtype == object:
            try:
                objects[name] = _numbers(X[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"column {name!r} has objects that are no numbers: {error}") from error
        elif _column_dtype(X[name]) is None:
            raise ValueError(
                f"column {name!r} has dtype {X[name].dtype}, expected numbers; a ColumnTransformer can select them"
            )
    if not objects:
        return X
    X = X.copy(deep=False)
    for name, column in objects.items():
        X[name] = column
    return X
