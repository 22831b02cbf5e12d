"""All classes for mixed precision in one place; `modules.engine.mixed_precision` is another name for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import halfstep

if TYPE_CHECKING:
    from halfstep import (
        AdaptivePrecisionManager,
        CustomPrecisionPolicy,
        InferencePrecisionOptimizer,
        MixedPrecisionAnalyzer,
        MixedPrecisionConfig,
        MixedPrecisionManager,
        MixedPrecisionStatistics,
        SklearnPrecisionOptimizer,
    )

__all__ = [
    "AdaptivePrecisionManager",
    "CustomPrecisionPolicy",
    "InferencePrecisionOptimizer",
    "MixedPrecisionAnalyzer",
    "MixedPrecisionConfig",
    "MixedPrecisionManager",
    "MixedPrecisionStatistics",
    "SklearnPrecisionOptimizer",
]


def __getattr__(name: str) -> Any:  # as in halfstep itself: some need torch, the others do not
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(halfstep, name)


def __dir__() -> list[str]:
    return sorted(__all__)
