"""What fit of a scikit-learn estimator costs for an X of some dtype: which copy it makes, and of how many bytes.

The table behind it (estimator_table.py) was measured with scikit-learn 1.9.1 on dense arrays in C order.
scikit-learn itself is not imported: classes are known by their names and modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfstep.estimator_table import INPUTS, KINDS, SAME, TABLE

_LISTS = ("steps", "estimators", "transformer_list", "transformers")  # of (name, part, ...)
_INNER = ("estimator", "base_estimator", "regressor")
# What these fit where they are given no estimator.
_DEFAULTS = {
    "AdaBoostClassifier": "DecisionTreeClassifier",
    "AdaBoostRegressor": "DecisionTreeRegressor",
    "BaggingClassifier": "DecisionTreeClassifier",
    "BaggingRegressor": "DecisionTreeRegressor",
    "CalibratedClassifierCV": "LinearSVC",
    "RANSACRegressor": "LinearRegression",
    "TransformedTargetRegressor": "LinearRegression",
}


@dataclass(frozen=True)
class EstimatorCost:
    """What `estimator.fit` does with X beyond reading it.

    `copies` tells whether fit makes a copy of X, in `fit_dtype` (None where X is used as it is), `bytes` their size
    while fit runs; work arrays of an algorithm, and what its C code allocates, are told in the note only. For a class
    that is not in the table, and for float16, `copies` is None and `bytes` NaN. An estimator that fits others has them
    in `parts`, and of them the greatest `bytes`.
    """

    estimator: str
    parts: tuple[EstimatorCost, ...]
    input_dtype: np.dtype
    fit_dtype: np.dtype | None
    copies: bool | None
    bytes: int | float
    note: str

    def __str__(self) -> str:
        size = "an unknown number of bytes" if self.copies is None else f"{self.bytes:,} bytes"
        lines = [f"{self.estimator} ({self.input_dtype}): copies {size}. {self.note}"]
        lines += [f"  {line}" for part in self.parts for line in str(part).splitlines()]
        return "\n".join(lines)


def explain_estimator(estimator: Any, dtype: Any, elements: int, columns: int | None = None) -> EstimatorCost:
    """Return what `estimator.fit` costs for a dense X of `dtype` with `elements` elements.

    With `columns`, the number of X's columns, it is known which algorithm "auto" takes where that hangs on them.
    Raises TypeError for what is no estimator and for dtypes other than floats of up to 8 bytes, integers and bool, and
    ValueError for sizes that no X has.
    """
    _check_estimator(estimator)
    dtype = np.dtype(dtype)
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise TypeError(f"dtype is {dtype}, expected a float of up to 8 bytes, an integer or bool")
    for name, value, least in (("elements", elements, 0), ("columns", columns, 1)):
        if name == "columns" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} is {value!r}, expected an integer")
        if value < least:
            raise ValueError(f"{name} is {value}, expected {least} or more")
    if columns is not None and elements % columns:
        raise ValueError(f"elements is {elements}, expected a multiple of columns ({columns})")
    return _explain(estimator, dtype, int(elements), None if columns is None else int(columns))


def _check_estimator(estimator: Any) -> None:
    if isinstance(estimator, type):
        raise TypeError(f"estimator is the class {estimator.__name__}, expected an instance: {estimator.__name__}()")
    if not callable(getattr(estimator, "fit", None)):
        raise TypeError(f"estimator is a {type(estimator).__name__}, expected an object with a method fit")


def _ancestors(estimator: Any) -> list[str]:
    """Return the names of the classes of scikit-learn that it is made of, its own first."""
    return [each.__name__ for each in type(estimator).__mro__ if each.__module__.split(".")[0] == "sklearn"]


def _entry(estimator: Any) -> str:
    """Return its name in the table: that of its nearest class of scikit-learn with a fit.

    Not that of any ancestor: LogisticRegressionCV is a LogisticRegression, and does otherwise.
    """
    return next(
        (
            each.__name__
            for each in type(estimator).__mro__
            if each.__module__.split(".")[0] == "sklearn" and hasattr(each, "fit")
        ),
        "",
    )


def _explain(estimator: Any, dtype: np.dtype, elements: int, columns: int | None) -> EstimatorCost:
    name, entry = type(estimator).__name__, _entry(estimator)
    if entry in TABLE and dtype == np.float16:
        note = "What fit does with float16 is not known: some classes keep it, some convert it and some fail."
        return EstimatorCost(name, (), dtype, None, None, math.nan, note)
    if entry in TABLE:
        return _from_table(name, entry, estimator, dtype, elements, columns)
    if "ColumnTransformer" in _ancestors(estimator):
        return _column_transformer(estimator, dtype, elements, columns)
    inner = _inner(estimator)
    if inner is None:
        note = "It is not in the table of estimators, so what its fit copies is not known."
        return EstimatorCost(name, (), dtype, None, None, math.nan, note)
    parts = tuple(_explain(part, dtype, elements, columns) for part in inner)
    if not parts:
        return EstimatorCost(name, (), dtype, None, False, 0, "It fits nothing on X.")
    note = f"The cost is that of fitting {' or '.join(part.estimator for part in parts)} on X."
    if "AdaBoostRegressor" in _ancestors(estimator):
        return _total(name, parts, dtype, f"{note} It draws the rows of each round into a copy of X.", dtype, elements)
    if len(parts) > 1:
        note = "The cost is that of the most expensive part; with n_jobs, parts that run together add up."
    if "Pipeline" in _ancestors(estimator):
        note += " Later steps get what that one puts out."
    if hasattr(estimator, "cv"):
        note += " Each split takes its share of the rows as a copy in X's dtype besides."
    return _total(name, parts, dtype, note)


def _total(
    name: str,
    parts: tuple[EstimatorCost, ...],
    dtype: np.dtype,
    note: str,
    own: np.dtype | None = None,
    elements: int = 0,
) -> EstimatorCost:
    """Return the greatest of the parts and a copy in the dtype `own`; unknown, naming which, where one part is."""
    unknown = [part.estimator for part in parts if part.copies is None]
    if unknown:
        note = f"The cost is not known, because that of {', '.join(unknown)} is not."
        return EstimatorCost(name, parts, dtype, None, None, math.nan, note)
    most = max(parts, key=lambda part: part.bytes)
    size = most.bytes + (own.itemsize * elements if own else 0)
    fit_dtype = own if own and most.fit_dtype is None else most.fit_dtype
    return EstimatorCost(name, parts, dtype, fit_dtype, bool(own) or most.copies, size, note)


def _default(name: str) -> Any:
    """Stands for the estimator that scikit-learn makes where none is given, with what the table asks of it."""
    return type(name, (), {"__module__": "sklearn", "fit": None, "copy_X": True, "positive": False})()


def _is_part(value: Any) -> bool:
    return callable(getattr(value, "fit", None)) and not isinstance(value, type)


def _inner(estimator: Any) -> list[Any] | None:
    """Return the estimators that its fit fits on X, or None where it has no place for others."""
    if "Pipeline" in _ancestors(estimator):
        parts = [part for _, part in estimator.steps if _is_part(part)]
        # halfstep's own step returns an X that is small already as it is.
        return [part for part in parts if type(part).__name__ != "PrecisionReducer"][:1]
    for attribute in _LISTS:
        value = getattr(estimator, attribute, None)
        if isinstance(value, (list, tuple)) and all(isinstance(each, tuple) and len(each) >= 2 for each in value):
            return [each[1] for each in value if _is_part(each[1])]
    for attribute in _INNER:
        if _is_part(getattr(estimator, attribute, None)):
            return [getattr(estimator, attribute)]
    defaults = [_DEFAULTS[each] for each in _ancestors(estimator) if each in _DEFAULTS]
    return [_default(defaults[0])] if defaults else None


def _column_transformer(estimator: Any, dtype: np.dtype, elements: int, columns: int | None) -> EstimatorCost:
    """Each part gets a copy of its columns; how many these are is known for lists of them only."""
    name, parts, sizes = type(estimator).__name__, [], []
    for _, part, chosen in estimator.transformers:
        if not _is_part(part):
            continue
        countable = columns is not None and isinstance(chosen, (list, tuple)) and not any(c is True for c in chosen)
        share = elements // columns * len(chosen) if countable else elements
        parts.append(_explain(part, dtype, share, len(chosen) if countable else None))
        sizes.append(countable)
    if not all(sizes):
        note = "How many columns its parts get is not known here: the cost of each is told as if it got all of X."
        return EstimatorCost(name, tuple(parts), dtype, None, None, math.nan, note)
    if not parts:
        return EstimatorCost(name, (), dtype, None, False, 0, "It fits nothing on X.")
    note = "Each part gets its columns as a copy in X's dtype, which is not counted; the cost is that of the greatest."
    return _total(name, tuple(parts), dtype, note)


def _slot(dtype: np.dtype) -> int:
    """Return the place in INPUTS of the dtype, or of the one that stands for it."""
    if dtype.kind in "bui" and dtype.itemsize <= 2:
        return INPUTS.index("int8")
    return INPUTS.index("int32" if dtype == np.uint32 else dtype.name)


def _from_table(
    name: str, entry: str, estimator: Any, dtype: np.dtype, elements: int, columns: int | None
) -> EstimatorCost:
    fit = TABLE[entry]
    fit = fit(estimator, columns, elements) if callable(fit) else fit
    kind = KINDS[fit.kind]
    copies = [dtype if each == SAME else np.dtype(each) for each in kind.copies[_slot(dtype)].split()]
    size = elements * sum(each.itemsize for each in copies)
    last = copies[-1] if copies else None
    work = fit.work[min(_slot(dtype), 2)].split()
    note = f"{entry} {kind.why}{_advice(dtype, last, len(copies), kind.copies)}."
    if work:
        note += f" Beside it fit holds up to {len(work)} work array{'s' * (len(work) > 1)} as large as X ({work[-1]})."
    if fit.beyond:
        note += f" {fit.beyond}"
    return EstimatorCost(name, (), dtype, last, bool(copies), size, note)


def _advice(dtype: np.dtype, last: np.dtype | None, count: int, kind: tuple[str, ...]) -> str:
    if last is None:
        return ": X is used as it is"
    if last == dtype:
        return f": a copy in {dtype} is made whatever X is"
    article = "an" if dtype.kind == "i" else "a"
    if dtype.kind in "iub":
        grown = last.itemsize * count / dtype.itemsize
        better = "; pass float32" if "float64" not in kind[0] and last.kind == "f" else ""
        return f": {article} {dtype} X becomes {last}, {grown:g} times its size{better}"
    if last.itemsize > dtype.itemsize:
        return f": a {dtype} X becomes {last} and saves memory only outside of fit"
    return f": a {dtype} X becomes {last}; pass {last} and no copy is made"
