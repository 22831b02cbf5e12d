"""Smaller dtypes for what consists of arrays: masked and structured arrays, sparse matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from halfstep.shrink import Job, shrink_array

_INT32_MAX = np.iinfo(np.int32).max


def shrink_masked(array: np.ma.MaskedArray, job: Job, **options: Any) -> np.ma.MaskedArray:
    """Return a masked array with a smaller dtype; values below the mask do not decide."""
    data, mask = np.asarray(array.data), np.ma.getmask(array)
    start = len(job.reports)
    result = shrink_array(data, job, **options)
    if result is data and job.reason_to_leave(data.dtype) is None and np.any(mask) and not np.all(mask):
        del job.reports[start:]
        job.decided.pop(options.get("key"), None)
        # Again without what is masked: of a value that is repeated nothing depends.
        known = data[~np.ma.getmaskarray(array)].flat[0]
        data = np.where(mask, np.asarray(known, data.dtype), data) if data.ndim else data
        result = shrink_array(data, job, **options)
    if result is data:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        fill = np.asarray(array.fill_value).astype(result.dtype)
    same = np.array_equal(fill, array.fill_value)
    small = np.ma.MaskedArray(result, mask=mask, copy=False, hard_mask=array.hardmask)
    if same:  # else NumPy's own for the new dtype: the old one does not exist there
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
        shrink_array(
            field.reshape(len(field), -1) if field.ndim > 2 else field, plan, key=name, names=_same(field, name)
        )
        if field.ndim == 2 or field.ndim > 2:
            _one_report(job, field)
        if name in job.decided and job.decided[name].dtype.itemsize < field.dtype.itemsize:
            small[name] = job.decided[name].dtype
    if not small or not job.convert:
        return array
    base = {name: array.dtype.fields[name][0] for name in array.dtype.names}
    dtype = np.dtype(
        [(name, small.get(name, base[name].base), base[name].shape) for name in array.dtype.names],
        align=array.dtype.isalignedstruct,
    )
    result = job.memory.empty_like(np.asarray(array), dtype)
    for name in array.dtype.names:
        result[name] = array[name]  # the values fit: that was decided
    return result.view(type(array)) if isinstance(array, np.recarray) else result


def _same(field: np.ndarray, name: str) -> list[str]:
    return [name] * (int(np.prod(field.shape[1:])) if field.ndim > 1 else 1)


def _one_report(job: Job, field: np.ndarray) -> None:
    """Make one report of those of the columns of a field that is itself an array."""
    count = int(np.prod(field.shape[1:]))
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
    """Return a scipy.sparse matrix with smaller values and indices; arrays that stay are shared with `matrix`.

    Values by the rules for one column, floats only. Indices become int32 if the number of values and both sizes allow
    it: many estimators take no others.
    """
    if matrix.format not in ("csr", "csc", "coo", "bsr", "dia"):
        job.keep("data", matrix.dtype, 0, f"the format {matrix.format} has no arrays to reduce: use tocsr()")
        return matrix
    values = matrix.data
    if values.dtype.kind in "iu":
        job.keep("data", values.dtype, values.nbytes, "integers of sparse matrices stay: products and sums would wrap")
        data = values
    else:
        flat = values.reshape(-1) if values.flags.c_contiguous else values
        data = shrink_array(flat, job, key="data", names=["data"] * (1 if flat.ndim == 1 else flat.shape[1]))
        data = values if data is flat else data.reshape(values.shape)
    small = max(*matrix.shape, values.size) <= _INT32_MAX
    if matrix.format == "coo":
        indices = {f"coords[{i}]": array for i, array in enumerate(matrix.coords)}
    else:
        indices = {name: getattr(matrix, name) for name in _INDICES[matrix.format]}
    changed = {name: _shrink_indices(array, name, small, job) for name, array in indices.items()}
    if data is values and all(changed[name] is indices[name] for name in indices):
        return matrix
    # Not the constructor: it checks the indices, and chooses a dtype for them that need not be this one.
    result = _shell(matrix)
    result.data = data
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
    narrow = dataclasses.replace(job, narrowest=4, integers=True, remembered={}, decided={})
    return shrink_array(array, narrow, key=None, names=[name])
