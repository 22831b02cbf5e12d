"""halfstep: mixed precision for PyTorch, as a LibTorch library with a thin Python package, and smaller NumPy dtypes.

    from halfstep import GradScaler, MixedPrecisionManager

Names are loaded when they are first used, so `import halfstep` itself imports neither torch nor NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from halfstep._version import __version__

if TYPE_CHECKING:
    from halfstep._library import build_info, load_library
    from halfstep.adaptive import AdaptivePrecisionManager
    from halfstep.analyzer import MixedPrecisionAnalyzer
    from halfstep.autocast import AutocastContext
    from halfstep.config import MixedPrecisionConfig
    from halfstep.errors import LibraryMismatchError, ScaleCollapsed
    from halfstep.grad_scaler import GradScaler
    from halfstep.inference import InferencePrecisionOptimizer
    from halfstep.lowering import lower
    from halfstep.manager import MixedPrecisionManager
    from halfstep.operations import count_operations
    from halfstep.optimizer import release
    from halfstep.policies import CustomPrecisionPolicy
    from halfstep.policy import PrecisionPlan, PrecisionPolicy
    from halfstep.scopes import apply_plan, remove_plan
    from halfstep.sklearn_optimizer import SklearnPrecisionOptimizer
    from halfstep.statistics import MixedPrecisionStatistics
    from halfstep.step_graph import StepGraph
    from halfstep.step_report import StepReport

_HOME_OF = {
    "AdaptivePrecisionManager": "halfstep.adaptive",
    "AutocastContext": "halfstep.autocast",
    "CustomPrecisionPolicy": "halfstep.policies",
    "GradScaler": "halfstep.grad_scaler",
    "InferencePrecisionOptimizer": "halfstep.inference",
    "LibraryMismatchError": "halfstep.errors",
    "MixedPrecisionAnalyzer": "halfstep.analyzer",
    "MixedPrecisionConfig": "halfstep.config",
    "MixedPrecisionManager": "halfstep.manager",
    "MixedPrecisionStatistics": "halfstep.statistics",
    "PrecisionPlan": "halfstep.policy",
    "PrecisionPolicy": "halfstep.policy",
    "ScaleCollapsed": "halfstep.errors",
    "SklearnPrecisionOptimizer": "halfstep.sklearn_optimizer",
    "StepGraph": "halfstep.step_graph",
    "StepReport": "halfstep.step_report",
    "apply_plan": "halfstep.scopes",
    "build_info": "halfstep._library",
    "count_operations": "halfstep.operations",
    "load_library": "halfstep._library",
    "lower": "halfstep.lowering",
    "release": "halfstep.optimizer",
    "remove_plan": "halfstep.scopes",
}

__all__ = [
    "AdaptivePrecisionManager",
    "AutocastContext",
    "CustomPrecisionPolicy",
    "GradScaler",
    "InferencePrecisionOptimizer",
    "LibraryMismatchError",
    "MixedPrecisionAnalyzer",
    "MixedPrecisionConfig",
    "MixedPrecisionManager",
    "MixedPrecisionStatistics",
    "PrecisionPlan",
    "PrecisionPolicy",
    "ScaleCollapsed",
    "SklearnPrecisionOptimizer",
    "StepGraph",
    "StepReport",
    "__version__",
    "apply_plan",
    "build_info",
    "count_operations",
    "load_library",
    "lower",
    "release",
    "remove_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'halfstep' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        keras = "; for Keras there is halfstep.tensorflow.KerasPolicy" if name.startswith("PrecisionPol") else ""
        raise ModuleNotFoundError(
            f"halfstep.{name} needs torch, which is not installed{keras}", name="torch"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
