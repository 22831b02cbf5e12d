"""Dtypes that were decided before, applied to other data: it gets them, or it does not fit and says where."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from halfstep import numpy_library as core
from halfstep.shrink import Decision, Job, _blocked_floats, _columns_of, _run, _where


def convert_fixed(
    array: np.ndarray, decision: Decision, job: Job, key: Hashable, names: list[Hashable] | None
) -> np.ndarray:
    """Return a numeric array with the dtype of `decision`, of whatever kind its own is.

    float64 becomes float32 by the rule for elements of the job's mode, where columns of integers stay exact; every
    other change keeps each value. A value that does not allow it raises ValueError with its column and row; with
    job.misfit "widen" the array is returned as it is, and job.surprises tells of it.
    """
    result, misfit = _apply(array, decision, job, names)
    if misfit and job.misfit == "raise":
        raise ValueError(f'{misfit}. on_misfit="widen" keeps such data as it is')
    if misfit:
        job.surprises.append(misfit)
    job.becomes[key] = array.dtype if misfit else decision.dtype
    return array if misfit else result


def _apply(
    array: np.ndarray, decision: Decision, job: Job, names: list[Hashable] | None
) -> tuple[np.ndarray, str | None]:
    """Return the result (`array` if nothing is to be converted), and the first value that does not fit, in words."""
    dtype = decision.dtype
    if array.dtype == dtype:
        return array, None
    if np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype), None
    if dtype == np.float32 and array.dtype.kind in "iu":  # by the rules for float64, if that holds the values
        floats, same = _round_trip(array, np.dtype(np.float64))
        if not same.all():
            return array, _first(array, ~same, dtype, names)
        return _apply(floats, dataclasses.replace(decision, integral=(True,), unknown=()), job, names)
    same_kind = array.dtype.kind in "iu" and array.dtype.kind == dtype.kind
    if not same_kind and (array.dtype.newbyteorder("=").str[1:], dtype.str[1:]) != ("f8", "f4"):
        result, same = _round_trip(array, dtype)
        return result, None if same.all() else _first(array, ~same, dtype, names)

    axis, count = _columns_of(array)
    columns = core.no_columns(array.dtype, count)
    result = job.memory.empty_like(array, dtype) if job.convert else array
    _run(array, columns, axis, result if job.convert else None, job)
    if same_kind:
        fits = np.array([each.itemsize <= dtype.itemsize for each in core.decide_integers(columns, array.dtype)], bool)
        if fits.all():
            return result, None
        limits = np.iinfo(dtype)
        return array, _first(array, (array < limits.min) | (array > limits.max), dtype, names)
    flags = [each if len(each) == count else (any(each),) * count for each in (decision.integral, decision.unknown)]
    blocked = _blocked_floats(columns, job, Decision(dtype, *flags), np.zeros(count, bool))
    if not blocked.any():
        return result, None
    i = int(np.flatnonzero(blocked)[0])
    text, place = _where(array, axis, blocked, columns)[i]
    return array, f"{_named(names, i, place, axis)}: {text}; {dtype} was decided in fit"


def _round_trip(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return `array` as `dtype`, and which elements kept their value."""
    with np.errstate(all="ignore"):
        result = array.astype(dtype)
        same = (result.astype(array.dtype) == array) & ((result < 0) == (array < 0))
    kinds = array.dtype.kind, dtype.kind
    if kinds == ("f", "f"):
        same |= np.isnan(array)
    elif "f" in kinds and kinds[1 - kinds.index("f")] in "iu":
        # What lies beyond the integers converts to what the processor likes, and back.
        floats, limits = (array, np.iinfo(dtype)) if kinds[0] == "f" else (result, np.iinfo(array.dtype))
        same &= (floats >= float(limits.min)) & (floats < float(limits.max) + 1)
    return result, same


def _first(array: np.ndarray, wrong: np.ndarray, dtype: np.dtype, names: list[Hashable] | None) -> str:
    index = np.unravel_index(int(np.argmax(wrong)), array.shape)
    axis, _ = _columns_of(array)
    place = _named(names, int(index[1]) if axis >= 0 else 0, int(index[0]) if index else None, axis)
    return f"{place}: {dtype}, which was decided in fit, does not hold {array[index]}"


def _named(names: list[Hashable] | None, column: int, row: Any, axis: int) -> str:
    name = names[column] if names is not None else column if axis >= 0 else None
    return f"X has a value that does not fit in {'' if name is None else f'column {name!r}, '}row {row}"
