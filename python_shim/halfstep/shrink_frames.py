"""Smaller dtypes for the columns of pandas and polars frames. Neither is imported here: who has a frame has done it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from halfstep.shrink import Decision, Job, shrink_array

Chosen = Callable[[Hashable], bool]


def shrink_series_or_frame(data: Any, job: Job, chosen: Chosen, pandas: Any) -> Any:
    """Return a pandas frame or series with smaller dtypes: a new one, or `data` itself if no column changes.

    Columns that stay share their memory with `data`. Index, names and attrs are kept.
    """
    if isinstance(data, pandas.Series):
        result = _shrink_series(data, job, data.name, chosen, pandas)
        return (
            data if result is None else _like(data, pandas.Series(result, index=data.index, name=data.name, copy=False))
        )
    together = _shrink_block(data, job, chosen)
    if together is not None:
        return data if together is data else _like(data, together)
    columns = [
        _shrink_series(data.iloc[:, i], job, name, chosen, pandas, key=_key(data, i))
        for i, name in enumerate(data.columns)
    ]
    if all(column is None for column in columns):
        return data
    parts = {
        i: data.iloc[:, i] if column is None else pandas.Series(column, index=data.index, copy=False)
        for i, column in enumerate(columns)
    }
    result = pandas.DataFrame(parts, index=data.index, copy=False)
    result.columns = data.columns
    return _like(data, result)


def _like(data: Any, result: Any) -> Any:
    result.attrs = dict(data.attrs)
    return result


def _key(data: Any, i: int) -> Hashable:
    """Return a name for a column that is its own even where names repeat."""
    name = data.columns[i]
    return name if data.columns.is_unique else (name, i)


def _shrink_block(data: Any, job: Job, chosen: Chosen) -> Any:
    """Shrink a frame that is one float64 matrix, as from DataFrame(matrix), to one: fit takes that as it is.

    Returns None where it is none, or where the columns do not all share one fate.
    """
    count = data.shape[1]
    if count < 2 or len(data) == 0 or any(dtype != np.float64 for dtype in data.dtypes):
        return None
    keys = [_key(data, i) for i in range(count)]
    if not is_one_matrix(data) or not all(map(chosen, data.columns)) or any(key in job.remembered for key in keys):
        return None
    matrix = data.to_numpy(copy=False)
    if not np.may_share_memory(matrix, data.iloc[:, 0].to_numpy()):  # views of a matrix, which pandas copies
        return None
    reports, decided = len(job.reports), dict(job.decided)
    result = shrink_array(matrix, job, key=None, names=list(data.columns))
    if result is matrix:  # one by one, then: others may fit. In a plan nothing is converted: it is read twice.
        del job.reports[reports:]
        job.decided.clear()
        job.decided.update(decided)
        return None
    whole = job.decided.pop(None)
    flags = zip(keys, whole.integral, whole.unknown, strict=True)
    job.decided.update({key: Decision(result.dtype, (flag,), (unknown,)) for key, flag, unknown in flags})
    return type(data)(np.asarray(result), index=data.index, columns=data.columns, copy=False)


def is_one_matrix(data: Any) -> bool:
    """Return whether all columns of a pandas frame lie in one matrix: to_numpy() then mostly makes no copy."""
    return _owner(data.iloc[:, 0].to_numpy()) is _owner(data.iloc[:, -1].to_numpy())


def _owner(array: np.ndarray) -> np.ndarray:
    """Return the array whose memory this one shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _shrink_series(series: Any, job: Job, name: Hashable, chosen: Chosen, pandas: Any, key: Hashable = None) -> Any:
    """Return the array for a smaller column, None if it stays as it is."""
    key = name if key is None else key
    nbytes = int(series.memory_usage(index=False, deep=False))
    if not chosen(name):
        job.keep(name, series.dtype, nbytes, "left out")
        return None
    if isinstance(series.dtype, np.dtype):
        values = series.to_numpy()
        result = shrink_array(values, job, key=key, names=[name])
        return None if result is values else np.asarray(result)  # pandas takes a np.memmap for another class
    array = series.array
    kinds = pandas.arrays
    masked = isinstance(array, (kinds.IntegerArray, kinds.FloatingArray, kinds.BooleanArray))
    arrow = isinstance(series.dtype, pandas.ArrowDtype) and series.dtype.kind in "biuf"
    if not masked and not arrow:
        job.keep(name, series.dtype, nbytes)
        return None
    dtype = np.dtype(series.dtype.numpy_dtype)
    missing = np.asarray(series.isna())
    # What lies below the mask must not decide: NaN is no value, and of integers a value repeated changes nothing.
    # What was decided before is only applied, and 0 fits everywhere.
    fill = np.nan if dtype.kind == "f" else (0 if missing.all() else array[int(np.argmin(missing))])
    fill = fill if job.misfit is None else dtype.type(0)
    values = array.to_numpy(dtype=dtype, na_value=fill)
    start = len(job.reports)
    if missing.all() and job.misfit is None:
        job.keep(name, series.dtype, nbytes, "it has no values")
        return None
    # Arrow's memory is its own: the core decides, pandas converts.
    one = dataclasses.replace(job, convert=job.convert and not arrow)
    result = shrink_array(values, one, key=key, names=[name])
    small = job.becomes[key]
    after = _extension_dtype(series.dtype, small, pandas) if small != dtype else series.dtype
    names = {str(dtype): str(series.dtype), str(small): str(after)}
    job.reports[start:] = [_renamed(report, names, nbytes) for report in job.reports[start:]]
    if arrow:
        if small == dtype or not job.convert:
            return None
        _take(job, name, "Arrow", len(series) * small.itemsize)
        return array.astype(after)
    if result is values:
        return None
    kind = {"f": kinds.FloatingArray, "b": kinds.BooleanArray}.get(result.dtype.kind, kinds.IntegerArray)
    return kind(np.asarray(result), missing)


def _renamed(report: Any, names: dict[str, str], nbytes: int) -> Any:
    """Return a report of values as one of their column, which takes `nbytes` with what tells missing values."""
    saved = report.bytes_before - report.bytes_after
    sizes = {"bytes_before": nbytes, "bytes_after": max(nbytes - saved, 0)}
    return dataclasses.replace(report, before=names[report.before], after=names[report.after], **sizes)


def _take(job: Job, name: Hashable, library: str, nbytes: int) -> None:
    """Count a column that a library converts in memory of its own; ValueError beyond the bound."""
    if not job.memory.fits(nbytes):
        raise ValueError(
            f"column {name!r}: {library} cannot keep columns in files, and memory_threshold_mb leaves "
            f"{job.memory.left / 2**20:.0f} MB: pass a larger one, or arrays"
        )
    job.memory.take(nbytes)


def _extension_dtype(dtype: Any, small: np.dtype, pandas: Any) -> Any:
    if isinstance(dtype, pandas.ArrowDtype):
        import pyarrow

        return pandas.ArrowDtype(pyarrow.from_numpy_dtype(small))
    return pandas.api.types.pandas_dtype("boolean" if small.kind == "b" else _capital(small))


def _capital(dtype: np.dtype) -> str:
    return dtype.name.capitalize().replace("Uint", "UInt")


def shrink_polars(data: Any, job: Job, chosen: Chosen, polars: Any) -> Any:
    """Return a polars frame or series with smaller dtypes: a new one, or `data` itself if no column changes.

    The core decides, polars converts: its memory is its own, so a bound that needs files cannot be kept.
    """
    if isinstance(data, polars.Series):
        return _shrink_polars_series(data, job, chosen, polars)
    columns = [_shrink_polars_series(column, job, chosen, polars) for column in data.iter_columns()]
    changed = [new for new, old in zip(columns, data.iter_columns(), strict=True) if new.dtype != old.dtype]
    return data.with_columns(changed) if changed else data


def polars_numbers(dtype: Any, polars: Any) -> bool:
    """Return whether a polars dtype is of truth values, or of numbers that NumPy has too."""
    numbers = dtype.is_integer() or dtype.is_float() or dtype == polars.Boolean
    return numbers and not str(dtype).endswith("128")


def _shrink_polars_series(series: Any, job: Job, chosen: Chosen, polars: Any) -> Any:
    name, nbytes = series.name, series.estimated_size()
    if not chosen(name):
        job.keep(name, series.dtype, nbytes, "left out")
        return series
    if not polars_numbers(series.dtype, polars):
        job.keep(name, series.dtype, nbytes)
        return series
    values = series
    missing = series.null_count()
    if missing == len(series) and job.misfit is None:
        job.keep(name, series.dtype, nbytes, "it has no values" if len(series) else "it has no elements")
        return series
    if missing and job.misfit is not None:  # 0 fits everywhere
        values = series.fill_null(False if series.dtype == polars.Boolean else 0)
    elif missing:
        values = series.fill_null(float("nan") if series.dtype.is_float() else series.drop_nulls()[0])
    start = len(job.reports)
    array = values.to_numpy()
    shrink_array(array, dataclasses.replace(job, convert=False), key=name, names=[name])
    small = job.becomes[name]
    target = series.dtype
    if small != array.dtype:
        target = polars.Boolean if small.kind == "b" else getattr(polars, _capital(small))
    names = {str(array.dtype): str(series.dtype), str(small): str(target)}
    job.reports[start:] = [_renamed(report, names, nbytes) for report in job.reports[start:]]
    if target == series.dtype or not job.convert:
        return series
    _take(job, name, "polars", array.size * small.itemsize)
    return series.cast(target)
