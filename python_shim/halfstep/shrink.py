"""Smaller dtypes for one array: what it may become, and the conversion, by the core's rules (`halfstep/shrink.h`)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable
from typing import Any

import numpy as np

from halfstep import numpy_library as core
from halfstep.shrink_memory import Memory, is_own_file, let_go
from halfstep.shrink_report import ColumnReport

_SAMPLE = 1024  # rows that are looked at before anything is converted
_BLOCK = 1 << 26  # bytes of input between two steps of the progress bar, and of what a file may keep in memory
_ALL = (Ellipsis,)  # an array of no dimension stays an array
_LARGE = 1 << 28  # bytes of input from which on there is a progress bar
_FLOAT32 = np.dtype(np.float32)
_INT32 = np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a column of the first data became, or the columns of a matrix.

    integral: which of them held nothing but integers: these stay exact. unknown: which had no two values, so that there
    was nothing yet to apply the rules for columns to: later data is judged by them.
    """

    dtype: np.dtype
    integral: tuple[bool, ...] = ()
    unknown: tuple[bool, ...] = ()


@dataclasses.dataclass
class Job:
    """How to treat the arrays of one call."""

    floats: bool
    integers: bool
    mode: str
    threads: int
    memory: Memory
    convert: bool  # False: only decide
    progress: bool | None
    target: str = "X"
    narrowest: int = 1  # bytes of an integer
    misfit: str | None = None  # "raise" or "widen": what is remembered is not judged again, but applied
    remembered: dict[Hashable, Decision] = dataclasses.field(default_factory=dict)
    decided: dict[Hashable, Decision] = dataclasses.field(default_factory=dict)  # what is to be remembered
    becomes: dict[Hashable, np.dtype] = dataclasses.field(default_factory=dict)  # what this data gets, or would get
    reports: list[ColumnReport] = dataclasses.field(default_factory=list)
    surprises: list[str] = dataclasses.field(default_factory=list)  # remembered decisions that did not hold

    def keep(self, column: Hashable, dtype: Any, nbytes: int, why: str = "", **details: Any) -> None:
        """Report a column that stays as it is."""
        self.reports.append(
            ColumnReport(self.target, column, str(dtype), str(dtype), nbytes, nbytes, 0.0, why, **details)
        )

    def reason_to_leave(self, dtype: np.dtype) -> str | None:
        """Return why a dtype is never touched: "" if there is nothing to say, None if it may become smaller."""
        if dtype.kind == "f" and dtype.itemsize == 8:
            return None if self.floats else "floats are not to be reduced"
        if dtype.kind == "c" and dtype.itemsize == 16:
            if not self.floats:
                return "floats are not to be reduced"
            return None if self.mode == "exact" else 'complex128 becomes complex64 only under mode="exact"'
        if dtype.kind in "iu":
            if not self.integers:
                return "integers are not to be reduced"
            return None if dtype.itemsize > self.narrowest else ""
        return ""


def _blocks(array: np.ndarray) -> list[tuple[Any, ...]]:
    """Cut a large array along its outermost axis in memory."""
    if array.nbytes <= _BLOCK or array.ndim == 0:
        return [_ALL]
    axis = max(range(array.ndim), key=lambda i: abs(array.strides[i]) if array.shape[i] > 1 else -1)
    step = max(1, array.shape[axis] * _BLOCK // array.nbytes)
    before = (slice(None),) * axis
    return [(*before, slice(begin, begin + step)) for begin in range(0, array.shape[axis], step)]


def _progress(job: Job, array: np.ndarray) -> Any:
    """Return a bar that shows itself after a second on a terminal; None where there is none to show."""
    if job.progress is False or (job.progress is None and (array.nbytes < _LARGE or not sys.stderr.isatty())):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    delay = 1.0 if job.progress is None else 0.0
    return tqdm(total=array.nbytes, unit="B", unit_scale=True, desc="halfstep", delay=delay, leave=False)


def _run(array: np.ndarray, columns: np.ndarray, axis: int, out: np.ndarray | None, job: Job) -> None:
    """Scan an array into `columns`, and convert it into `out`."""
    parts = [array.real, array.imag] if array.dtype.kind == "c" else [array]
    outs = [None] * 2 if out is None else [out.real, out.imag] if out.dtype.kind == "c" else [out]
    in_file = is_own_file(out)
    bar = _progress(job, array)
    # One call is faster than several: blocks are for what shows progress or must not stay in memory.
    for block in _blocks(array) if bar is not None or in_file else [_ALL]:
        for part, target in zip(parts, outs, strict=False):
            some = columns[block[axis]] if axis >= 0 and len(block) > axis else columns
            core.scan(part[block], some, axis, None if target is None else target[block], threads=job.threads)
        if in_file:
            let_go(out)
        if bar is not None:
            bar.update(array[block].nbytes)
    if bar is not None:
        bar.close()


def _narrow(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.complex64) if dtype.kind == "c" else _FLOAT32


def _columns_of(array: np.ndarray) -> tuple[int, int]:
    """Return the axis of the columns, and how many there are: those of a matrix, else the array is one."""
    return (1, array.shape[1]) if array.ndim == 2 else (-1, 1)


def _part_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64) if dtype.kind == "c" else dtype


def _blocked_floats(columns: np.ndarray, job: Job, remembered: Decision | None, exact: np.ndarray) -> np.ndarray:
    """Return what stands in the way of each column.

    A remembered decision has applied the rules for columns to the data that it was made for: they are not asked again,
    but columns of integers stay exact.
    """
    blocked, _ = core.decide_floats(columns, job.mode, core.INTEGER_RULE | core.SPREAD_RULE)
    if remembered is not None:
        known = ~np.asarray(remembered.unknown or [False] * len(columns), bool)
        blocked = np.where(known, core.decide_floats(columns, job.mode, 0)[0], blocked)
        if job.mode == "rtol":
            exact = exact | (known & np.asarray(remembered.integral, bool))
    if exact.any():
        blocked = np.where(exact, core.decide_floats(columns, "exact", 0)[0], blocked)
    return blocked.astype(np.int32)


def _decision(dtype: np.dtype, columns: np.ndarray) -> Decision:
    """Return what is to be remembered of columns that became `dtype`."""
    if dtype.kind in "iu":
        return Decision(dtype, (True,) * len(columns))
    integral = core.decide_floats(columns, "exact", 0)[1]
    unknown = columns["minimum"] >= columns["maximum"]
    return Decision(dtype, tuple(map(bool, integral)), tuple(map(bool, unknown)))


def _smallest(columns: np.ndarray, dtype: np.dtype, job: Job) -> list[np.dtype]:
    """Return the type for each integer column: not narrower than the job says, and signed if it says that."""
    types = core.decide_integers(columns, dtype)
    if job.narrowest == 1:
        return types
    if dtype.kind == "u":  # targets: differences of unsigned numbers wrap
        fits = columns["high"].view(np.uint64) <= np.iinfo(np.int32).max
        return [_INT32 if fit else dtype for fit in fits]
    return [each if each.itemsize >= job.narrowest else np.dtype(f"i{job.narrowest}") for each in types]


def _widest(types: list[np.dtype]) -> np.dtype:
    return max(types, key=lambda dtype: dtype.itemsize).newbyteorder("=")


def _convert(
    array: np.ndarray, columns: np.ndarray, axis: int, dtype: np.dtype, job: Job, out: np.ndarray | None
) -> np.ndarray:
    """Return `array` as `dtype`; `columns` see it once more, which changes nothing."""
    result = job.memory.empty_like(array, dtype) if out is None else out
    same_bits = result.view(np.uint32) if array.dtype.kind == "u" and dtype == _INT32 else result
    _run(array, columns, axis, same_bits, job)
    return result


def _value(array: np.ndarray, axis: int, column: int, position: int) -> tuple[Any, int | tuple[int, ...]]:
    """Return the element at a position of a column, and its row or index."""
    if axis >= 0:
        return array[position, column], position
    if array.ndim <= 1:
        return (array[position] if array.ndim else array[()]), position
    index = tuple(int(i) for i in np.unravel_index(position, array.shape))
    return array[index], index


def _shown(value: float) -> str:
    return repr(float(value)).removesuffix(".0")  # the shortest text that is this number


def _explain(reason: int, value: Any, column: np.void) -> str:
    shown = _shown(value)
    if reason == core.OVERFLOW:
        return f"{shown} is larger than float32 holds"
    if reason == core.UNDERFLOW:
        return f"{shown} is so small that float32 loses more than 2^-24 of it"
    if reason == core.INEXACT:
        return f"float32 does not hold {shown}"
    if reason == core.INTEGER:
        return f"all values are integers, and float32 does not hold {shown}"
    low, high = _shown(column["minimum"]), _shown(column["maximum"])
    return f"float32 would blur the differences: from {low} to {high} there is little beside the size"


def _where(array: np.ndarray, axis: int, blocked: np.ndarray, columns: np.ndarray) -> list[tuple[str, Any]]:
    """Return for each column why it is blocked and where that is first seen."""
    parts = [array.real, array.imag] if array.dtype.kind == "c" else [array]
    result: list[tuple[str, Any]] = [("", None)] * len(blocked)
    first = np.full(len(blocked), array.size)
    for part in parts:
        found = core.find_first(part, axis, blocked)
        for column in np.flatnonzero((found >= 0) & (found < first)):
            value, place = _value(part, axis, int(column), int(found[column]))
            result[column] = (_explain(int(blocked[column]), value, columns[column]), place)
        first = np.where(found >= 0, np.minimum(first, found), first)
    return result


def _coarse(column: np.void, error: float) -> str:
    """Return how far values may have moved, where that is a visible part of their spread."""
    low, high = float(column["minimum"]), float(column["maximum"])
    moved = 2.0**-24 * max(abs(low), abs(high))
    return f"values moved by up to {moved:.2g}" if error and moved > 2.0**-18 * (high - low) > 0 else ""


def _squares_wrap(column: np.void, after: np.dtype) -> str:
    low, high = (int(column[name]) % 2**64 if after.kind == "u" else int(column[name]) for name in ("low", "high"))
    size = max(abs(low), abs(high))
    wraps = size * size > np.iinfo(after).max  # in a type twice as wide it does not
    return f"x * x wraps in {after}" if wraps else ""


def shrink_array(
    array: np.ndarray,
    job: Job,
    *,
    key: Hashable = None,
    names: list[Hashable] | None = None,
    exact: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Return a plain numeric array with a smaller dtype: a new array, or `array` itself if it stays as it is.

    A matrix has a column for each index of its second axis, every other array is one column; all share one dtype, so
    the column that needs most decides. key: the name under which the decision is remembered. names: of the columns, for
    the report. exact: columns of which every value must be kept. out: where the result goes; it is written only when
    the decision is known, and must have the dtype that was decided.
    """
    if job.misfit is not None:
        from halfstep.shrink_fixed import convert_fixed

        return convert_fixed(array, job.remembered[key], job, key, names)
    axis, count = _columns_of(array)
    names = ([None] if axis < 0 else list(range(count))) if names is None else names
    exact = np.zeros(count, bool) if exact is None else exact
    each = array.nbytes // max(count, 1)
    why = job.reason_to_leave(array.dtype)
    remembered = job.remembered.get(key)
    job.becomes[key] = array.dtype
    if why is None and array.size == 0:
        why = "it has no elements"
    if why is None and remembered is not None and remembered.dtype.itemsize == array.dtype.itemsize:
        why = "so it was decided for earlier data"
        job.decided[key] = remembered
    if why is not None:
        for name in names:
            job.keep(name, array.dtype, each, why)
        return keep_in(array, out, why)

    part = _part_dtype(array.dtype)
    is_float = part.kind == "f"
    columns = core.no_columns(part, count)
    guess = _guess(array, axis, job, remembered, exact)
    hopeful = guess is not None and job.convert and out is None and job.memory.fits(array.size * guess.itemsize)
    result = None
    if hopeful:
        result = _convert(array, columns, axis, guess, job, None)
    else:
        _run(array, columns, axis, None, job)

    reasons: list[tuple[str, Any]] = [("", None)] * count
    if is_float:
        blocked = _blocked_floats(columns, job, remembered, exact)
        fits = not blocked.any()
        dtype = _narrow(array.dtype) if fits else array.dtype
        if not fits:
            reasons = _where(array, axis, blocked, columns)
        types = [dtype] * count
    else:
        types = _smallest(columns, array.dtype, job)
        dtype = _widest(types)
        if remembered is not None and remembered.dtype.itemsize > dtype.itemsize:
            dtype = remembered.dtype
        fits = dtype.itemsize < array.dtype.itemsize
    if result is not None and result.dtype != dtype:
        job.memory.give_back(result.nbytes)
        result = None
    job.decided[key] = remembered or _decision(dtype, columns)
    if is_float and remembered is not None and fits:
        _tell_blurred(columns, job, remembered, key)
    if remembered is not None and remembered.dtype != dtype:
        first = next((text for text, _ in reasons if text), f"a value needs {dtype}")
        job.surprises.append(
            f"{job.target}{'' if key is None else f' {key}'}: {remembered.dtype} before, {dtype} now: {first}"
        )

    if fits:
        job.becomes[key] = dtype
    _report(job, array, dtype if fits else array.dtype, names, columns, types, reasons, each)
    if not fits or not job.convert:
        return keep_in(array, out, next((text for text, _ in reasons if text), "")) if job.convert else array
    if out is not None and out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}, expected {dtype}, which was decided for {job.target}")
    return _convert(array, columns, axis, dtype, job, out) if result is None else result


def _tell_blurred(columns: np.ndarray, job: Job, remembered: Decision, key: Hashable) -> None:
    """Tell of later data whose differences float32 blurs: it has the dtype of the first data nevertheless."""
    blurred = np.flatnonzero(core.decide_floats(columns, job.mode, core.SPREAD_RULE)[0] == core.SPREAD)
    if len(blurred):
        text = _explain(core.SPREAD, 0.0, columns[blurred[0]])
        where = f" {key}" if key is not None else f" column {blurred[0]}" if len(columns) > 1 else ""
        job.surprises.append(f"{job.target}{where}: it becomes {remembered.dtype} as before, but {text}")


def keep_in(array: np.ndarray, out: np.ndarray | None, why: str = "") -> np.ndarray:
    """Return an array that stays as it is; into `out` it is copied."""
    if out is None:
        return array
    if out.dtype != array.dtype.newbyteorder("="):
        because = f": {why}" if why else ""
        raise ValueError(f"out has dtype {out.dtype}, but the array stays {array.dtype}{because}")
    np.copyto(out, array)
    return out


def _guess(array: np.ndarray, axis: int, job: Job, remembered: Decision | None, exact: np.ndarray) -> np.dtype | None:
    """Return the dtype that a sample of rows allows, None if that is the one it has."""
    step = max(1, array.shape[0] // _SAMPLE) if array.ndim else 1
    sample = array[::step] if array.ndim else array
    part = _part_dtype(array.dtype)
    columns = core.no_columns(part, len(exact))
    for piece in [sample.real, sample.imag] if array.dtype.kind == "c" else [sample]:
        core.scan(piece, columns, axis)
    if part.kind == "f":
        return None if _blocked_floats(columns, job, remembered, exact).any() else _narrow(array.dtype)
    dtype = _widest(_smallest(columns, array.dtype, job))
    if remembered is not None and remembered.dtype.itemsize > dtype.itemsize:
        dtype = remembered.dtype
    return dtype if dtype.itemsize < array.dtype.itemsize else None


def _report(
    job: Job,
    array: np.ndarray,
    dtype: np.dtype,
    names: list[Hashable],
    columns: np.ndarray,
    types: list[np.dtype],
    reasons: list[tuple[str, Any]],
    each: int,
) -> None:
    """Report the columns of an array that was decided."""
    changed = dtype.itemsize != array.dtype.itemsize
    after = each * dtype.itemsize // array.dtype.itemsize
    somewhere = any(text for text, _ in reasons)
    dtypes = str(array.dtype), str(dtype)
    integers = array.dtype.kind in "iu"
    errors = columns["error"].tolist() if changed and not integers else [0.0] * len(names)
    for i, name in enumerate(names):
        text, place = reasons[i]
        if somewhere and not text:
            text = "another column needs float64, and an array has one dtype" if len(names) > 1 else ""
        elif integers and not changed:
            text = "its values need it" if types[i].itemsize == dtype.itemsize else "another column needs it"
        note = ""
        if changed:
            note = _squares_wrap(columns[i], dtype) if integers else _coarse(columns[i], errors[i])
        job.reports.append(ColumnReport(job.target, name, *dtypes, each, after, errors[i], text, place, note))
