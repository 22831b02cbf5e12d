"""The NumPy dtype optimizer for scikit-learn users. Importing it imports neither torch nor scikit-learn.

from halfstep.sklearn import SklearnPrecisionOptimizer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfstep.shrink_report import ColumnReport, ShrinkReport
from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer

if TYPE_CHECKING:
    from halfstep.precision_reducer import PrecisionReducer

__all__ = ["ColumnReport", "PrecisionReducer", "ShrinkReport", "SklearnPrecisionOptimizer"]


def __getattr__(name: str) -> Any:
    if name == "PrecisionReducer":  # a scikit-learn class: importing that takes a second
        from halfstep.precision_reducer import PrecisionReducer

        return PrecisionReducer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
