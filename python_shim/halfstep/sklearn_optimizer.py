"""SklearnPrecisionOptimizer: data in the smallest dtypes that keep its values, before scikit-learn sees it."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep import numpy_library as core
from halfstep.config import check_bool, check_choice
from halfstep.shrink import Decision, Job, keep_in, shrink_array
from halfstep.shrink_memory import Memory
from halfstep.shrink_report import ShrinkReport

if TYPE_CHECKING:
    from halfstep.estimator_dtypes import EstimatorCost

_PLAIN = (np.ndarray, np.memmap)


class SklearnPrecisionOptimizer:
    """Gives data smaller dtypes: float64 becomes float32, integers the smallest type of their sign kind.

    enable_float32_reduction, enable_int_downcasting: turn either off. Indices of sparse matrices become int32 in any
        case: some estimators take no others.
    memory_threshold_mb: MiB that the results of one call may take; beyond it they are written block by block into files
        that are mapped into memory and vanish with the arrays.
    mode: when a float64 column may become float32. "rtol": each finite value changes by at most 2^-24 of its size (so
        none overflows or leaves float32's normal range), columns of integers stay exact, and columns whose values
        differ little beside their size stay float64. "exact": no value changes at all; complex128 then becomes
        complex64. "force": nothing becomes infinite.
    include, exclude: names of columns of frames or of fields, positions of columns of matrices. Others stay as they
        are. A matrix has one dtype: a column of it that is left out must keep every value.
    reduce_float_y: treat a float64 y like X. By default it stays, since scikit-learn computes with float64 targets.
        int64 and uint64 of y become int32 where they fit, never narrower and never unsigned: metrics subtract them.
    memmap_dir: the folder for files; None is the system's folder for temporary files, unless that lies in memory.
    n_jobs: threads; None and -1 take this process's processors, or OMP_NUM_THREADS if that is less.
    progress: None shows a bar for large data on a terminal, if tqdm is installed and it takes more than a second; True
        always, False never.

        optimizer = SklearnPrecisionOptimizer()
        X_train, y_train = optimizer.optimize_data_precision(X_train, y_train)
        X_test, y_test = optimizer.optimize_data_precision(X_test, y_test)
        print(optimizer.report())

    Inputs are never written to. What does not change is returned as the same object; what does is a new, writable one.
    NumPy arrays of any layout and byte order (memory maps become arrays, masked and structured arrays and matrices stay
    what they are), pandas and polars frames and series, scipy.sparse matrices, and lists and tuples of these.
    """

    def __init__(
        self,
        enable_float32_reduction: bool = True,
        enable_int_downcasting: bool = True,
        memory_threshold_mb: float = 1024,
        *,
        mode: str = "rtol",
        include: Iterable[Hashable] | None = None,
        exclude: Iterable[Hashable] = (),
        reduce_float_y: bool = False,
        memmap_dir: str | os.PathLike | None = None,
        n_jobs: int | None = None,
        progress: bool | None = None,
    ) -> None:
        check_bool("enable_float32_reduction", enable_float32_reduction)
        check_bool("enable_int_downcasting", enable_int_downcasting)
        check_bool("reduce_float_y", reduce_float_y)
        check_choice(*core.MODES)("mode", mode)
        if isinstance(memory_threshold_mb, bool) or not isinstance(memory_threshold_mb, (int, float, np.number)):
            raise TypeError(f"memory_threshold_mb is {memory_threshold_mb!r}, expected a number of MiB")
        if not memory_threshold_mb >= 0:
            raise ValueError(f"memory_threshold_mb is {memory_threshold_mb}, expected >= 0")
        whole = isinstance(n_jobs, (int, np.integer)) and not isinstance(n_jobs, bool)
        if n_jobs is not None and not (whole and (n_jobs >= 1 or n_jobs == -1)):
            raise ValueError(f"n_jobs is {n_jobs!r}, expected None, -1 or an integer >= 1")
        if progress is not None:
            check_bool("progress", progress)
        if memmap_dir is not None and not isinstance(memmap_dir, (str, os.PathLike)):
            raise TypeError(f"memmap_dir is {memmap_dir!r}, expected a path")
        if memmap_dir is not None and not os.path.isdir(memmap_dir):
            raise ValueError(f"memmap_dir is {os.fspath(memmap_dir)!r}, expected an existing folder")
        self.enable_float32_reduction = enable_float32_reduction
        self.enable_int_downcasting = enable_int_downcasting
        self.memory_threshold_mb = memory_threshold_mb
        self.mode = mode
        self.include = None if include is None else _names("include", include)
        self.exclude = _names("exclude", exclude)
        self.reduce_float_y = reduce_float_y
        self.memmap_dir = memmap_dir
        self.n_jobs = n_jobs
        self.progress = progress
        self._decisions: dict[Hashable, dict[Hashable, Decision]] = {}
        self._report = ShrinkReport()
        self._last_X: tuple[np.dtype, int, int | None, str] | None = None

    def optimize_data_precision(self, X: Any, y: Any = None, *, out: np.ndarray | None = None) -> tuple[Any, Any]:
        """Return (X, y) with smaller dtypes; y stays None if it is.

        What was decided for data is used again for later data with the same columns (a matrix with as many, a frame
        with the same names and dtypes), so that a test set gets the dtypes of its training set. Where a later value
        does not fit, that column (or matrix) keeps what it needs, with a warning that says so; forget() starts anew.

        out: for an X that is a plain array: an array of the same shape, and the dtype that X gets, that receives it. It
            is written only once the decision is known: ValueError leaves it as it was.
        """
        X, y, self._report, surprises = self._go(X, y, out, convert=True)
        self._last_X = _dtype_of(X)
        for text in surprises:
            warnings.warn(f"data does not fit what was decided for earlier data. {text}", UserWarning, stacklevel=2)
        return X, y

    def plan(self, X: Any, y: Any = None) -> ShrinkReport:
        """Return what optimize_data_precision would do to X and y. It reads them; it converts and remembers nothing."""
        return self._go(X, y, None, convert=False)[2]

    def report(self) -> ShrinkReport:
        """Return what the last optimize_data_precision did, per column."""
        return self._report

    def forget(self) -> None:
        """Forget what was decided: the next data is judged by itself."""
        self._decisions.clear()

    def explain(self, estimator: Any) -> EstimatorCost:
        """Return whether `estimator`.fit would copy the X of the last call back to a larger dtype, and the bytes of it.

        estimator: a scikit-learn estimator, or a Pipeline or another estimator around some. RuntimeError before the
        first call, and after one whose X was a list or had columns that are no numbers. What is measured is a dense
        array in C order; a frame whose columns lie apart is first put together, which is added. For a sparse matrix
        the bytes are NaN.
        """
        from halfstep.estimator_dtypes import explain_estimator

        if self._last_X is None:
            raise RuntimeError(
                "explain() speaks of the X of the last optimize_data_precision(), and there was none, or one that is "
                "no array or frame of numbers"
            )
        dtype, elements, columns, kind = self._last_X
        cost = explain_estimator(estimator, dtype, elements, columns)
        if kind == "sparse":
            note = "What fit does with a sparse X was not measured."
            return replace(cost, copies=None, fit_dtype=None, bytes=math.nan, parts=(), note=note)
        if kind == "apart":
            nbytes = elements * dtype.itemsize
            note = f"First the frame's columns are put together, which takes {nbytes:,} bytes of these. {cost.note}"
            return replace(cost, copies=cost.copies and True, bytes=cost.bytes + nbytes, note=note)
        if kind == "other order":
            return replace(cost, note=f"{cost.note} This was measured for arrays in C order, and X is in another.")
        return cost

    # ----------------------------------------------------------------------------------------------------- one call

    def _job(self, target: str, memory: Memory, convert: bool) -> Job:
        floats = self.enable_float32_reduction and (target == "X" or self.reduce_float_y)
        threads = core.available_threads() if self.n_jobs in (None, -1) else int(self.n_jobs)
        narrowest = 1 if target == "X" else 4
        integers = self.enable_int_downcasting
        return Job(floats, integers, self.mode, threads, memory, convert, self.progress, target, narrowest)

    def _go(self, X: Any, y: Any, out: np.ndarray | None, convert: bool) -> tuple[Any, Any, ShrinkReport, list[str]]:
        """Return X, y, what became of them, and where they did not fit what is remembered."""
        memory = Memory(float(self.memory_threshold_mb) * 2**20, self.memmap_dir)
        learned: dict[Hashable, dict[Hashable, Decision]] = {}
        jobs = {target: self._job(target, memory, convert) for target in ("X", "y")}
        # y first: if it raises, nothing has been written to `out`.
        y = None if y is None else self._shrink(y, jobs["y"], None, learned)
        X = self._shrink(X, jobs["X"], out, learned)
        reports = [report for job in jobs.values() for report in job.reports]
        surprises = [text for job in jobs.values() for text in job.surprises]
        if convert:  # all went well: only now does anything of this call stay
            for signature, decided in learned.items():
                self._decisions.setdefault(signature, {}).update(decided)
        return X, y, ShrinkReport(tuple(reports)), surprises

    def _shrink(self, data: Any, job: Job, out: np.ndarray | None, learned: dict, place: tuple[int, ...] = ()) -> Any:
        """Shrink X, y or one of a list of them, which its `place` tells from others of the list."""
        if isinstance(data, (list, tuple)) and any(map(_is_data, data)):
            if out is not None:
                raise TypeError("out goes with an X that is one array, not with a list")
            parts = [
                self._shrink(part, job, None, learned, (*place, i)) if _is_data(part) else part
                for i, part in enumerate(data)
            ]
            if all(new is old for new, old in zip(parts, data, strict=True)):
                return data
            return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
        if isinstance(data, (str, bytes, os.PathLike)):
            raise TypeError(f"{job.target} is {data!r}, expected data; `python -m halfstep shrink` reads files")
        if isinstance(data, (list, tuple, int, float, complex)) or np.isscalar(data):
            data = np.asarray(data)
        if not (isinstance(data, np.ndarray) or _is_frame(data) or _is_sparse(data)):
            home = type(data).__module__.removeprefix("builtins")
            lazy = "; call .collect() first" if hasattr(type(data), "collect") else ""
            raise TypeError(
                f"{job.target} is a {home}{'.' if home else ''}{type(data).__qualname__}, expected a NumPy array, a "
                f"pandas or polars frame or series, a scipy.sparse matrix, or a list of these or of numbers{lazy}"
            )
        signature = (job.target, place, *_signature(data))
        job.remembered = self._decisions.get(signature, {})
        job.decided = learned[signature] = {}
        start = len(job.reports)
        result = self._shrink_one(data, job, out)
        if place:
            named = [replace(report, column=_place(place, report.column)) for report in job.reports[start:]]
            job.reports[start:] = named
        return result

    def _shrink_one(self, data: Any, job: Job, out: np.ndarray | None) -> Any:
        chosen = self._chooser(data, job)
        if out is not None:
            _check_out(out, data)
        if type(data) is np.ma.MaskedArray and data.dtype.names is None:
            from halfstep.shrink_parts import shrink_masked

            return shrink_masked(data, job, exact=_left_out(data, chosen))
        if isinstance(data, np.ndarray) and data.dtype.names is not None and type(data) in (*_PLAIN, np.recarray):
            from halfstep.shrink_parts import shrink_structured

            return shrink_structured(data, job, chosen)
        if isinstance(data, np.ndarray):
            if type(data) not in (*_PLAIN, np.matrix):
                job.keep(
                    None, data.dtype, data.nbytes, f"it is a {type(data).__name__}, whose meaning may lie elsewhere"
                )
                return keep_in(data, out)
            # Objects, strings and times also come through here.
            if job.misfit is None and job.reason_to_leave(data.dtype) is not None:
                job.keep(None, data.dtype, data.nbytes, job.reason_to_leave(data.dtype) or "")
                return keep_in(data, out)
            plain = np.asarray(data)
            result = shrink_array(plain, job, exact=_left_out(data, chosen), out=out)
            if result is plain:
                return data
            return result.view(np.matrix) if type(data) is np.matrix and out is None else result
        pandas, polars = sys.modules.get("pandas"), sys.modules.get("polars")
        if pandas is not None and isinstance(data, (pandas.DataFrame, pandas.Series)):
            from halfstep.shrink_frames import shrink_series_or_frame

            return shrink_series_or_frame(data, job, chosen, pandas)
        if polars is not None and isinstance(data, (polars.DataFrame, polars.Series)):
            from halfstep.shrink_frames import shrink_polars

            return shrink_polars(data, job, chosen, polars)
        from halfstep.shrink_parts import shrink_sparse

        return shrink_sparse(data, job)

    def _chooser(self, data: Any, job: Job) -> Callable[[Hashable], bool]:
        """Return whether a column takes part, by its name or position; ValueError for names that X does not have."""
        if job.target == "y" or (self.include is None and not self.exclude):
            return lambda name: True
        if _is_sparse(data):
            raise ValueError("include and exclude name columns, and the values of a sparse matrix lie in none")
        columns = _column_names(data)
        if columns is not None:
            unknown = [name for name in (*(self.include or ()), *self.exclude) if name not in columns]
            if unknown:
                raise ValueError(f"include or exclude name {unknown}, but X has the columns {list(columns)}")
        return lambda name: name not in self.exclude and (self.include is None or name in self.include)


def _place(place: tuple[int, ...], column: Hashable) -> str:
    return "".join(f"[{i}]" for i in place) + ("" if column is None else f" {column}")


def _names(argument: str, names: Iterable[Hashable]) -> frozenset:
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} is {names!r}, expected a list of names")
    try:
        return frozenset(names)
    except TypeError as error:
        raise TypeError(f"{argument} holds what cannot be a name: {error}") from error


def _is_frame(data: Any) -> bool:
    modules = (sys.modules.get(name) for name in ("pandas", "polars"))
    return any(module is not None and isinstance(data, (module.DataFrame, module.Series)) for module in modules)


def _is_sparse(data: Any) -> bool:
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and sparse.issparse(data)


def _is_data(value: Any) -> bool:
    """Return whether a part of a list is or holds an array or a frame of its own, and not a number or a row of them."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_data, value))
    return (
        isinstance(value, np.ndarray)
        or _is_frame(value)
        or _is_sparse(value)
        or any(hasattr(type(value), name) for name in ("dtypes", "to_numpy"))
    )


def _signature(data: Any) -> tuple[Hashable, ...]:
    """Return what data must have in common for one to get the dtypes of the other."""
    if isinstance(data, np.ndarray):
        has_columns = data.ndim == 2 or data.dtype.names is not None
        return ("array", str(data.dtype.newbyteorder("=")), data.ndim, data.shape[1:] if has_columns else ())
    if hasattr(data, "dtypes") and hasattr(data, "columns"):
        return (type(data).__module__, tuple(data.columns), tuple(map(str, data.dtypes)))
    columns = data.shape[1:] if _is_sparse(data) else ()
    return (type(data).__qualname__, str(getattr(data, "dtype", "")), getattr(data, "name", None), columns)


def _column_names(data: Any) -> Any:
    if isinstance(data, np.ndarray):
        return data.dtype.names or range(data.shape[1] if data.ndim == 2 else 1)
    return list(data.columns) if hasattr(data, "columns") else None


def _left_out(array: np.ndarray, chosen: Callable[[Hashable], bool]) -> np.ndarray:
    count = array.shape[1] if array.ndim == 2 else 1
    return np.array([not chosen(i) for i in range(count)], bool)


def _check_out(out: Any, data: Any) -> None:
    if not isinstance(out, np.ndarray) or not isinstance(data, np.ndarray) or data.dtype.names is not None:
        raise TypeError(f"out is {type(out).__name__} for an X that is {type(data).__name__}, expected plain arrays")
    if isinstance(data, np.ma.MaskedArray):
        raise TypeError("out goes with a plain array, not with a masked one")
    if out.shape != data.shape:
        raise ValueError(f"out has shape {out.shape}, expected {data.shape}")
    if not out.flags.writeable or not out.dtype.isnative:
        raise ValueError("out is read-only or not in this machine's byte order")
    if np.may_share_memory(out, data):
        raise ValueError("out shares memory with X")


def _dtype_of(data: Any) -> tuple[np.dtype, int, int | None, str] | None:
    """Return the dtype, the number of elements and of columns, and the kind of an X; None if it is no array of numbers.

    A frame becomes one array in fit, of the type that holds all of its columns.
    """
    if _is_sparse(data):
        return data.dtype, data.nnz, None, "sparse"
    if isinstance(data, np.ndarray):
        kind = "array" if data.flags.c_contiguous else "other order"
        columns = data.shape[1] if data.ndim == 2 and data.shape[1] else None
        return (data.dtype, data.size, columns, kind) if data.dtype.kind in "fiub" else None
    if not (_is_frame(data) and hasattr(data, "columns")) or not all(data.shape):
        return None
    try:
        dtype = np.result_type(*{str(each).lower().removesuffix("[pyarrow]") for each in data.dtypes})
    except (TypeError, ValueError):
        return None
    if dtype.kind not in "fiub":
        return None
    if not hasattr(data, "iloc"):
        return dtype, data.shape[0] * data.shape[1], data.shape[1], "apart"  # polars
    from halfstep.shrink_frames import is_one_matrix

    one = data.shape[1] == 1 or is_one_matrix(data)
    return dtype, data.shape[0] * data.shape[1], data.shape[1], "array" if one else "apart"
