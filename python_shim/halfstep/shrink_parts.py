"""Smaller dtypes for what consists of arrays: masked and structured arrays, sparse matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from halfstep.shrink import Job, shrink_array
from halfstep.shrink_report import ColumnReport

_INT32_MAX = np.iinfo(np.int32).max


def shrink_masked(array: np.ma.MaskedArray, job: Job, **options: Any) -> np.ma.MaskedArray:
    """Return a masked array with a smaller dtype; values below the mask do not decide, and are cast as they come."""
    data, mask = np.asarray(array.data), np.ma.getmask(array)
    judged = data
    if mask is not np.ma.nomask and np.all(mask):
        job.keep(None, data.dtype, data.nbytes, "it has no values")
        return array
    hidden = job.reason_to_leave(data.dtype) is None and bool(np.any(mask))
    if hidden:
        # NaN is no value, and of integers one that is repeated changes nothing.
        nothing = np.nan if data.dtype.kind in "fc" else data[~mask].flat[0]
        judged = np.where(mask, np.asarray(nothing, data.dtype), data)
    result = shrink_array(judged, job, **options)
    if result is judged:
        return array
    with np.errstate(all="ignore"):
        fill = np.asarray(array.fill_value).astype(result.dtype)
        if hidden:
            np.copyto(result, data, where=mask, casting="unsafe")
    own = mask if mask is np.ma.nomask else mask.copy()  # else masking an element would mask it in both
    small = np.ma.MaskedArray(result, mask=own, copy=False, hard_mask=array.hardmask)
    if np.array_equal(fill, array.fill_value):  # else NumPy's own for the new dtype: the old one does not exist there
        small.fill_value = fill
    return small


def shrink_structured(array: np.ndarray, job: Job, chosen: Callable[[Hashable], bool]) -> np.ndarray:
    """Return a structured array whose fields have smaller dtypes: one copy of all of it, without gaps."""
    plan = dataclasses.replace(job, convert=False)  # shares the reports and decisions
    small: dict[str, np.dtype] = {}
    for name in array.dtype.names:
        field = array[name]
        if not chosen(name) or field.dtype.names is not None:
            job.keep(name, field.dtype, field.nbytes, "left out" if not chosen(name) else "it is a structure")
            continue
        if field.ndim > 2:
            field = field.reshape(len(field), math.prod(field.shape[1:]))
        shrink_array(field, plan, key=name, names=[name] * (field.shape[1] if field.ndim == 2 else 1))
        if field.ndim == 2:
            _one_report(job, field)
        if job.becomes[name].itemsize < field.dtype.itemsize:
            small[name] = job.becomes[name]
    if not small or not job.convert:
        return array
    fields = [
        ((title[0], name) if title else name, small.get(name, old.base), old.shape)
        for name, (old, _, *title) in ((name, array.dtype.fields[name]) for name in array.dtype.names)
    ]
    dtype = np.dtype(fields, align=array.dtype.isalignedstruct)
    result = job.memory.empty_like(np.asarray(array), dtype)
    for name in array.dtype.names:
        result[name] = array[name]  # the values fit: that was decided
    return result.view(type(array)) if isinstance(array, np.recarray) else result


def _one_report(job: Job, field: np.ndarray) -> None:
    """Make one report of those of the columns of a field that is itself an array."""
    count = field.shape[1]
    parts = job.reports[-count:] if count else []
    if not parts:
        return
    worst = next((part for part in parts if part.position is not None), parts[0])
    job.reports[-count:] = [
        dataclasses.replace(
            worst,
            bytes_before=sum(part.bytes_before for part in parts),
            bytes_after=sum(part.bytes_after for part in parts),
            max_relative_error=max(part.max_relative_error for part in parts),
        )
    ]


def shrink_sparse(matrix: Any, job: Job) -> Any:
    """Return a scipy.sparse matrix with smaller values and indices, which shares no array with `matrix`.

    Values by the rules for one column, floats only. Indices become int32 if the number of values and both sizes allow
    it: many estimators take no others.
    """
    if matrix.format not in ("csr", "csc", "coo", "bsr", "dia"):
        job.keep("data", matrix.dtype, 0, f"the format {matrix.format} has no arrays to reduce: use tocsr()")
        return matrix
    values = matrix.data
    if values.dtype.kind in "iu" and job.misfit is None:
        job.keep("data", values.dtype, values.nbytes, "integers of sparse matrices stay: products and sums would wrap")
        data = values
    else:
        flat = values.reshape(-1)
        data = shrink_array(flat, job, key="data", names=["data"])
        data = values if data is flat else data.reshape(values.shape)
    small = max(*matrix.shape, values.size) <= _INT32_MAX
    if matrix.format == "coo":
        indices = {f"coords[{i}]": array for i, array in enumerate(matrix.coords)}
    else:
        indices = {name: getattr(matrix, name) for name in _INDICES[matrix.format]}
    changed = {name: _shrink_indices(array, name, small, job) for name, array in indices.items()}
    if data is values and all(changed[name] is indices[name] for name in indices):
        return matrix
    # Arrays that stay are copied too: sort_indices() and others write to them, and only to those of one matrix.
    changed = {name: _copy(array, job) if array is indices[name] else array for name, array in changed.items()}
    # Not the constructor: it checks the indices, and chooses a dtype for them that need not be this one.
    result = _shell(matrix)
    result.data = _copy(data, job) if data is values else data
    if matrix.format == "coo":
        result.coords = tuple(changed.values())
    else:
        for name, array in changed.items():
            setattr(result, name, array)
    return result


_INDICES = {
    "csr": ("indices", "indptr"),
    "csc": ("indices", "indptr"),
    "bsr": ("indices", "indptr"),
    "dia": ("offsets",),
}


def _copy(array: np.ndarray, job: Job) -> np.ndarray:
    result = job.memory.empty_like(array, array.dtype)
    np.copyto(result, array)
    return result


def _shell(matrix: Any) -> Any:
    """Return a matrix with the same arrays and flags, whose arrays can be replaced."""
    result = type(matrix).__new__(type(matrix))
    result.__dict__.update(matrix.__dict__)
    return result


def _shrink_indices(array: np.ndarray, name: str, small: bool, job: Job) -> np.ndarray:
    if array.dtype != np.int64:
        job.keep(name, array.dtype, array.nbytes)
        return array
    if not small:
        job.keep(name, array.dtype, array.nbytes, "a size or the number of values exceeds 2^31 - 1")
        return array
    if array.size == 0:  # all index arrays of a matrix have one dtype
        job.reports.append(ColumnReport(job.target, name, "int64", "int32", 0, 0))
        return array.astype(np.int32)
    narrow = dataclasses.replace(job, narrowest=4, integers=True, remembered={}, decided={}, misfit=None)
    return shrink_array(array, narrow, key=None, names=[name])
